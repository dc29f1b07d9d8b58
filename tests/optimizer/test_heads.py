"""Declared heads: every structure against a loop over heads, in float64; layouts; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from muon_jax import (
    FusedBlocks,
    GroupedQuery,
    MultiHead,
    MultiHeadLatent,
    MuonDimensionNumbers,
    by_path,
    map_matrices,
    muon,
    rms_by_optimizer,
    routing_report,
    scale_by_muon,
    sharding_report,
    split_heads,
)
from muon_jax._matrices import SplitAxis, leaf_views
from muon_jax._mesh.layout import zero1_layout
from tests.checkers import assert_close
from tests.checkers import gaussian as normal
from tests.reference import QUINTIC, newton_schulz

D, H, KV, W = 16, 6, 2, 4
# Measured: 4e-7 in float32.
TOLERANCE = 1e-5

# The structure, heads per group, and for each projection what a matrix is wide, with its side.
STRUCTURES = {
    "multi-head": (
        MultiHead(heads=H, head_dim=W),
        1,
        {"q_proj": (H, W, 1), "k_proj": (H, W, 1), "v_proj": (H, W, 1), "o_proj": (H, W, 0)},
    ),
    "grouped-query": (
        GroupedQuery(heads=H, kv_heads=KV, head_dim=W),
        1,
        {"q_proj": (H, W, 1), "k_proj": (KV, W, 1), "v_proj": (KV, W, 1), "o_proj": (H, W, 0)},
    ),
    "groups of two": (
        GroupedQuery(heads=H, kv_heads=KV, head_dim=W),
        2,
        {
            "q_proj": (3, 2 * W, 1),
            "k_proj": (KV, W, 1),
            "v_proj": (KV, W, 1),
            "o_proj": (3, 2 * W, 0),
        },
    ),
    "groups of six, with two key heads": (
        GroupedQuery(heads=H, kv_heads=KV, head_dim=W),
        6,
        {
            "q_proj": (1, 6 * W, 1),
            "k_proj": (1, 2 * W, 1),
            "v_proj": (1, 2 * W, 1),
            "o_proj": (1, 6 * W, 0),
        },
    ),
    "latent": (
        MultiHeadLatent(heads=H, nope_dim=3, rope_dim=2, v_dim=W),
        1,
        {"q_proj": (H, 5, 1), "kv_b_proj": (H, 3 + W, 1), "o_proj": (H, W, 0)},
    ),
}


def gaussian(shape, seed=0):
    return jnp.asarray(normal(shape, seed))


def kernel(parts, width, side, stack=(), seed=0):
    shape = (D, parts * width) if side else (parts * width, D)
    return gaussian((*stack, *shape), seed)


def by_loop(matrix, parts, side):
    """The update of `[d, parts * width]` or its mirror, one part after the other."""
    done = [
        newton_schulz(part, (QUINTIC,) * 5) * 0.2 * np.sqrt(max(part.shape))
        for part in np.split(np.asarray(matrix, np.float64), parts, axis=side)
    ]
    return np.concatenate(done, axis=side)


def updates_of(params, heads, numbers=None):
    """The first update without momentum: of the gradient itself."""
    tx = scale_by_muon(beta=0.0, ns_dtype="float32", heads=heads, weight_dimension_numbers=numbers)
    updates, state = tx.update(params, tx.init(params))
    assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, params)
    return updates


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_each_head_is_orthogonalized_by_itself(name, stack):
    structure, per_group, expected = STRUCTURES[name]
    attention = {
        projection: {"kernel": kernel(*held, stack=stack, seed=seed)}
        for seed, (projection, held) in enumerate(expected.items())
    }
    params = {"layers": {"self_attn": attention, "mlp": {"kernel": gaussian((*stack, D, 12), 9)}}}
    updates = updates_of(params, split_heads({"self_attn": structure}, per_group))["layers"]
    for projection, (parts, _, side) in expected.items():
        actual = updates["self_attn"][projection]["kernel"]
        given = attention[projection]["kernel"]
        for layer in np.ndindex(stack):
            assert_close(actual[layer], by_loop(given[layer], parts, side), TOLERANCE, projection)
    # Leaves outside are as ever.
    for layer in np.ndindex(stack):
        mlp = params["layers"]["mlp"]["kernel"][layer]
        assert_close(updates["mlp"]["kernel"][layer], by_loop(mlp, 1, 1), TOLERANCE)


def attention_of(axes, per_group=1, d=D):
    """Multi-head attention in one of three spellings of its axes."""
    names = ("q_proj", "k_proj", "v_proj")
    shapes = {
        "two": ((d, H * W), (H * W, d)),
        "three": ((d, H, W), (H, W, d)),
        "out, in": ((H * W, d), (d, H * W)),
    }
    inputs, output = shapes[axes]
    leaf = "weight" if axes == "out, in" else "kernel"
    tree = {name: {leaf: gaussian(inputs, i)} for i, name in enumerate(names)}
    return {"attn": {**tree, "o_proj": {leaf: gaussian(output, 3)}}}


HEADS = {"attn": MultiHead(heads=H, head_dim=W)}


@pytest.mark.bits
@pytest.mark.parametrize("per_group", [1, 3, 6])
def test_kernels_of_three_axes_follow_the_declaration(per_group):
    params = attention_of("three")
    flat = {
        "attn": {
            name: {"kernel": x["kernel"].reshape((-1, D) if name == "o_proj" else (D, -1))}
            for name, x in params["attn"].items()
        }
    }
    heads = split_heads(HEADS, per_group)
    three, two = (
        jax.tree.leaves(map_matrices(lambda x: x, tree, tree, heads=heads))
        for tree in (params, flat)
    )
    for a, b in zip(three, two, strict=True):
        np.testing.assert_array_equal(a, b)
    updates, expected = updates_of(params, heads), updates_of(flat, heads)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert a.size and np.array_equal(np.asarray(a).ravel(), np.asarray(b).ravel())


@pytest.mark.bits
@pytest.mark.parametrize("per_group", [1, 3])
def test_heads_declared_as_a_stack_already_are_grouped_all_the_same(per_group):
    params, heads = attention_of("three"), split_heads(HEADS, per_group)
    numbers = by_path({"o_proj": MuonDimensionNumbers(1, 2), "attn": MuonDimensionNumbers(0, 2)})
    for a, b in zip(
        jax.tree.leaves(updates_of(params, heads, numbers)),
        jax.tree.leaves(updates_of(params, heads)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_out_in_weights_are_split_along_the_axis_of_their_heads():
    """Square, so that the wrong axis would fit too."""
    params = attention_of("out, in", d=H * W)
    numbers = by_path({"weight": MuonDimensionNumbers(-1, -2)})
    updates = updates_of(params, HEADS, numbers)["attn"]
    for name, leaf in params["attn"].items():
        side = 1 if name == "o_proj" else 0
        assert_close(updates[name]["weight"], by_loop(leaf["weight"], H, side), TOLERANCE, name)
    with pytest.raises(ValueError, match=r"attn/q_proj/weight.*or \[out, in\].*by_path"):
        muon(1e-3, heads=HEADS).init(params)


def test_flat_keys_and_several_structures():
    params = {
        "layers.0.attn.q_proj.w": gaussian((D, H * W)),
        "layers.0.attn.k_proj.w": gaussian((D, KV * W)),
        "layers.1.attn.q_proj.w": gaussian((D, H * W)),
        "layers.1.attn.k_proj.w": gaussian((D, H * W)),
    }
    heads = {
        "layers/0": GroupedQuery(H, KV, W, value=None, output=None),
        "attn": MultiHead(H, W, value=None, output=None),
    }
    rows = {row.path: row.matrices for row in routing_report(params, heads=heads).rows}
    assert rows["layers.0.attn.k_proj.w"] == ((KV, D, W),)
    assert rows["layers.1.attn.k_proj.w"] == ((H, D, W),)


def test_the_report_names_heads_and_groups():
    printed = str(routing_report(attention_of("two"), heads=HEADS))
    assert f"linear kernel, {H} heads [{D}, {W}]" in printed
    printed = str(routing_report(attention_of("three"), heads=split_heads(HEADS, 3)))
    assert f"[d, heads, head_dim], 2 groups of 3 heads [{D}, {3 * W}]" in printed
    assert "joint" not in printed


def test_the_whole_optimizer_and_diagnostics_take_it():
    params = {**attention_of("two"), "norm": {"scale": jnp.ones(D)}}
    tx = muon(1.0, weight_decay=0.0, beta=0.0, ns_dtype="float32", heads=HEADS)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    given = params["attn"]["q_proj"]["kernel"]
    assert_close(-updates["attn"]["q_proj"]["kernel"], by_loop(given, H, 1), TOLERANCE)
    assert rms_by_optimizer(updates, params, heads=HEADS).keys() == {"muon", "adam"}
    injected = optax.inject_hyperparams(muon)(learning_rate=1e-3, heads=HEADS)
    injected.update(params, injected.init(params), params)


def test_where_none_is_declared_all_heads_are_joint():
    """As `roles.heads()` says of a program without attention."""
    params = {"q_proj": jnp.ones((4, 8))}
    assert str(routing_report(params, heads={})) == str(routing_report(params))


def test_masked_projections_are_left_to_their_optimizer():
    params = attention_of("two")
    labels = {"attn": {name: "muon" if name == "v_proj" else "none" for name in params["attn"]}}
    tx = optax.partition(
        {
            "muon": scale_by_muon(beta=0.0, ns_dtype="float32", heads=HEADS),
            "none": optax.identity(),
        },
        labels,
    )
    updates, _ = tx.update(params, tx.init(params))
    given = params["attn"]["v_proj"]["kernel"]
    assert_close(updates["attn"]["v_proj"]["kernel"], by_loop(given, H, 1), TOLERANCE)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, r"mapping from patterns.*got 3", lambda: split_heads(3)),  # type: ignore
        (TypeError, r"mapping from patterns", lambda: split_heads({})),
        (TypeError, r"'a' maps to 4; use MultiHead", lambda: muon(1e-3, heads={"a": 4})),  # type: ignore
        (ValueError, r"no regular expression", lambda: split_heads({"(": MultiHead(2, 2)})),
        (ValueError, r"positive whole number; got 0", lambda: split_heads(HEADS, 0)),
        (ValueError, r"groups of 4 do not divide the 6 heads", lambda: split_heads(HEADS, 4)),
        (
            ValueError,
            r"4 of 12 query heads share 1.33333 of 4 key heads",
            lambda: split_heads({"a": GroupedQuery(12, 4, 2)}, 4),
        ),
        (TypeError, r"MultiHead.value must be the name", lambda: MultiHead(2, 2, value="")),
        (ValueError, r"key and output are both 'x'", lambda: MultiHead(2, 2, key="x", output="x")),
    ],
)
def test_declarations_that_cannot_be_meant_raise(untyped, error, match, make):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("match", "heads", "numbers"),
    [
        (r"heads: the pattern 'mlp' finds no module", {"mlp": MultiHead(H, W)}, None),
        (
            r"attn has no projection 'out'.*Tell MultiHead",
            {"": MultiHead(H, W, output="out")},
            None,
        ),
        (
            r"attn/q_proj/kernel, shape \(16, 24\): its output axes \(1,\) have the lengths "
            r"\(24,\); expected 20, or 5 and 4",
            {"": MultiHead(5, W)},
            None,
        ),
        (
            r"other side would hold them",
            HEADS,
            by_path({"attn": MuonDimensionNumbers(1, 0)}),
        ),
        (r"q_proj/kernel.*belongs to AdamW \(declared\)", HEADS, by_path({"q_proj": None})),
        (r"k_proj/kernel.*FusedBlocks", HEADS, by_path({"k_proj": FusedBlocks((12, 12))})),
    ],
)
def test_leaves_that_do_not_fit_raise(match, heads, numbers):
    tx = muon(1e-3, heads=heads, muon_weight_dimension_numbers=numbers)
    with pytest.raises(ValueError, match=match):
        tx.init(attention_of("two"))


def test_adapters_beside_a_kernel_raise():
    params = attention_of("two")
    params["attn"]["v_proj"]["lora_a"] = gaussian((D, 2))
    with pytest.raises(ValueError, match=r"attn/v_proj must be a kernel.*lora_a.*Merge adapters"):
        muon(1e-3, heads=HEADS).init(params)


# --- On a mesh ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "parts", "seen", "gathered"),
    [
        ((("a",), ()), (("a", "d"), (), ()), None, ()),  # whole heads, and whole ones for the state
        ((("a", "b", "c"), ()), (("a", "b"), ("c",), ("d",)), None, ()),  # cut alike
        ((("e",), ()), ((), (), ("d",)), None, ("e",)),  # 8 devices for 4 heads
    ],
    ids=["whole", "cut", "gathered"],
)
def test_where_heads_lie(param, parts, seen, gathered):
    sizes = {"a": 2, "b": 2, "c": 2, "d": 2, "e": 8}
    numbers = MuonDimensionNumbers(0, 1)
    views = leaf_views((4 * 8, 16), SplitAxis(0, 4, numbers), "o")
    layout = zero1_layout((4 * 8, 16), param, ("d",), sizes, views)
    assert layout.split is not None
    assert layout.split.state == parts
    assert layout.split.gathered == gathered
    assert layout.state[0][: len(param[0])] == param[0]


def test_the_state_cuts_no_heads():
    """Ten heads over four devices: no fifth of what each has is whole, and "d" takes other axes."""
    views = leaf_views((80, 16), SplitAxis(0, 10, MuonDimensionNumbers(0, 1)), "o")
    layout = zero1_layout((80, 16), (("t",), ()), ("d",), {"t": 4, "d": 2}, views)
    assert layout.state == (("t",), ("d",))


def test_whole_heads_stay_where_they_are_and_cut_ones_travel():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, specs = {}, {}
    for name, count in (("whole", 8), ("cut", 2)):
        heads[name] = MultiHead(count, 16, value=None, output=None)
        specs[name] = {key: {"kernel": P(None, "tensor")} for key in ("q_proj", "k_proj")}
    rows = {}
    for name, structure in heads.items():
        shape = jax.ShapeDtypeStruct((64, structure.heads * 16), jnp.float32)
        params = {name: {key: {"kernel": shape} for key in ("q_proj", "k_proj")}}
        report = sharding_report(
            params, mesh=mesh, param_specs={name: specs[name]}, heads={name: structure}
        )
        (rows[name],) = report.rows
        assert {leaf.state for leaf in report.leaves} == {
            P(None, ("tensor", "data")) if name == "whole" else P("data", "tensor")
        }
    assert rows["whole"].route == "local" and rows["whole"].bytes_in == 0
    assert (rows["whole"].shape, rows["whole"].matrices) == ((16, 64), 16)
    # Two heads over four devices: three quarters of half a leaf are gathered for both leaves, and
    # the pieces of four small matrices then go to everyone along "data".
    assert rows["cut"].route == "replicated"
    assert rows["cut"].bytes_in == 2 * (32 * 32 * 2) * 3 / 4 + 4 * (64 * 16 * 2) / 2
