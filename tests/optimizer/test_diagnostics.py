"""Diagnostics against float64 NumPy, and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muon_jax import (
    FusedBlocks,
    by_path,
    map_matrices,
    orthogonality_error,
    orthogonalize,
    rms_by_optimizer,
    svd_entropy,
    update_rms,
)

RTOL = 1e-5  # measured: 6e-7


def entropy_reference(matrix):
    """H = -1/log n sum p log p with p = s^2 / sum s^2 (Liu et al. 2025, Section 3.4)."""
    energy = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    share = energy / energy.sum()
    share = share[share > 0]
    return -np.sum(share * np.log(share)) / np.log(min(matrix.shape[-2:]))


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_svd_entropy(shape, scale):
    matrix = jax.random.normal(jax.random.key(0), shape) * scale
    expected = entropy_reference(matrix)
    assert 0.5 < expected < 1
    np.testing.assert_allclose(jax.jit(svd_entropy)(matrix), expected, rtol=RTOL)


def test_svd_entropy_at_its_ends(untyped):
    np.testing.assert_allclose(svd_entropy(jnp.eye(6)), 1.0, rtol=RTOL)
    np.testing.assert_allclose(svd_entropy(jnp.ones((6, 6))), 0.0, atol=1e-5)
    assert svd_entropy(jnp.zeros((6, 6))) == 0
    assert svd_entropy(jnp.ones((1, 6))) == 0
    assert svd_entropy(jnp.ones((2, 3, 6, 4), jnp.bfloat16)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"svd_entropy takes matrices.*got shape \(4,\)"):
        svd_entropy(jnp.ones(4))


def test_orthogonality_error(untyped):
    matrix = jax.random.normal(jax.random.key(1), (3, 12, 5))
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    expected = np.sqrt(np.mean((s**2 - 1) ** 2, axis=-1))
    np.testing.assert_allclose(jax.jit(orthogonality_error)(matrix), expected, rtol=RTOL)
    rotation = jnp.eye(4)[:, [2, 0, 3, 1]]
    assert orthogonality_error(rotation) == 0
    assert orthogonality_error(-rotation) == 0
    with pytest.raises(ValueError, match="orthogonality_error takes matrices"):
        orthogonality_error(jnp.ones(4))


def test_orthogonality_error_orders_the_schedules():
    x = jax.random.normal(jax.random.key(2), (64, 256))
    errors = [
        float(orthogonality_error(orthogonalize(x, name, ns_dtype="float32")))
        for name in ("standard", "dion", "deepseek_v4")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3  # measured: 1.0e-3


PARAMS = {
    "embed": jnp.full((4, 3), 2.0),
    "proj": {"kernel": jnp.full((3, 3), 3.0), "bias": jnp.full(3, 5.0)},
    "qkv": jnp.full((3, 9), 1.0),
}
RULES = by_path({"qkv": FusedBlocks((3, 6))})


def test_update_rms_for_each_leaf():
    rms = jax.jit(update_rms)(PARAMS)
    assert jax.tree.map(float, rms) == {
        "embed": 2.0,
        "proj": {"kernel": 3.0, "bias": 5.0},
        "qkv": 1.0,
    }
    assert update_rms(jnp.array([3.0, -4.0])) == pytest.approx(12.5**0.5)
    assert update_rms(jnp.full(4, 3 + 4j)) == 5.0
    assert update_rms(jnp.zeros((0, 3))) == 0
    assert update_rms({"a": None, "b": optax.MaskedNode()}) == {"a": None, "b": optax.MaskedNode()}
    assert update_rms(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


def test_rms_by_optimizer_pools_the_elements_of_each_group():
    rms = jax.jit(lambda tree: rms_by_optimizer(tree, PARAMS, muon_weight_dimension_numbers=RULES))(
        PARAMS
    )
    muon_rms = ((9 * 9.0 + 27 * 1.0) / 36) ** 0.5
    adam_rms = ((12 * 4.0 + 3 * 25.0) / 15) ** 0.5
    np.testing.assert_allclose(rms["muon"], muon_rms, rtol=RTOL)
    np.testing.assert_allclose(rms["adam"], adam_rms, rtol=RTOL)


def test_more_elements_than_an_int32_holds():
    """Moonlight's experts: 4.8e9 in one leaf, 15.3e9 in all."""
    experts = {"gate_proj": jax.ShapeDtypeStruct((26, 64, 2048, 1408), jnp.float32)}
    params = {"layers": {"experts": experts}}
    assert jax.tree.leaves(jax.eval_shape(update_rms, params))[0].shape == ()
    group = jax.eval_shape(lambda tree: rms_by_optimizer(tree, params), params)
    assert group["muon"].dtype == jnp.float32


def test_rms_by_optimizer_leaves_out_absent_leaves():
    updates = {**PARAMS, "qkv": None, "embed": optax.MaskedNode()}
    rms = rms_by_optimizer(updates, PARAMS, muon_weight_dimension_numbers=RULES)
    assert {group: float(value) for group, value in rms.items()} == {"muon": 3.0, "adam": 5.0}
    only_adam = rms_by_optimizer({"bias": jnp.ones(3)}, {"bias": jnp.ones(3)})
    assert only_adam["muon"] == 0


def test_map_matrices_sees_what_muon_sees():
    shapes = map_matrices(jnp.shape, PARAMS, PARAMS, muon_weight_dimension_numbers=RULES)
    assert shapes == {"proj/kernel": [(1, 3, 3)], "qkv": [(1, 3, 3), (1, 3, 6)]}
    entropies = jax.jit(lambda tree: map_matrices(svd_entropy, tree, PARAMS))(PARAMS)
    assert {path: values[0].shape for path, values in entropies.items()} == {
        "proj/kernel": (1,),
        "qkv": (1,),
    }
    frozen = {**PARAMS, "qkv": None}
    assert list(map_matrices(svd_entropy, frozen, PARAMS)) == ["proj/kernel"]
