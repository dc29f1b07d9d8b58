"""Initial weights are the bits of `jax.random.normal`, however they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.moonlight.model import draws

STDDEV = 0.02


def expected(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """JAX's own draws, scaled by NumPy."""
    return np.float32(STDDEV) * np.asarray(jax.random.normal(key, shape, jnp.float32))


@pytest.mark.parametrize("shape", [(), (3, 5), (2, draws.BLOCK // 2), (3, 2 * draws.BLOCK // 5)])
def test_concrete_draws_are_jaxs(shape):
    key = jax.random.fold_in(jax.random.key(7), 3)
    drawn = draws.normal(key, shape, STDDEV)
    assert drawn.dtype == jnp.float32 and drawn.shape == shape
    np.testing.assert_array_equal(np.asarray(drawn), expected(key, shape), strict=True)


def test_a_stack_draws_with_a_key_for_each_layer():
    keys, shape = jax.random.split(jax.random.key(1), 6).reshape(3, 2), (5, 7)

    def stack(keys: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(lambda key: draws.normal(key, shape, STDDEV)), in_axes=1)(keys)

    drawn = np.asarray(stack(keys))
    assert drawn.shape == (2, 3, *shape)
    np.testing.assert_array_equal(drawn[1, 2], expected(keys[2, 1], shape))
    np.testing.assert_array_equal(np.asarray(jax.jit(stack)(keys)), drawn)
    assert jax.eval_shape(stack, keys).shape == drawn.shape


def test_other_generators_draw_as_jax_has_them():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(
        np.asarray(draws.normal(key, (4, 3), STDDEV)), expected(key, (4, 3))
    )
