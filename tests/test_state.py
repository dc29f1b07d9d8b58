"""The state is a fixed point where dtypes mix: nothing recompiles, nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from muon_jax import muon, orthogonalize, scale_by_muon


def params_of(dtype):
    key = jax.random.key(0)
    return {
        "kernel": jax.random.normal(key, (4, 6)).astype(dtype),
        "bias": jnp.ones(6, dtype),
    }


def dtypes(tree):
    return jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.inject_hyperparams(muon)(learning_rate=1e-3),
        lambda: optax.inject_hyperparams(muon)(learning_rate=1e-3, consistent_rms=0.3),
        lambda: optax.inject_hyperparams(muon)(learning_rate=optax.linear_schedule(1e-3, 0, 9)),
    ],
)
def test_injected_hyperparameters_do_not_recompile(make, dtype):
    tx = make()
    params = params_of(dtype)
    state = jax.jit(tx.init)(params)
    step = jax.jit(tx.update)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


@pytest.mark.parametrize("params_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("gradient_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_the_state_keeps_its_dtypes(params_dtype, gradient_dtype, mu_dtype):
    tx = muon(1e-3, mu_dtype=mu_dtype)
    params, gradients = params_of(params_dtype), params_of(gradient_dtype)
    state = tx.init(params)
    _, after = tx.update(gradients, state, params)
    assert dtypes(after) == dtypes(state)


@pytest.mark.parametrize("mu_dtype", [None, "float32", "bfloat16"])
def test_complex_parameters_keep_complex_moments(mu_dtype):
    tx = muon(1e-3, mu_dtype=mu_dtype, weight_decay=0.0)
    params = params_of(jnp.complex64)
    gradients = jax.tree.map(lambda p: p * (1 + 1j), params)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(gradients, state, params)
    # The gradient's phase is 45 degrees everywhere, and an update opposes it.
    np.testing.assert_allclose(np.angle(-updates["bias"]), np.pi / 4, atol=1e-3)
    polar = orthogonalize(gradients["kernel"])
    np.testing.assert_allclose(
        updates["kernel"] / jnp.abs(updates["kernel"]), -polar / jnp.abs(polar), atol=1e-3
    )


def test_float16_momentum_does_not_overflow():
    params = {"kernel": jnp.ones((4, 4), jnp.float16)}
    gradients = {"kernel": (8000 * jax.random.normal(jax.random.key(0), (4, 4))).astype("float16")}
    tx = scale_by_muon()
    state = tx.init(params)
    for _ in range(40):
        updates, state = tx.update(gradients, state)
    assert jnp.isfinite(updates["kernel"]).all()
    assert jnp.abs(state.mu["kernel"]).max() > jnp.finfo(jnp.float16).max


def test_update_scale_and_injection_go_together():
    tx = optax.inject_hyperparams(muon, static_args="update_scale")(
        learning_rate=1e-3, update_scale=lambda fan_in, fan_out: 1.0
    )
    assert "consistent_rms" not in tx.init(params_of(jnp.float32)).hyperparams


def test_float64_beyond_float32_is_finite():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 6), jnp.float64)
        for ns_dtype in ("bfloat16", "float32", "float64"):
            for scale in (1e-40, 1e40, 1e300):
                assert jnp.isfinite(orthogonalize(x * scale, ns_dtype=ns_dtype)).all()
                assert jnp.isfinite(orthogonalize(x * (scale + 0j), ns_dtype=ns_dtype)).all()
        exact = orthogonalize(x, "deepseek_v4", ns_dtype="float64")
        assert exact.dtype == jnp.float64
        singular_values = jnp.linalg.svd(exact, compute_uv=False)
        assert jnp.abs(singular_values - 1).max() < 1e-3  # measured: 2e-4
        huge = orthogonalize(x * 1e300, "deepseek_v4", ns_dtype="float64")
        np.testing.assert_allclose(huge, exact, rtol=1e-12)
