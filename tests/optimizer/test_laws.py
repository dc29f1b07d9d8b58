"""The law-book: every transformation of ours, crossed with what any Optax user relies on."""

import dataclasses
import functools
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from muon_jax import MuonDimensionNumbers, UpdateNorm, muon, scale_by_muon
from tests.checkers import (
    abstract,
    assert_trees_equal,
    check_state_is_a_fixed_point,
    gaussian,
    hadamard_rows,
)

LR = 2.0**-4
# A compiled step against an eager one, or inside a scan: the same float32 arithmetic, fused
# differently; measured 0 on matrices, 1e-7 on AdamW's leaves.
FUSION_NOISE = 1e-5


def array(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(gaussian(shape, seed), dtype)


def matrices(dtype=jnp.float32):
    """A wide and a tall matrix and a stack: what `scale_by_muon` takes."""
    return {
        "wide": {"kernel": array((4, 6), 0, dtype)},
        "tall": {"kernel": array((6, 4), 1, dtype)},
        "experts": {"kernel": array((2, 4, 4), 2, dtype)},
    }


def everything(dtype=jnp.float32):
    """The same with all that goes to AdamW, and an attention kernel."""
    return matrices(dtype) | {
        "attention": {
            "query": {"kernel": array((4, 2, 3), 3, dtype), "bias": array((2, 3), 9, dtype)}
        },
        "embed": {"embedding": array((6, 4), 4, dtype)},
        "norm": {"scale": array((4,), 5, dtype)},
        "row": {"kernel": array((1, 5), 6, dtype)},
        "column": {"kernel": array((5, 1), 7, dtype)},
        "temperature": array((), 8, dtype),
        "empty": {},
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformation and the parameters it is made for."""

    make: object
    params: object = everything


CASES = {
    "muon": Case(lambda: muon(LR)),
    "muon, float32": Case(lambda: muon(LR, ns_dtype="float32")),
    "muon, bfloat16 momentum": Case(lambda: muon(LR, mu_dtype="bfloat16")),
    "muon, without Nesterov": Case(lambda: muon(LR, nesterov=False, weight_decay=0.0)),
    "muon, adaptive": Case(lambda: muon(LR, adaptive=True, consistent_rms=None)),
    "muon, Update Norm, polar_express": Case(
        lambda: muon(LR, ns_coeffs="polar_express", update_scale=UpdateNorm())
    ),
    "muon, per head, schatten, chunks": Case(
        lambda: muon(LR, heads="per_head", preconditioning="schatten", max_group_bytes=64)
    ),
    "muon, schedules": Case(
        lambda: muon(
            optax.linear_schedule(LR, 0.0, 10),
            weight_decay=optax.constant_schedule(0.1),
            adam_learning_rate=optax.cosine_decay_schedule(LR, 10),
        )
    ),
    "muon, mask": Case(
        lambda: muon(LR, weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    ),
    "scale_by_muon": Case(scale_by_muon, matrices),
    "scale_by_muon, bfloat16 momentum, aol": Case(
        lambda: scale_by_muon("dion", mu_dtype="bfloat16", preconditioning="aol"), matrices
    ),
    "scale_by_muon, any function of the shape": Case(
        lambda: scale_by_muon(update_scale=lambda fan_in, fan_out: fan_in / fan_out), matrices
    ),
}


def case(name):
    entry = CASES[name]
    return entry.make(), entry.params()


every_case = pytest.mark.parametrize("name", CASES)


def gradients_at(params, step=0):
    return jax.tree.map(lambda p: jnp.cos(p * (step + 1)).astype(p.dtype), params)


def steps(tx, params, count=3, state=None, update=None):
    """Run `count` steps; returns the parameters and the state."""
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update) if update is None else update
    for step in range(count):
        updates, state = update(gradients_at(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_near(actual, expected):
    assert abstract(actual) == abstract(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), FUSION_NOISE, FUSION_NOISE
        )


# --- Laws of every transformation ----------------------------------------------------------------


def check_zero_gradients_are_harmless(name, update, state, params):
    """No NaN, no motion of the moments; without weight decay, no update."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = update(zeros, state, params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    if name.startswith("scale_by_muon"):
        assert_trees_equal(jax.tree.map(jnp.abs, updates), zeros)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert not any(jnp.any(leaf) for leaf in floats)


@every_case
def test_updates_and_state_keep_structure_shape_and_dtype(name):
    tx, params = case(name)
    update = jax.jit(tx.update)
    check_state_is_a_fixed_point(optax.GradientTransformation(tx.init, update), params)
    check_zero_gradients_are_harmless(name, update, tx.init(params), params)
    for dtype in (jnp.bfloat16, jnp.float16):
        abstract_params = jax.eval_shape(lambda d=dtype: CASES[name].params(d))
        state = jax.eval_shape(tx.init, abstract_params)
        updates, after = jax.eval_shape(tx.update, abstract_params, state, abstract_params)
        assert abstract(updates) == abstract(abstract_params)
        assert abstract(after) == abstract(state)


@every_case
def test_one_trace_for_all_steps_with_donation_and_in_a_scan(name):
    """Three laws on one program: it is traced once, gives its buffers away, and loops."""
    tx, params = case(name)
    traces = []

    def step(carry, index):
        params, state = carry
        traces.append(None)
        gradients = jax.tree.map(lambda p: jnp.sin(p * (index + 1)).astype(p.dtype), params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    compiled = jax.jit(step, donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
    for index in range(3):
        given = carry
        carry, _ = compiled(carry, jnp.float32(index))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]))
    assert len(traces) == 1
    assert compiled._cache_size() == 1

    looped, _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(3, dtype=jnp.float32))
    assert_near(looped, carry)


@every_case
def test_tree_map_params_reaches_every_moment(name):
    tx, params = case(name)
    state = tx.init(params)
    marked = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
    assert abstract(marked) == abstract(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(marked), strict=True):
        is_moment = jnp.issubdtype(before.dtype, jnp.floating)
        assert jnp.all(after == before + (1 if is_moment else 0))


@every_case
def test_extra_arguments_are_passed_on(name):
    tx, params = case(name)
    chained = optax.chain(tx, optax.identity())
    updates, _ = jax.eval_shape(
        functools.partial(chained.update, value=1.0), params, chained.init(params), params
    )
    assert abstract(updates) == abstract(params)


# --- Wrappers of Optax ---------------------------------------------------------------------------


def test_multi_steps_is_the_step_of_the_mean_gradient():
    tx, params = muon(LR), everything()
    wrapped = optax.MultiSteps(tx, every_k_schedule=2)
    update = jax.jit(wrapped.update)
    state = wrapped.init(params)
    first, state = update(gradients_at(params, 0), state, params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(first))
    second, state = update(gradients_at(params, 1), state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients_at(params, 0), gradients_at(params, 1))
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    # The mean is rounded otherwise, and bfloat16 may round to the other side.
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05 * LR * 0.2)


def test_apply_if_finite_skips_a_diverged_step():
    tx, params = optax.apply_if_finite(muon(LR), max_consecutive_errors=3), everything()
    update = jax.jit(tx.update)
    _, state = update(gradients_at(params), tx.init(params), params)
    bad = gradients_at(params)
    bad["tall"]["kernel"] = bad["tall"]["kernel"].at[0, 0].set(jnp.nan)
    updates, after = update(bad, state, params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    assert_trees_equal(after.inner_state, state.inner_state)


def test_after_clipping_in_a_chain():
    """Clipping first rescales the gradients, which Muon does not see."""
    params = matrices()
    plain = scale_by_muon(ns_dtype="float32")
    tx = optax.chain(optax.clip_by_global_norm(2.0**-20), plain)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(params, plain.init(params))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # the factor is rounded once


@pytest.mark.bits
def test_partition_and_masked_leave_the_other_leaves_alone():
    params = everything()
    labels = jax.tree.map(lambda _: "frozen", params)
    labels["tall"] = {"kernel": "trained"}
    labels["norm"] = {"scale": "trained"}
    partitioned = optax.partition({"trained": muon(LR), "frozen": optax.set_to_zero()}, labels)
    updates, _ = jax.jit(partitioned.update)(params, partitioned.init(params), params)
    mask = jax.tree.map(lambda label: label == "trained", labels)
    masked = optax.masked(muon(LR), mask)
    only, _ = jax.jit(masked.update)(params, masked.init(params), params)
    for trained, part, one, param in zip(
        *map(jax.tree.leaves, (mask, updates, only, params)), strict=True
    ):
        if trained:
            np.testing.assert_array_equal(part, one)
        else:
            assert not jnp.any(part)
            np.testing.assert_array_equal(one, param)  # optax.masked passes it through


def test_inject_hyperparams_sets_rates_from_outside():
    params = everything()
    tx = optax.inject_hyperparams(muon, static_args=("ns_steps",))(
        learning_rate=LR, weight_decay=0.1, beta=0.9, adam_b2=0.95, consistent_rms=0.2, ns_steps=4
    )
    update = jax.jit(tx.update)
    state = tx.init(params)
    first, _ = update(gradients_at(params), state, params)
    expected_tx = muon(LR, beta=0.9, ns_steps=4)
    expected, _ = jax.jit(expected_tx.update)(
        gradients_at(params), expected_tx.init(params), params
    )
    assert_near(first, expected)
    state.hyperparams["learning_rate"] = jnp.asarray(2 * LR, jnp.float32)
    doubled, after = update(gradients_at(params), state, params)
    assert_near(doubled, jax.tree.map(lambda u: 2 * u, first))
    assert update._cache_size() == 1
    assert abstract(after) == abstract(state)


def test_inject_hyperparams_takes_a_schedule():
    params = matrices()
    tx = optax.inject_hyperparams(muon)(learning_rate=optax.linear_schedule(LR, 0.0, 2))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for rate in (LR, LR / 2):
        updates, state = update(params, state, params)
        assert jnp.any(updates["tall"]["kernel"])
        assert float(state.hyperparams["learning_rate"]) == rate
    updates, _ = update(params, state, params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))


TRAPS = """
import jax, jax.numpy as jnp, optax
from muon_jax import muon
params = {"w": jnp.ones((4, 6))}
for options in OPTIONS:
    try:
        tx = optax.inject_hyperparams(muon)(learning_rate=0.1, **options)
        jax.jit(tx.update)(params, tx.init(params), params)
    except TypeError as error:
        print(error)
    else:
        print("no error")
"""


def test_traps_of_inject_hyperparams_name_their_remedy():
    """It traces every number and calls every function: both are said, with what to write.

    In a process of its own, where no annotation is checked before our own errors.
    """
    remedies = {
        '{"ns_steps": 5}': 'static_args=("ns_coeffs", "ns_steps")',
        '{"ns_coeffs": jnp.asarray((1.5, -0.5, 0.0))}': 'static_args=("ns_coeffs", "ns_steps")',
        '{"ns_dtype": jnp.bfloat16}': 'ns_dtype="bfloat16"',
        '{"mu_dtype": jnp.bfloat16}': 'mu_dtype="bfloat16"',
        '{"max_group_bytes": 4096}': 'static_args=("max_group_bytes",)',
    }
    script = TRAPS.replace("OPTIONS", f"[{', '.join(remedies)}]")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    messages = run.stdout.splitlines()
    for message, remedy in zip(messages, remedies.values(), strict=True):
        assert remedy in message


@pytest.mark.parametrize("options", [{"ns_dtype": "bfloat16"}, {"mu_dtype": "bfloat16"}], ids=str)
def test_inject_hyperparams_with_dtypes_as_strings(options):
    params = matrices()
    tx = optax.inject_hyperparams(muon)(learning_rate=LR, **options)
    plain = muon(LR, **options)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    assert_near(updates, expected)


# --- Containers ----------------------------------------------------------------------------------


class Net(nnx.Module):
    """An embedding, a stack of no layers, a norm and two kernels."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 6, rngs=rngs)])
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return x


def nnx_state():
    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=[])
@dataclasses.dataclass
class CallableModule:
    """A parameter tree that is itself callable, as Equinox's modules are."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight + self.bias


CONTAINERS = {
    "dict": lambda: {"w": array((4, 6)), "bias": array((6,))},
    "list": lambda: [array((4, 6)), array((6, 4)), array((6,))],
    "tuple": lambda: (array((4, 6)), array((6,))),
    "bare matrix": lambda: array((4, 6)),
    "bare vector": lambda: array((6,)),
    "nnx.State": nnx_state,
    "callable module": lambda: CallableModule(array((4, 6)), array((6,))),
    "a list of callable modules": lambda: [CallableModule(array((4, 6)), array((6,)))] * 2,
    "only matrices": lambda: {"w": array((4, 6))},
    "only AdamW": lambda: {"norm": {"scale": array((4,))}, "bias": array((2,))},
    "None among the parameters": lambda: {"w": array((4, 6)), "bias": None},
    "masked nodes": lambda: {"w": array((4, 6)), "x": optax.MaskedNode(), "bias": array((2,))},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_keep_their_type_and_every_leaf_moves(kind):
    params = CONTAINERS[kind]()
    tx = muon(LR)
    after, state = steps(tx, params, count=2)
    assert abstract(after) == abstract(params)
    assert abstract(state) == abstract(tx.init(params))
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert jnp.isfinite(now).all() and jnp.any(before != now)


@pytest.mark.parametrize("kind", ["list", "tuple", "bare matrix", "nnx.State", "callable module"])
def test_a_container_changes_no_number(kind):
    """The leaves move as they do in a dict of the same names and shapes."""
    params = CONTAINERS[kind]()
    leaves = jax.tree.leaves(params)
    named = [
        "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    plain = {}
    for name, leaf in zip(named, leaves, strict=True):
        *parents, last = [part for part in name.split("/") if part != "value"] or ["w"]
        node = plain
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    after, _ = steps(muon(LR), params, count=2)
    expected, _ = steps(muon(LR), plain, count=2)
    norms, expected_norms = (
        sorted(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(tree))
        for tree in (after, expected)
    )
    assert norms == pytest.approx(expected_norms)


@pytest.mark.parametrize("kind", ["bare matrix", "list", "dict", "tuple", "only matrices"])
def test_scale_by_muon_on_containers(kind):
    params = jax.tree.map(lambda x: x if x.ndim == 2 else x[None].repeat(3, 0), CONTAINERS[kind]())
    if kind == "dict":
        params = {"w": params["w"], "v": params["bias"]}
    tx = scale_by_muon()
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert abstract(updates) == abstract(params) == abstract(state.mu)


def test_nnx_optimizer_trains():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, muon(LR), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    tokens = jnp.arange(6)

    @nnx.jit
    def train(model, optimizer):
        def loss(model):
            logits = model(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(train(model, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    after = nnx.state(model, nnx.Param)
    assert abstract(after) == abstract(before)
    assert all(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_linen_train_state_trains():
    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadAttention(num_heads=2)(nn.Dense(4)(x))
            return nn.Dense(3)(nn.LayerNorm()(x))

    x = array((2, 5, 4))
    model = LinenNet()
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=muon(LR))
    state = state.replace(step=jnp.asarray(0))  # Flax starts from a Python integer

    @jax.jit
    def train(state):
        def loss(params):
            return jnp.mean(jnp.square(state.apply_fn({"params": params}, x) - 1))

        value, gradients = jax.value_and_grad(loss)(state.params)
        return value, state.apply_gradients(grads=gradients)

    losses = []
    for _ in range(8):
        value, new_state = train(state)
        assert abstract(new_state.opt_state) == abstract(state.opt_state)
        state = new_state
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert train._cache_size() == 1


# --- Missing gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_an_absent_gradient_keeps_its_state_and_leaves_the_others_alone(absent):
    params = everything()
    tx = muon(LR)
    update = jax.jit(tx.update)
    _, state = steps(tx, params, count=1, update=update)
    gradients = gradients_at(params)
    full, full_after = update(gradients, state, params)
    gradients["tall"] = {"kernel": absent}
    gradients["norm"] = {"scale": absent}
    updates, after = update(gradients, state, params)

    assert updates["tall"]["kernel"] == absent and updates["norm"]["scale"] == absent
    muon_before, muon_after, muon_full = (
        s.inner_states["muon"].inner_state[0].mu for s in (state, after, full_after)
    )
    adam_before, adam_after, adam_full = (
        s.inner_states["adam"].inner_state[0] for s in (state, after, full_after)
    )
    assert_trees_equal(muon_after["tall"], muon_before["tall"])
    for moment in ("mu", "nu"):
        before, now, whole = (getattr(s, moment) for s in (adam_before, adam_after, adam_full))
        assert_trees_equal(now["norm"], before["norm"])
        assert_trees_equal(now["embed"], whole["embed"])
    assert_trees_equal(muon_after["wide"], muon_full["wide"])
    assert_trees_equal(updates["wide"], full["wide"])
    assert_trees_equal(updates["embed"], full["embed"])
    assert abstract(after) == abstract(state)


def test_a_tree_without_any_gradient_changes_nothing_but_the_counts():
    params = everything()
    tx = muon(LR)
    state = tx.init(params)
    updates, after = tx.update(jax.tree.map(lambda _: None, params), state, params)
    assert jax.tree.leaves(updates) == []
    assert abstract(after) == abstract(state)


# --- What the compiled program looks like --------------------------------------------------------


def compiled_update(params, **options):
    tx = scale_by_muon(**options)
    return jax.jit(tx.update).lower(params, tx.init(params)).compile()


def products(compiled):
    """The matrix products of a compiled program, in whatever form the backend prints them."""
    return len(re.findall(r"\bdot\(|= .*custom-call\(.*matmul", compiled.as_text()))


def layers(count):
    return {
        f"layer_{i}": {"up": array((8, 16), i), "down": array((16, 8), i), "mix": array((8, 8), i)}
        for i in range(count)
    }


def test_the_number_of_products_does_not_grow_with_depth():
    shallow, deep = (products(compiled_update(layers(n))) for n in (4, 24))
    assert 0 < shallow == deep


def kernels(compiled):
    """What a program fuses, as far as it differs by more than names: XLA:CPU compiles each once."""
    fused = re.findall(r"^%(?:fused|wrapped)_[\w.-]+ \(.*?^}", compiled.as_text(), re.M | re.S)
    bodies = [re.sub(r", metadata=\{.*?\}", "", text.split("\n", 1)[1]) for text in fused]
    return {re.sub(r"%[\w.-]+", "%", body) for body in bodies}


def test_the_number_of_kernels_does_not_grow_with_depth():
    shallow, deep = (kernels(compiled_update(layers(n))) for n in (12, 24))
    assert 0 < len(shallow) == len(deep)


def test_a_stack_on_several_devices_is_not_gathered_for_the_matrices_beside_it():
    """They are one batch; without `mesh=` XLA divides it among the devices, as the stack is."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    params = {f"mix_{i}": jax.device_put(array((16, 32), i), place()) for i in range(4)}
    params["experts"] = jax.device_put(array((8, 16, 32), 4), place("data"))
    assert "all-gather" not in compiled_update(params).as_text()


@pytest.mark.parametrize("matrices_at_once", [1, 5, 8])
def test_chunks_add_no_products_to_the_program(matrices_at_once):
    """Chunks of one length are one loop; of two, as 16 matrices by fives make them, are two."""
    whole = products(compiled_update(layers(8)))
    size = matrices_at_once * 8 * 16 * 2
    for depth in (8, 40):
        chunked = products(compiled_update(layers(depth), max_group_bytes=size))
        assert 0 < chunked <= (1 if matrices_at_once == 1 else 2) * whole


@pytest.mark.bits
@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("matrices_at_once", [1, 5, 8])
def test_chunks_change_no_bit(matrices_at_once, ns_dtype):
    """Wide, tall and stacked matrices of one shape, which chunks of two lengths cut anywhere.

    In float32 the last bits may differ: of a product and a sum a compiler makes one multiply-add in
    one program and not in the other (jax 0.12, one matrix at a time: 2e-7 of an entry).
    """
    params = {
        "wide": jnp.asarray(hadamard_rows((5, 4, 16))),
        "one": jnp.asarray(hadamard_rows((4, 16), 1)),
        "tall": jnp.asarray(hadamard_rows((7, 4, 16), 2)).mT,
    }
    itemsize = jnp.dtype(ns_dtype).itemsize
    make = functools.partial(
        scale_by_muon, ns_dtype=ns_dtype, weight_dimension_numbers=MuonDimensionNumbers(-2, -1)
    )
    whole, tx = make(), make(max_group_bytes=matrices_at_once * 4 * 16 * itemsize)
    expected, _ = jax.jit(whole.update)(params, whole.init(params))
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    if ns_dtype == "bfloat16":
        assert_trees_equal(updates, expected)
    else:
        for update, other in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            np.testing.assert_allclose(update, other, rtol=1e-6)


def test_chunks_are_differentiable_as_the_whole_is():
    """Chunks lie as bits, which have no derivative: it is given by hand."""
    params = {"w": array((7, 4, 6))}
    weights = array((7, 4, 6), 1)

    def gradients(**options):
        numbers = MuonDimensionNumbers(-2, -1)
        tx = scale_by_muon(weight_dimension_numbers=numbers, **options)
        state = tx.init(params)
        loss = lambda g: jnp.sum(tx.update({"w": g}, state)[0]["w"] * weights)  # noqa: E731
        forward = jax.jvp(loss, (params["w"],), (weights,))[1]
        return jax.jit(jax.grad(loss))(params["w"]), forward

    for actual, expected in zip(gradients(max_group_bytes=2 * 4 * 6 * 2), gradients(), strict=True):
        assert jnp.abs(expected).max() > 0
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_max_group_bytes_bounds_the_temporary_memory():
    """Sixteen leaves of one shape, one at a time instead of all: measured 0.25 of the memory."""
    params = {f"layer_{i}": array((64, 64), i) for i in range(16)}
    whole, chunked = (
        compiled_update(params, max_group_bytes=size).memory_analysis().temp_size_in_bytes
        for size in (None, 64 * 64 * 2)
    )
    assert chunked < 0.4 * whole


@pytest.mark.bits
def test_a_step_does_not_depend_on_the_other_leaves():
    """A matrix moves alike alone, beside others of its shape, and with none of its own."""
    stack = jnp.asarray(hadamard_rows((3, 4, 16)))
    alone, together = {"w": stack[0]}, {"w": stack[0], "v": stack[1].T, "experts": stack}
    tx = muon(LR)
    one, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
    many, _ = jax.jit(tx.update)(together, tx.init(together), together)
    np.testing.assert_array_equal(one["w"], many["w"])
