"""Matrices out of their leaves and back: what variants of Muon are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muon_jax import (
    FusedBlocks,
    MultiHead,
    MuonDimensionNumbers,
    by_path,
    map_matrices,
    put_matrices,
)

SHAPES = {
    "blocks": {
        "attn": {"q_proj": (6, 8), "k_proj": (6, 8), "v_proj": (6, 8), "o_proj": (8, 6)},
        "qkv": (6, 12),
        "mlp": (6, 3, 5),
    },
    "embed": (9, 6),
    "bias": (6,),
}
OPTIONS = {
    "muon_weight_dimension_numbers": by_path(
        {"qkv": FusedBlocks((4, 8)), "mlp": MuonDimensionNumbers(0, 2)}
    ),
    "heads": {"attn": MultiHead(heads=2, head_dim=4)},
}


@pytest.fixture(scope="module", name="tree")
def _tree() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def test_each_part_of_a_leaf_comes_back_to_its_place(tree):
    """Against slices written by hand: a head, a fused block, a layer along axis 1."""
    factors = iter(np.arange(1.0, 30.0, dtype=np.float32))

    def scaled(x):
        return x * jnp.asarray([next(factors) for _ in x])[:, None, None]

    taken = map_matrices(scaled, tree, tree, **OPTIONS)
    put = put_matrices(taken, tree, tree, **OPTIONS)
    # In the order of the leaves: k, o, q, v of two heads each, the layers of mlp, the blocks.
    attention, before = put["blocks"]["attn"], tree["blocks"]["attn"]
    wide = np.repeat(np.float32([1, 2]), 4)[None]
    np.testing.assert_array_equal(attention["k_proj"], before["k_proj"] * wide)
    np.testing.assert_array_equal(attention["o_proj"], before["o_proj"] * (wide.T + 2))
    layers = np.float32([9, 10, 11])[None, :, None]
    np.testing.assert_array_equal(put["blocks"]["mlp"], tree["blocks"]["mlp"] * layers)
    blocks = np.repeat(np.float32([12, 13]), [4, 8])[None]
    np.testing.assert_array_equal(put["blocks"]["qkv"], tree["blocks"]["qkv"] * blocks)
    for name in ("embed", "bias"):
        assert put[name] is tree[name]


def test_the_leafs_dtype_and_absent_leaves_stay(tree):
    sparse = {**tree, "bias": None, "blocks": {**tree["blocks"], "qkv": optax.MaskedNode()}}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), sparse)
    taken = map_matrices(lambda x: x.astype(jnp.float32), half, tree, **OPTIONS)
    put = put_matrices(taken, half, tree, **OPTIONS)
    assert put["bias"] is None and put["blocks"]["qkv"] == optax.MaskedNode()
    for a, b in zip(jax.tree.leaves(put), jax.tree.leaves(half), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)


def test_matrices_that_do_not_fit_raise(tree):
    taken = map_matrices(lambda x: x, tree, tree, **OPTIONS)
    with pytest.raises(ValueError, match=r"blocks/qkv have the shapes \[\(1, 6, 4\), \(1, 6, 8\)"):
        put_matrices({**taken, "blocks/qkv": taken["blocks/qkv"][:1]}, tree, tree, **OPTIONS)
    with pytest.raises(ValueError, match=r"blocks/mlp have the shapes .*; got \[\]"):
        less = {path: x for path, x in taken.items() if path != "blocks/mlp"}
        put_matrices(less, tree, tree, **OPTIONS)
    with pytest.raises(ValueError, match="matrices of 'embed', which is no leaf of Muon's"):
        put_matrices({**taken, "embed": [tree["embed"][None]]}, tree, tree, **OPTIONS)
