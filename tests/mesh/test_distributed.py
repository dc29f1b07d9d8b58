"""ZeRO-1 on eight CPU devices: the same updates as on one device, in the layout that was promised.

Matrices of rows of Hadamard matrices make every sum exact in any order, so that all routes must
give the same bits. On Gaussians momenta and orthogonalized matrices do where a matrix stays whole.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from muon_jax import (
    FusedBlocks,
    MeshCosts,
    MuonDimensionNumbers,
    UpdateNorm,
    by_path,
    muon,
    opt_state_shardings,
    scale_by_muon,
    sharding_report,
)
from muon_jax._mesh.collectives import all_to_all, axes_index
from muon_jax._mesh.owner_runners import ExchangeRunner
from tests.checkers import gaussian, hadamard_rows, relative_error
from tests.mesh.mesh_model import CHEAP_WORK, COSTLY_WORK
from tests.reference import newton_schulz

KINDS = (AxisType.Auto, AxisType.Explicit)
STEPS = 10
# Measured: 4e-7 where whole matrices are multiplied in another batch, 6e-7 where they are shared.
FLOAT32_TOLERANCE = 3e-6


def make_mesh(lengths, names, kind=AxisType.Auto):
    devices = jax.devices()[: math.prod(lengths)]
    return jax.make_mesh(lengths, names, axis_types=(kind,) * len(lengths), devices=devices)


def put(tree, mesh, specs=None):
    """Lay a tree out on a mesh, replicated where there is no spec."""
    specs = specs or {}
    return {
        name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P())))
        for name, x in tree.items()
    }


# --- The model: every kind of leaf ---------------------------------------------------------------

SHAPES = {
    "wide": (16, 64),
    "tall": (64, 16),
    "square": (32, 32),
    "layers": (8, 16, 64),
    "odd_layers": (6, 64, 16),
    "experts": (4, 2, 16, 32),
    "heads": (32, 4, 8),
    "fused": (16, 48),
    "indivisible": (5, 7),
    "embedding": (32, 16),
    "norm": (16,),
    "bias": (3,),
}
NUMBERS = by_path(
    {
        "heads": MuonDimensionNumbers(0, (1, 2)),
        "fused": FusedBlocks((16, 16, 16)),
        "layers|experts": MuonDimensionNumbers(-2, -1),
        "wide|tall|square|indivisible": MuonDimensionNumbers(0, 1),
        "embedding": None,
    }
)


def hadamard_model(seed):
    model = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        if name in ("indivisible", "bias"):
            model[name] = np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)
        elif name == "fused":
            model[name] = np.concatenate([hadamard_rows((16, 16), seed + i) for i in range(3)], 1)
        elif name == "heads":
            model[name] = hadamard_rows((32, 32), seed).reshape(shape)
        else:
            full = shape if len(shape) > 1 else (1, *shape)
            model[name] = hadamard_rows(full, seed + index).reshape(shape)
    return model


def gaussian_model(seed):
    return {name: gaussian(shape, seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...], dict[str, Any]]] = {
    "data": ((8,), ("data",), {}),
    "data, fsdp": (
        (2, 4),
        ("data", "fsdp"),
        {
            "wide": P("fsdp"),
            "tall": P("fsdp"),
            "square": P(None, "fsdp"),
            "layers": P(None, "fsdp"),
            "odd_layers": P(None, None, "fsdp"),
            "experts": P(None, None, "fsdp"),
            "heads": P(None, "fsdp"),
            "fused": P("fsdp"),
            "embedding": P("fsdp"),
        },
    ),
    "fsdp alone, both kinds of leaf": (
        (8,),
        ("fsdp",),
        {
            "wide": P("fsdp"),
            "tall": P(None, "fsdp"),
            "square": P("fsdp"),
            "layers": P("fsdp"),
            "norm": P("fsdp"),
        },
    ),
    "data, tensor": (
        (4, 2),
        ("data", "tensor"),
        {
            "wide": P(None, "tensor"),
            "tall": P("tensor"),
            "heads": P(None, "tensor"),
            "layers": P(None, None, "tensor"),
            "odd_layers": P(None, "tensor"),
            "embedding": P("tensor"),
        },
    ),
    "data, expert": ((2, 4), ("data", "expert"), {"experts": P("expert"), "layers": P("expert")}),
    "three axes: stack and both matrix axes": (
        (2, 2, 2),
        ("data", "expert", "tensor"),
        {
            "wide": P("data", "tensor"),
            "tall": P(("data", "expert"), "tensor"),
            "square": P("tensor", ("expert", "data")),
            "experts": P("expert", None, "data", "tensor"),
            "layers": P("expert", "tensor", "data"),
            "heads": P("expert", "data", "tensor"),
            "fused": P("tensor"),
        },
    ),
    "six devices": ((2, 3), ("data", "fsdp"), {"wide": P("data"), "odd_layers": P("fsdp")}),
    "one device": ((1,), ("data",), {"wide": P("data")}),
}


def optimizer(**keywords):
    # Powers of two: where XLA fuses a product with a sum, the product must not need rounding.
    inner = muon(
        2.0**-4,
        beta=0.5,
        weight_decay=2.0**-3,
        update_scale=lambda fan_in, fan_out: 0.25,
        muon_weight_dimension_numbers=NUMBERS,
        **keywords,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def accumulated(tx, every):
    return optax.MultiSteps(tx, every) if every > 1 else tx


def make_step(tx, layout=None):
    """A training step whose gradients are those given, times a factor; its state lies as told."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(None, layout))
    def step(params, state, gradients, factor):
        gradients = jax.tree.map(lambda g: g * factor, gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, step, params, gradients, factors, state=None):
    """Steps that are compiled once: parameters, and the optimizer's state."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    state = tx.init(params) if state is None else state
    params = jax.tree.map(jnp.copy, params)
    for factor in factors:
        params, state = step(params, state, gradients, np.float32(factor))
        assert all(
            x.sharding.is_equivalent_to(shardings[name], x.ndim) for name, x in params.items()
        )
    return params, state


@functools.cache
def of_one_device(ns_dtype):
    """The optimizer without a mesh, and its step."""
    tx = optimizer(ns_dtype=ns_dtype)
    return tx, make_step(tx)


@functools.cache
def on_one_device(make, ns_dtype, every):
    """What ten steps give without a mesh. Of accumulated gradients it is given their means."""
    means = np.reshape(FACTORS, (-1, every)).mean(1)
    trees = (jax.tree.map(jnp.asarray, make(seed)) for seed in (0, 100))
    params, _ = train(*of_one_device(ns_dtype), *trees, means)
    return jax.tree.map(np.asarray, params)


# Powers of two: clipping, a heavy ball and Newton-Schulz stay exact.
FACTORS = [2.0 ** (step % 3) for step in range(STEPS)]


BOTH_KINDS = "three axes: stack and both matrix axes"
CASES = [(layout, KINDS[0]) for layout in LAYOUTS] + [(BOTH_KINDS, KINDS[1])]


@pytest.mark.bits
@pytest.mark.parametrize(("layout", "kind"), CASES, ids=str)
def test_ten_steps_are_those_of_one_device(layout, kind):
    """Bit for bit, over all routes, with weight decay, accumulation, clipping and donation."""
    lengths, names, specs = LAYOUTS[layout]
    mesh = make_mesh(lengths, names, kind)
    # Layouts take turns in the dtype, and those on both kinds of axes take both.
    ns_dtype = ("bfloat16", "float32")[(list(LAYOUTS).index(layout) + (kind is KINDS[1])) % 2]
    if math.prod(lengths) % 3 == 0:
        ns_dtype = "bfloat16"  # twelfths are exact in no float32
    # Accumulation doubles the time to compile.
    every = 2 if (layout, kind) in (("data, fsdp", KINDS[0]), (BOTH_KINDS, KINDS[1])) else 1
    param_specs = {name: specs.get(name, P()) for name in SHAPES}
    on_mesh = {"mesh": mesh, "param_specs": param_specs, "mesh_costs": COSTLY_WORK}
    tx = accumulated(optimizer(ns_dtype=ns_dtype, **on_mesh), every)
    params, gradients = (put(hadamard_model(seed), mesh, specs) for seed in (0, 100))
    state, layout = tx.init(params), None
    if every > 1:
        # JAX makes its own counts on one device, and XLA lays its sums out anew: without a word the
        # second step would be compiled as well.
        layout = opt_state_shardings(tx, params)._replace(inner_opt_state=None)
        counts = jax.device_put((state.mini_step, state.gradient_step), NamedSharding(mesh, P()))
        state = state._replace(mini_step=counts[0], gradient_step=counts[1])
    params, state = train(tx, make_step(tx, layout), params, gradients, FACTORS, state)
    expected = on_one_device(hadamard_model, ns_dtype, every)
    for name in SHAPES:
        np.testing.assert_array_equal(np.asarray(params[name]), expected[name], err_msg=name)
    # The state is still where `init` put it.
    expected_shardings = opt_state_shardings(tx, params)
    if every > 1:
        state, expected_shardings = state.inner_opt_state, expected_shardings.inner_opt_state
    for x, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(expected_shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@functools.cache
def ten_gaussian_steps(layout, **keywords):
    """Parameters after ten steps whose gradients differ in direction and in size."""
    names = ("wide", "layers", "embedding")
    specs: dict[str, Any] = {}
    start = {name: gaussian_model(0)[name] for name in names}
    params = jax.tree.map(jnp.asarray, start)
    if layout is not None:
        lengths, axes, cuts = LAYOUTS[layout]
        mesh = make_mesh(lengths, axes)
        specs = {name: cuts.get(name, P()) for name in names}
        keywords = {**keywords, "mesh": mesh, "param_specs": specs}
        params = put(start, mesh, specs)
    numbers = by_path({"layers": MuonDimensionNumbers(-2, -1)})
    tx = muon(2.0**-4, muon_weight_dimension_numbers=numbers, ns_dtype="float32", **keywords)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        model = gaussian_model(1000 + 100 * step)
        gradients = {name: model[name] * np.float32(2.0 ** (step % 3)) for name in names}
        if layout is not None:
            gradients = put(gradients, mesh, specs)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(params[name]) - start[name] for name in names}


# Measured: 1.5e-7. The wrong variants below are 0.04 to 0.06 away.
TEN_STEPS_TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "wrong", [{"nesterov": False}, {"beta": 0.9}, {"consistent_rms": 0.19}], ids=str
)
def test_ten_gaussian_steps_tell_wrong_variants_apart(wrong):
    """Multiples of one gradient, as above, are orthogonalized alike whatever momentum does."""
    expected, actual = ten_gaussian_steps(None), ten_gaussian_steps("data, fsdp")
    other = ten_gaussian_steps(None, **wrong)
    for name in ("wide", "layers"):
        error = relative_error(actual[name], expected[name])
        away = relative_error(other[name], expected[name])
        print(f"{name}: {error:.2g} on the mesh, {away:.2g} with {wrong}")
        assert error < TEN_STEPS_TOLERANCE < away / 10
    assert relative_error(actual["embedding"], expected["embedding"]) < TEN_STEPS_TOLERANCE


@pytest.mark.parametrize("at_once", [8, 7], ids=["at once", "in stages"])
def test_an_exchange_brings_each_piece_to_its_place(monkeypatch, at_once):
    """Over hundreds of devices it goes along one axis after the other."""
    monkeypatch.setattr("muon_jax._mesh.cost.EXCHANGED_AT_ONCE", at_once)
    mesh, axes = make_mesh((2, 2, 2), ("a", "b", "c")), ("a", "b", "c")
    # The value says who sends it and to whom: 10 of the first, 1 of the second.
    sent = 10 * jnp.arange(8).repeat(8) + jnp.tile(jnp.arange(8), 8)
    exchange = jax.shard_map(
        lambda x: all_to_all(x.astype(jnp.bfloat16), axes), mesh=mesh, in_specs=P(axes),
        out_specs=P(axes),
    )  # fmt: skip
    program = jax.jit(exchange).lower(sent)
    assert program.as_text().count("stablehlo.all_to_all") == (1 if at_once == 8 else 3)
    received = np.asarray(program.compile()(sent), np.float32).reshape(8, 8)
    np.testing.assert_array_equal(received, sent.reshape(8, 8).T)


@pytest.mark.bits
def test_zeros_travel_in_empty_slots(monkeypatch):
    """Three matrices on eight devices: what reaches the other five is zero, and no result."""
    seen = {}
    real = ExchangeRunner.to_owners

    def to_owners(self, pieces):
        matrices = real(self, pieces)
        seen["owners"] = self.part.owners
        jax.debug.callback(
            lambda device, x: seen.update({int(device): x}),
            *(axes_index(self.key.team), matrices),
        )
        return matrices

    monkeypatch.setattr(ExchangeRunner, "to_owners", to_owners)
    mesh = make_mesh((8,), ("data",))
    params = put({"stack": hadamard_rows((3, 32, 32))}, mesh)
    numbers = MuonDimensionNumbers(-2, -1)
    alone = scale_by_muon(weight_dimension_numbers=numbers)
    tx = scale_by_muon(weight_dimension_numbers=numbers, mesh=mesh, mesh_costs=CHEAP_WORK)
    updates, _ = jax.block_until_ready(jax.jit(tx.update)(params, tx.init(params)))
    jax.effects_barrier()
    busy = [bool((row >= 0).any()) for row in seen["owners"]]
    assert sum(busy) == 3
    for device, is_busy in enumerate(busy):
        assert np.asarray(seen[device], np.float32).any() == is_busy, device
    params = jax.tree.map(np.asarray, params)
    expected, _ = jax.jit(alone.update)(params, alone.init(params))
    np.testing.assert_array_equal(updates["stack"], expected["stack"])


def test_the_layouts_above_take_every_route():
    seen = set()
    for lengths, names, specs in LAYOUTS.values():
        mesh = make_mesh(lengths, names)
        report = sharding_report(
            put(hadamard_model(0), mesh, specs),
            mesh=mesh,
            param_specs={name: specs.get(name, P()) for name in SHAPES},
            muon_weight_dimension_numbers=NUMBERS,
            mesh_costs=COSTLY_WORK,
        )
        seen |= {word for row in report.rows for word in row.route.split()}
    assert {"local", "exchange", "split", "replicated"} <= seen


@pytest.mark.bits
@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["data, fsdp"])
def test_gaussians_are_the_same_where_matrices_stay_whole(layout, ns_dtype):
    """Cheap FLOPs share no matrix. In float32 a loop over one matrix is compiled as none.

    Every factor is a power of two here: of ``0.2 sqrt(n) O + 0.1 W`` XLA fuses one of the two
    products with the sum, on jax 0.12 not always the same one, which moves a last bit of float32;
    and of ``beta M + G`` the only one, or none. AdamW's ``b2 nu + (1 - b2) g g`` has no factors
    that would make all its products exact.
    """
    lengths, names, specs = LAYOUTS[layout]
    mesh = make_mesh(lengths, names)
    specs = {name: specs.get(name, P()) for name in SHAPES}
    keywords = {"muon_weight_dimension_numbers": NUMBERS, "ns_dtype": ns_dtype}
    params = gaussian_model(0)
    on_mesh = {"mesh": mesh, "param_specs": specs, "mesh_costs": CHEAP_WORK}
    report = sharding_report(params, **on_mesh, **keywords)
    assert not any("split" in row.route for row in report.rows)
    muons = {leaf.path for leaf in report.leaves if leaf.optimizer == "muon"}
    make = functools.partial(
        muon,
        2.0**-4,
        beta=0.5,
        weight_decay=2.0**-3,
        update_scale=lambda fan_in, fan_out: 0.25,
        **keywords,
    )
    tx, alone = make(**on_mesh), make()
    state, state_alone = tx.init(params), alone.init(params)
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    for step in range(2):
        gradients = gaussian_model(50 + step)
        sharded = put(gradients, mesh, specs)
        updates, state = update(sharded, state, put(params, mesh, specs))
        expected, state_alone = update_alone(gradients, state_alone, params)
        for name in SHAPES:
            if ns_dtype == "bfloat16" and name in muons:
                np.testing.assert_array_equal(updates[name], expected[name], err_msg=name)
            else:
                assert relative_error(updates[name], expected[name]) < FLOAT32_TOLERANCE, name


def random_layout(seed):
    """Leaves of random shapes, each cut over random axes of a mesh of two by four."""
    rng = np.random.default_rng(seed)
    shapes, specs = {}, {}
    for index in range(3):
        stack = [(), (2,), (3,), (8,)][rng.integers(4)]
        shape = (*stack, *(int(n) for n in rng.choice([8, 16, 24, 48], 2)))
        axes = [(), ("data",), ("fsdp",), ("data", "fsdp")][rng.integers(4)]
        count = math.prod({"data": 2, "fsdp": 4}[axis] for axis in axes)
        entries: list[Any] = [None] * len(shape)
        entries[rng.choice([d for d in range(len(shape)) if shape[d] % count == 0] or [0])] = axes
        fits = all(shape[d] % count == 0 for d, axes in enumerate(entries) if axes)
        shapes[f"leaf_{index}"], specs[f"leaf_{index}"] = shape, P(*entries) if fits else P()
    return shapes, specs


@pytest.mark.bits
@pytest.mark.parametrize(
    ("shapes", "specs", "count"),
    [
        # One matrix on each device: 1 in 500 came out otherwise while XLA summed the squares for
        # its norm in the order of the pieces that it is put together from.
        ({"stack": (8, 16, 16)}, {"stack": P()}, 300),
        (*random_layout(0), 5),
        # The norm of one of its matrices differed in the last bit, as its squares were summed.
        (*random_layout(2), 5),
    ],
    ids=["one matrix each", "random", "of which a norm is summed otherwise"],
)
def test_whole_matrices_have_the_same_bits_in_any_layout(shapes, specs, count):
    """The promise: momenta, and in bfloat16 orthogonalized matrices, from the same gradients.

    With a beta whose products are exact: of ``beta M + G`` one program may round the product and
    another not, which depends on the processor too (on an AMD EPYC with jax 0.12 some did).
    """
    mesh = make_mesh((2, 4), ("data", "fsdp"))
    numbers = MuonDimensionNumbers(-2, -1)
    make = functools.partial(scale_by_muon, beta=0.5, weight_dimension_numbers=numbers)
    alone, tx = make(), make(mesh=mesh, param_specs=specs, mesh_costs=CHEAP_WORK)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    params = put(zeros, mesh, specs)
    state, state_alone = tx.init(params), alone.init(zeros)
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    for step in range(count):
        gradients = {
            name: gaussian(shape, 10 * step + i) for i, (name, shape) in enumerate(shapes.items())
        }
        updates, state = update(put(gradients, mesh, specs), state, params)
        expected, state_alone = update_alone(gradients, state_alone)
        for name in shapes:
            where = f"step {step}, {name} {shapes[name]}, {specs[name]}"
            np.testing.assert_array_equal(state.mu[name], state_alone.mu[name], err_msg=where)
            np.testing.assert_array_equal(updates[name], expected[name], err_msg=where)


@pytest.mark.bits
@pytest.mark.parametrize(
    ("ns_dtype", "schedule"),
    # In float32 five steps would round, and sums of rounded terms depend on their order.
    [("bfloat16", "standard"), ("float32", [(2.0, -1.5, 0.5)])],
    ids=["bfloat16", "float32"],
)
@pytest.mark.parametrize(
    ("lengths", "kind"), [((8,), KINDS[0]), ((2, 4), KINDS[1])], ids=["8-Auto", "2x4-Explicit"]
)
def test_shared_matrices_are_exact_up_to_256_rows(lengths, kind, ns_dtype, schedule):
    mesh = make_mesh(lengths, ("a", "b")[: len(lengths)], kind)
    # The root of rows x cols is a power of two: the first iterate is exact.
    shapes = {"one": (256, 256), "two": (2, 64, 256), "three": (3, 64, 16)}
    params = {name: hadamard_rows(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    numbers = MuonDimensionNumbers(-2, -1)
    report = sharding_report(
        params,
        mesh=mesh,
        ns_dtype=ns_dtype,
        ns_coeffs=schedule,
        muon_weight_dimension_numbers=numbers,
        mesh_costs=COSTLY_WORK,
    )
    assert all("split" in row.route for row in report.rows)
    keywords: dict[str, Any] = {"weight_dimension_numbers": numbers, "ns_dtype": ns_dtype}
    tx = scale_by_muon(schedule, mesh=mesh, mesh_costs=COSTLY_WORK, **keywords)
    updates, _ = jax.jit(tx.update)(put(params, mesh), tx.init(put(params, mesh)))
    alone = scale_by_muon(schedule, **keywords)
    expected, _ = jax.jit(alone.update)(params, alone.init(params))
    for name in shapes:
        np.testing.assert_array_equal(updates[name], expected[name], err_msg=name)


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
def test_shared_gaussians_are_no_further_from_float64(ns_dtype):
    """Measured: 1.00 times the error of a single device, in both dtypes."""
    mesh = make_mesh((8,), ("data",))
    params = {"kernel": gaussian((2, 128, 256))}
    numbers = MuonDimensionNumbers(-2, -1)
    expected = np.stack([newton_schulz(matrix) for matrix in params["kernel"]])

    def error(**mesh_keywords):
        tx = scale_by_muon(
            nesterov=False,
            update_scale=lambda fan_in, fan_out: 1.0,
            weight_dimension_numbers=numbers,
            ns_dtype=ns_dtype,
            **mesh_keywords,
        )
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
        return relative_error(updates["kernel"], expected)

    on_mesh = {"mesh": mesh, "mesh_costs": COSTLY_WORK}
    (row,) = sharding_report(params, muon_weight_dimension_numbers=numbers, **on_mesh).rows
    assert "split by 4" in row.route
    shared, alone = error(**on_mesh), error()
    print(f"{ns_dtype}: {shared:.3g} shared, {alone:.3g} alone")
    assert shared <= 1.1 * alone


@pytest.mark.parametrize(
    "keywords",
    [
        {"update_scale": UpdateNorm(0.3)},
        {"adaptive": True},
        {"adaptive": True, "update_scale": UpdateNorm(0.3)},
        {"preconditioning": "aol"},
        {"preconditioning": "schatten"},
        {"preconditioning": "spectral"},
        {"ns_coeffs": "deepseek_v4"},
        {"max_group_bytes": 1},
        {"nesterov": False, "mu_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_options_mean_the_same_on_a_mesh(keywords):
    mesh = make_mesh((2, 4), ("data", "fsdp"))
    shapes = {"rows": (16, 64), "tall": (64, 16), "stack": (3, 32, 32), "norm": (16,)}
    specs = {"rows": P("fsdp"), "tall": P(), "stack": P(None, None, "fsdp"), "norm": P()}
    numbers = by_path({"stack": MuonDimensionNumbers(1, 2)})
    keywords = {"muon_weight_dimension_numbers": numbers, "ns_dtype": "float32", **keywords}
    params, gradients = (
        {name: gaussian(shape, seed) for seed, (name, shape) in enumerate(shapes.items(), start)}
        for start in (0, 10)
    )
    alone = muon(0.1, **keywords)
    tx = muon(0.1, mesh=mesh, param_specs=specs, mesh_costs=COSTLY_WORK, **keywords)
    on_mesh = [put(tree, mesh, specs) for tree in (params, gradients)]
    updates, state = jax.jit(tx.update)(on_mesh[1], tx.init(on_mesh[0]), on_mesh[0])
    expected, state_alone = jax.jit(alone.update)(gradients, alone.init(params), params)
    for a, b in zip(
        jax.tree.leaves((updates, state)), jax.tree.leaves((expected, state_alone)), strict=True
    ):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 1e-4 if a.size else True


@pytest.mark.bits
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_chunks_are_one_loop_on_a_mesh(kind):
    """Leaves of one shape, cut otherwise, in rounds of eight: the same bits, no more products."""
    mesh = make_mesh((2, 4), ("data", "fsdp"), kind)
    numbers = MuonDimensionNumbers(-2, -1)
    cuts = {"rows": P(None, "fsdp"), "cols": P(None, None, "fsdp")}

    def products(count, options):
        shapes = {"rows": (count, 16, 32), "cols": (count, 16, 32)}
        params = put({n: hadamard_rows(s) for n, s in shapes.items()}, mesh, cuts)
        on_mesh = {"mesh": mesh, "param_specs": cuts, "mesh_costs": CHEAP_WORK}
        tx = scale_by_muon(weight_dimension_numbers=numbers, **on_mesh, **options)
        state = tx.init(params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
        updates, _ = compiled(params, state, params)
        alone = scale_by_muon(weight_dimension_numbers=numbers)
        plain = jax.tree.map(np.asarray, params)
        expected, _ = jax.jit(alone.update)(plain, alone.init(plain))
        for name in shapes:
            np.testing.assert_array_equal(updates[name], expected[name], err_msg=name)
        return compiled.as_text().count(" dot(")

    whole = products(8, {})
    assert 0 < products(8, {"max_group_bytes": 1}) == products(20, {"max_group_bytes": 1}) <= whole


# --- Where things lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_init_lays_the_state_out_eagerly_jitted_and_in_nnx(kind):
    mesh = make_mesh((2, 4), ("data", "fsdp"), kind)
    specs = {"kernel": P(None, "fsdp"), "bias": P()}
    params = put({"kernel": gaussian((16, 32)), "bias": gaussian((16,))}, mesh, specs)
    tx = optax.chain(optax.clip_by_global_norm(1.0), muon(1e-3, mesh=mesh, param_specs=specs))
    expected = opt_state_shardings(tx, params)
    assert jax.tree.structure(expected) == jax.tree.structure(tx.init(params))
    mu = expected[1].inner_states["muon"].inner_state[0].mu["kernel"]
    assert mu.is_equivalent_to(NamedSharding(mesh, P("data", "fsdp")), 2) or (
        mu.is_equivalent_to(NamedSharding(mesh, P(None, ("fsdp", "data"))), 2)
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
    for a, b in zip(
        jax.tree.leaves(opt_state_shardings(tx, abstract)), jax.tree.leaves(expected), strict=True
    ):
        assert a == b
    if kind is AxisType.Explicit:
        for x, sharding in zip(
            jax.tree.leaves(jax.eval_shape(tx.init, params)), jax.tree.leaves(expected), strict=True
        ):
            assert not x.ndim or x.sharding.spec == sharding.spec


def test_an_nnx_optimizer_trains_on_a_mesh():
    mesh = make_mesh((8,), ("data",))
    model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    replicated = NamedSharding(mesh, P())
    nnx.update(model, jax.device_put(nnx.state(model), replicated))
    opt = nnx.Optimizer(model, muon(0.1, mesh=mesh), wrt=nnx.Param)
    is_sharded = lambda: [  # noqa: E731
        not x.sharding.is_fully_replicated for x in jax.tree.leaves(nnx.state(opt, nnx.OptState))
    ]
    before = is_sharded()
    assert any(before)

    @nnx.jit
    def step(model, opt, x):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        opt.update(model, gradients)
        return loss

    x = jax.device_put(gaussian((16, 16)), NamedSharding(mesh, P("data")))
    losses = [float(step(model, opt, x)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert is_sharded() == before


def test_both_groups_are_sharded_and_nothing_compiles_again():
    mesh = make_mesh((8,), ("data",))
    params = put({"kernel": gaussian((64, 128)), "embedding": gaussian((32, 64))}, mesh)
    tx = muon(optax.cosine_decay_schedule(1e-2, 10), mesh=mesh)
    state = tx.init(params)
    for x in jax.tree.leaves(state):
        assert x.ndim == 0 or x.addressable_shards[0].data.size * 8 == x.size
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
    assert update._cache_size() == 1


def test_parameters_left_out_of_zero1_axes_keep_their_state_whole():
    mesh = make_mesh((2, 4), ("slice", "data"))
    params = put({"kernel": gaussian((16, 32))}, mesh)
    state = scale_by_muon(mesh=mesh, zero1_axes="data").init(params)
    assert state.mu["kernel"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), 2)
    state = scale_by_muon(mesh=mesh, zero1_axes=()).init(params)
    assert state.mu["kernel"].sharding.is_fully_replicated


def test_inject_hyperparams_takes_a_mesh():
    mesh = make_mesh((8,), ("data",))
    params = put({"kernel": gaussian((16, 32))}, mesh)
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    tx = optax.inject_hyperparams(muon)(schedule, mesh=mesh, beta=0.9)
    plain = muon(schedule, mesh=mesh, beta=0.9)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    assert relative_error(updates["kernel"], expected["kernel"]) < 1e-6
    assert "mesh" not in state.hyperparams


def test_a_masked_gradient_keeps_its_momentum_on_a_mesh():
    mesh = make_mesh((8,), ("data",))
    params = put({"a": gaussian((16, 32)), "b": gaussian((16, 32)), "c": gaussian((16,))}, mesh)
    tx = muon(1e-2, mesh=mesh)
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    updates, after = update({**params, "b": None, "c": None}, state, params)
    assert updates["b"] is None and updates["c"] is None
    old, new = (s.inner_states["muon"].inner_state[0].mu for s in (state, after))
    np.testing.assert_array_equal(old["b"], new["b"])
    assert (np.asarray(old["a"]) != np.asarray(new["a"])).any()


# --- What cannot be done -------------------------------------------------------------------------


def kernel(mesh, spec=None):
    return put({"kernel": gaussian((16, 32))}, mesh, {"kernel": spec or P()})


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"param_specs": P()}, "param_specs says how to use a mesh: pass mesh= as well"),
        ({"zero1_axes": "data"}, "zero1_axes says how to use a mesh: pass mesh= as well"),
        ({"mesh_costs": MeshCosts()}, "mesh_costs says how to use a mesh: pass mesh= as well"),
    ],
)
def test_arguments_of_a_mesh_need_one(keywords, match):
    with pytest.raises(ValueError, match=match):
        muon(1e-3, **keywords)


def test_what_a_mesh_is_and_has():
    with pytest.raises(ValueError, match="names 'model', which the mesh lacks"):
        muon(1e-3, mesh=make_mesh((8,), ("data",)), zero1_axes=("model",))
    mixed = jax.make_mesh((2, 4), ("a", "b"), axis_types=KINDS)
    with pytest.raises(ValueError, match="Auto axes or Explicit ones throughout"):
        muon(1e-3, mesh=mixed)


def test_a_mesh_must_be_one(untyped):
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh.*got 8"):
        muon(1e-3, mesh=8)
    mesh = make_mesh((8,), ("data",))
    with pytest.raises(TypeError, match=r"mesh_costs must be a muon_jax.MeshCosts.*got 1250"):
        muon(1e-3, mesh=mesh, mesh_costs=1250)


@pytest.mark.parametrize(
    ("specs", "error", "match"),
    [
        (P("model"), ValueError, "kernel, shape .*the mesh has no axis 'model'"),
        (P("data", "data"), ValueError, "'data' comes twice"),
        (P("data", None, None), ValueError, "3 entries for 2 dimensions"),
        ({"other": P()}, ValueError, "param_specs says nothing of kernel"),
        ({"kernel": "data"}, TypeError, "param_specs has 'data' at kernel"),
        (P("data"), ValueError, r"param_specs says P.*'data'.*but the array is sharded as P\(\)"),
    ],
)
def test_specs_that_do_not_fit_raise(specs, error, match):
    mesh = make_mesh((8,), ("data",))
    with pytest.raises(error, match=match):
        muon(1e-3, mesh=mesh, param_specs=specs).init(kernel(mesh))


def test_a_spec_that_does_not_divide_raises():
    mesh = make_mesh((8,), ("data",))
    params = {"kernel": jax.ShapeDtypeStruct((12, 32), jnp.float32)}
    tx = muon(1e-3, mesh=mesh, param_specs=P("data"))
    with pytest.raises(ValueError, match="8 devices do not divide dimension 0 of length 12"):
        opt_state_shardings(tx, params)


def test_sharded_parameters_without_specs_raise():
    mesh = make_mesh((8,), ("data",))
    params = kernel(mesh, P("data"))
    for use in (muon(1e-3, mesh=mesh).init, functools.partial(sharding_report, mesh=mesh)):
        with pytest.raises(ValueError, match=r"kernel, shape.*is sharded as.*Pass param_specs="):
            use(params)


def test_blocks_along_a_sharded_axis_raise():
    mesh = make_mesh((2,), ("data",))
    numbers = by_path({"kernel": FusedBlocks((16, 16))})
    tx = muon(1e-3, mesh=mesh, param_specs=P(None, "data"), muon_weight_dimension_numbers=numbers)
    with pytest.raises(ValueError, match=r"kernel, shape.*blocks cannot be cut out of shards"):
        tx.init(kernel(mesh, P(None, "data")))


def test_opt_state_shardings_needs_a_mesh():
    with pytest.raises(ValueError, match="found no optimizer of muon_jax with a mesh"):
        opt_state_shardings(muon(1e-3), {"kernel": jnp.ones((4, 4))})


# --- Found in review -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_injected_hyperparameters_stay_on_the_mesh(kind):
    """From step 2 on they are arrays on the mesh, which a shard_map may not close over."""
    mesh = make_mesh((8,), ("data",), kind)
    params = put({"kernel": gaussian((16, 32)), "bias": gaussian((16,))}, mesh)
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    keywords = {"beta": 0.9, "consistent_rms": 0.3}
    tx = optax.inject_hyperparams(muon)(schedule, mesh=mesh, **keywords)
    plain = muon(schedule, **keywords)
    state = jax.jit(tx.init, out_shardings=opt_state_shardings(tx, params))(params)
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    update, state_alone = jax.jit(tx.update), plain.init(alone)
    for _ in range(3):
        updates, state = update(params, state, params)
        expected, state_alone = plain.update(alone, state_alone, alone)
    assert update._cache_size() <= 2  # the hyperparameters' own dispatch, not a compilation
    for name in params:
        assert relative_error(updates[name], expected[name]) < 1e-6


def test_state_beside_muon_lies_like_its_parameters():
    mesh = make_mesh((8,), ("fsdp",))
    specs = {"kernel": P("fsdp"), "embedding": P("fsdp")}
    params = put({"kernel": gaussian((16, 32)), "embedding": gaussian((24, 16))}, mesh, specs)
    tx = optax.partition(
        {"m": scale_by_muon(mesh=mesh, param_specs=specs), "a": optax.scale_by_adam()},
        {"kernel": "m", "embedding": "a"},
    )
    shardings = opt_state_shardings(tx, params)
    adam = shardings.inner_states["a"].inner_state
    assert adam.mu["embedding"].spec == adam.nu["embedding"].spec == P("fsdp")


def test_updates_have_derivatives():
    """Bits have none: the bfloat16 collectives must be differentiated as what they move."""
    mesh = make_mesh((2, 4), ("data", "fsdp"))
    params = {"kernel": gaussian((16, 32))}
    weights = gaussian((16, 32), 1)

    def gradient(tx):
        state = tx.init(params)
        loss = lambda g: jnp.sum(tx.update({"kernel": g}, state, params)[0]["kernel"] * weights)  # noqa: E731
        return jax.jit(jax.grad(loss))(jnp.asarray(params["kernel"]))

    expected = gradient(muon(1.0))
    assert np.abs(expected).max() > 0
    assert relative_error(gradient(muon(1.0, mesh=mesh)), expected) < 0.05


def test_empty_leaves_and_scalars_are_fine():
    mesh = make_mesh((8,), ("data",))
    params = {"none": jnp.zeros((16, 0)), "scalar": jnp.ones(()), "kernel": gaussian((16, 32))}
    tx = muon(1e-2, mesh=mesh)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["none"].shape == (16, 0)


def test_an_abstract_mesh_has_no_devices():
    mesh = make_mesh((8,), ("data",))
    tx = muon(1e-2, mesh=mesh.abstract_mesh)
    params = {"kernel": gaussian((16, 32))}
    with pytest.raises(ValueError, match="mesh is abstract"):
        tx.init(params)
    with jax.set_mesh(mesh):
        state = tx.init(params)
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


def test_gradients_that_lie_otherwise_than_their_parameters_raise():
    mesh = make_mesh((8,), ("data",), KINDS[1])
    params = kernel(mesh, P("data"))
    tx = scale_by_muon(mesh=mesh)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"kernel, shape .* its momentum lies as .*Pass params"):
        tx.update(kernel(mesh), state)
    updates, _ = tx.update(kernel(mesh), state, params)
    assert updates["kernel"].sharding.spec == P("data", None)


def test_other_meshes_and_other_words_raise():
    mesh = make_mesh((8,), ("data",))
    other = make_mesh((4,), ("data",))
    with pytest.raises(ValueError, match=r"kernel, shape .* is on a mesh \{'data': 4\}"):
        muon(1e-3, mesh=mesh).init(kernel(other))
    with pytest.raises(ValueError, match=r"is on a mesh .*Explicit.*Use one mesh for both"):
        muon(1e-3, mesh=mesh).init(kernel(make_mesh((8,), ("data",), KINDS[1])))
    with pytest.raises(ValueError, match="param_specs is on a mesh"):
        muon(1e-3, mesh=mesh, param_specs=NamedSharding(other, P("data"))).init(kernel(mesh))
    with pytest.raises(ValueError, match="leaves an axis to XLA"):
        muon(1e-3, mesh=mesh, param_specs=P(P.UNCONSTRAINED)).init(kernel(mesh))
    with pytest.raises(ValueError, match="sharding_report needs mesh="):
        sharding_report(kernel(mesh), mesh=None)
    tx = scale_by_muon(mesh=mesh)
    state = tx.init(kernel(mesh))
    inside = jax.shard_map(
        lambda g, s: tx.update(g, s)[0], mesh=mesh, in_specs=(P(), P()), out_specs=P()
    )
    with pytest.raises(ValueError, match="called inside a shard_map"):
        inside(kernel(mesh), state)


def test_zero1_axes_are_names(untyped):
    with pytest.raises(TypeError, match="zero1_axes must name mesh axes"):
        muon(1e-3, mesh=make_mesh((8,), ("data",)), zero1_axes=3)
