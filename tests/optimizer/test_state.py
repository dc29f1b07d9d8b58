"""The state is a fixed point where dtypes mix: nothing recompiles, nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from muon_jax import UpdateNorm, muon, orthogonalize, scale_by_muon


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


def float16_pair():
    """A matrix and a bias in float16, and the same in float32."""
    half = {"kernel": jnp.full((4, 6), 0.5, jnp.float16), "bias": jnp.ones(6, jnp.float16)}
    return half, jax.tree.map(lambda p: p.astype(jnp.float32), half)


@pytest.mark.parametrize(
    ("size", "mu_dtype"), [(1e-4, None), (6e-8, None), (6e4, None), (1e-2, "float16")]
)
def test_float16_adamw_is_float32_adamw_rounded(size, mu_dtype):
    """In float16 the square of 1e-4 is 0 and that of 6e4 infinite: neither is ever formed."""
    half, single = float16_pair()
    gradient = jnp.full(6, size, jnp.float16)
    tx, twin = muon(1.0, mu_dtype=mu_dtype), muon(1.0)
    state, twin_state = tx.init(half), twin.init(single)
    for step in range(3):
        g = gradient / 2**step
        updates, state = tx.update({"kernel": half["kernel"], "bias": g}, state, half)
        expected, twin_state = twin.update(
            {"kernel": single["kernel"], "bias": g.astype(jnp.float32)}, twin_state, single
        )
        assert updates["bias"].dtype == jnp.float16
        # The first moment, the direction, and its sum with the decay are each rounded: 2^-11.
        tolerance = 3 * 2.0**-11
        np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=tolerance)


@pytest.mark.parametrize("mu_dtype", [None, "float16", "bfloat16"])
def test_moments_of_float16_are_float32_unless_told_otherwise(mu_dtype):
    half, _ = float16_pair()
    state = muon(1e-3, mu_dtype=mu_dtype).init(half)
    adam = state.inner_states["adam"].inner_state[0]
    momentum = state.inner_states["muon"].inner_state[0].mu["kernel"]
    assert adam.mu["bias"].dtype == momentum.dtype == jnp.dtype(mu_dtype or "float32")
    assert adam.nu["bias"].dtype == jnp.float32


@pytest.mark.parametrize("params_dtype", ["float16", "float32"])
def test_zero_float16_gradients_give_exact_zeros(params_dtype):
    params = {"bias": jnp.ones(6, params_dtype)}
    tx = muon(1.0, weight_decay=0.0)
    zeros = {"bias": jnp.zeros(6, jnp.float16)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_array_equal(updates["bias"], np.zeros(6))


def test_small_float16_gradients_of_float32_parameters_are_squared_in_float32():
    params = {"bias": jnp.ones(6)}
    tx = muon(1.0, weight_decay=0.0)
    updates, _ = tx.update({"bias": jnp.full(6, 1e-4, jnp.float16)}, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -1.0, rtol=1e-3)  # the eps: 1e-8 beside 1e-4


# --- Not the state, or the place, of these parameters ---------------------------------------------


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"kernel": (4, 8), "bias": (6,)}, r"kernel has shape \(4, 8\), but .* \(4, 6\)"),
        ({"kernel": (4, 6), "bias": (5,)}, r"bias has shape \(5,\), but .* \(6,\)"),
        ({"other": (4, 6), "bias": (6,)}, r"holds nothing for other, shape \(4, 6\)"),
        ({"kernel": (4, 6)}, r"a momentum of bias, shape \(6,\), which is no parameter"),
    ],
)
def test_a_state_of_other_parameters_says_so(params, match):
    tx = muon(1e-3)
    state = tx.init(params_of(jnp.float32))
    params = {name: jnp.ones(shape) for name, shape in params.items()}
    with pytest.raises(ValueError, match=f"state was made for other parameters.*{match}"):
        tx.update(params, state, params)


def test_a_state_of_another_routing_says_so():
    params = params_of(jnp.float32)
    state = muon(1e-3).init(params)
    tx = muon(1e-3, muon_weight_dimension_numbers={"kernel": None, "bias": None})
    with pytest.raises(ValueError, match=r"kernel, shape .*'adam', but .* kept by 'muon'"):
        tx.update(params, state, params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("make", [muon, lambda _, **keywords: scale_by_muon(**keywords)])
def test_parameters_committed_to_one_device_raise_early(make, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    tx = make(1e-3, mesh=mesh)
    free = {"kernel": jnp.ones((8, 16))}
    bound = jax.device_put(free, jax.devices()[1])
    state = tx.init(free)
    remedy = r"kernel, shape \(8, 16\), is committed to .*jax.device_put\(params, "
    with pytest.raises(ValueError, match=remedy):
        tx.init(bound)
    with pytest.raises(ValueError, match=remedy):
        tx.update(bound, state, bound)
    one = jax.make_mesh((1,), ("data",), axis_types=(axis_type,), devices=jax.devices()[1:2])
    make(1e-3, mesh=one).init(bound)
    with pytest.raises(ValueError, match=remedy):
        make(1e-3, mesh=one).init(jax.device_put(free, jax.devices()[0]))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_inside_a_shard_map_is_refused_in_our_words(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    params = jax.device_put({"kernel": jnp.ones((8, 16))}, NamedSharding(mesh, P()))

    def inside(params, tx):
        return tx.update(params, tx.init(params), params)[0]

    def mapped(tx):
        body = lambda p: inside(p, tx)  # noqa: E731
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P()))(params)

    with pytest.raises(ValueError, match=r"inside a shard_map.*or leave mesh= out"):
        mapped(muon(1e-3, mesh=mesh))
    # The remedy is one: each device does the whole update.
    expected = jax.jit(lambda p: inside(p, muon(1e-3)))(jax.tree.map(np.asarray, params))
    np.testing.assert_allclose(mapped(muon(1e-3))["kernel"], expected["kernel"], rtol=1e-5)


def test_update_norm_of_a_complex_matrix_measures_both_parts():
    """Of ``1 + 3j`` the real part alone is a third of what there is."""
    gradient = {"kernel": params_of(jnp.float32)["kernel"] * (1 + 3j)}
    tx = scale_by_muon(update_scale=UpdateNorm(0.5))
    updates, _ = tx.update(gradient, tx.init(gradient))
    rms = jnp.sqrt(jnp.mean(jnp.abs(updates["kernel"]) ** 2))
    np.testing.assert_allclose(rms, 0.5, rtol=1e-5)


def test_strict_dtype_promotion_works():
    params = {"matrix": jnp.ones((4, 8))}
    with jax.numpy_dtype_promotion("strict"):
        tx = scale_by_muon(adaptive=True)
        tx.update(params, tx.init(params))
        tx, params = muon(1e-3), params | {"bias": jnp.ones(3)}
        updates, _ = tx.update(params, tx.init(params), params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
def test_the_derivative_of_the_update_at_a_zero_matrix_is_zero(ns_dtype):
    zeros = jnp.zeros((3, 4, 6))
    loss = lambda x: jnp.sum(orthogonalize(x, ns_dtype=ns_dtype) * (x + 1))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(zeros), zeros)
    tx = scale_by_muon(ns_dtype=ns_dtype)
    params = {"kernel": zeros[0]}
    state = tx.init(params)
    update = lambda g: jnp.sum(tx.update({"kernel": g}, state)[0]["kernel"])  # noqa: E731
    np.testing.assert_array_equal(jax.grad(update)(zeros[0]), zeros[0])
