"""Initial weights: `jax.random.normal`'s bits, from one small program for all shapes.

`jax.random.normal` is compiled anew for every shape, and a model has dozens: on CPU that takes as
long as half of the compilation of its training step. But the n-th number that it draws depends on
the key and on n alone (`jax_threefry_partitionable`, JAX's default). So where arrays are concrete,
blocks of consecutive numbers come from one compiled program, and NumPy cuts and scales them.

`normal` is a primitive of JAX's, because a model's constructor is run in several ways: eagerly, and
then it takes this path, under `vmap` for a stack of layers as well; in `jit`, on a mesh, where it
is `jax.random.normal` as it stands; and for its shapes alone.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.random import threefry_2x32
from jax.interpreters import batching, mlir

# Numbers of a call: few calls for a large model, and little that is drawn in vain for a small one.
BLOCK = 1 << 16


def normal(key: jax.Array, shape: tuple[int, ...], stddev: float) -> jax.Array:
    """Draws from N(0, stddev^2): the same bits eagerly, in jit and on any mesh.

    Args:
        key: A key of `jax.random`.
        shape: The shape of the result.
        stddev: The standard deviation.

    Returns:
        `stddev * jax.random.normal(key, shape)`, float32.
    """
    by_place: bool = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    counted = by_place and jax.random.key_impl(key) == "threefry2x32"
    if not counted or math.prod(shape) > 1 << 32:
        return _scaled_normal(key, shape, stddev)
    return _normal_p.bind(jax.random.key_data(key), shape=tuple(shape), stddev=float(stddev))


def _scaled_normal(key: jax.Array, shape: tuple[int, ...], stddev: float) -> jax.Array:
    drawn = jax.random.normal(key, shape, jnp.float32)
    # In jit, XLA would fold stddev into normal's own last factor, which rounds otherwise.
    return stddev * jax.lax.optimization_barrier(drawn)


@jax.jit
def _block(key: Any, start: Any) -> jax.Array:
    """The numbers `start` to `start + BLOCK` of a key's, float32.

    Args:
        key: The key's data, uint32 `[2]`.
        start: The first number's place, a uint32.
    """
    # A place has two words of 32 bits; the higher one is 0.
    places = start + jnp.arange(BLOCK, dtype=jnp.uint32)
    counts = jnp.concatenate([jnp.zeros(BLOCK, jnp.uint32), places])
    first, second = jnp.split(threefry_2x32(key, counts), 2)
    # Of 32 bits, 23 become a fraction in [0, 1), as `jax.random.uniform` has it.
    one = np.float32(1).view(np.uint32)
    fraction = jax.lax.bitcast_convert_type(((first ^ second) >> 9) | one, jnp.float32) - 1
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(least, fraction * (np.float32(1) - least) + least)
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)


def _concrete(key: jax.Array, *, shape: tuple[int, ...], stddev: float) -> jax.Array:
    """The primitive on arrays that are there; each row of `key`, `[..., 2]`, draws `shape`."""
    rows = np.asarray(key).reshape(-1, 2)
    size, stack = math.prod(shape), key.shape[:-1]
    # All calls are on their way before the first is waited for.
    blocks = [[_block(row, np.uint32(i)) for i in range(0, size, BLOCK)] for row in rows]
    drawn = np.empty((len(rows), size), np.float32)
    for row, parts in zip(drawn, blocks, strict=True):
        for i, part in enumerate(parts):
            row[i * BLOCK : (i + 1) * BLOCK] = np.asarray(part)[: size - i * BLOCK]
    drawn *= np.float32(stddev)
    return jnp.asarray(drawn.reshape((*stack, *shape)))


def _traced(key: jax.Array, *, shape: tuple[int, ...], stddev: float) -> jax.Array:
    """The primitive in a program."""

    def draw(data: jax.Array) -> jax.Array:
        return _scaled_normal(jax.random.wrap_key_data(data), shape, stddev)

    for _ in key.shape[:-1]:
        draw = jax.vmap(draw)
    return draw(key)


def _batched(args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    """The primitive under `vmap`: keys in the place of a key."""
    (key,), (axis,) = args, axes
    return _normal_p.bind(jnp.moveaxis(key, axis, 0), **params), 0


def _shape(key: Any, *, shape: tuple[int, ...], stddev: float) -> Any:
    return ShapedArray((*key.shape[:-1], *shape), jnp.float32)


_normal_p = Primitive("moonlight_normal")
_normal_p.def_impl(_concrete)
_normal_p.def_abstract_eval(_shape)
batching.primitive_batchers[_normal_p] = _batched
mlir.register_lowering(_normal_p, mlir.lower_fun(_traced, multiple_results=False))
