"""Products of a matrix by itself, of which a part is mirrored: bits, FLOPs, derivatives."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from muon_jax import _processor
from muon_jax._arithmetic import bfloat16_product, engines, native_bfloat16, to_bfloat16
from muon_jax._newton_schulz import ALL_ROWS, iterate, step
from muon_jax._polynomials import resolve_schedule
from muon_jax._symmetric import left_out, mirrored, panels

pytestmark = pytest.mark.skipif(
    not _processor.product_is_right(), reason="this jaxlib has no bfloat16 product on CPU"
)

# Panels of whole tiles and others, square and wide, alone and in a batch.
SHAPES = [(384, 1024), (640, 640), (801, 1100), (1056, 1024), (2, 544, 768)]


def gaussian(shape, dtype="bfloat16"):
    x = jax.random.normal(jax.random.key(0), shape) / shape[-1] ** 0.5
    return x.astype(dtype)


def polynomial(sums, gram):
    return to_bfloat16(-4.775 * gram.astype(jnp.float32) + 2.0315 * sums)


@pytest.mark.bits
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_the_whole_product(shape):
    assert panels(*shape[-2:]) > 1
    x = gaussian(shape)
    gram = jax.jit(lambda x: to_bfloat16(bfloat16_product(x, x)))(x)
    half = jax.jit(lambda x: mirrored(x, bfloat16_product, to_bfloat16, []))(x)
    np.testing.assert_array_equal(half, gram)
    whole = jax.jit(lambda x, gram: polynomial(bfloat16_product(x, x), gram))(x, gram)
    half = jax.jit(lambda x, gram: mirrored(x, bfloat16_product, polynomial, [gram]))(x, gram)
    np.testing.assert_array_equal(half, whole)


@pytest.mark.bits
@pytest.mark.parametrize("preconditioning", ["frobenius", "aol", "schatten"])
@pytest.mark.parametrize("shape", [(768, 768), (544, 2048)], ids=["one by one", "two at once"])
def test_the_iteration_has_the_bits_that_it_has_with_whole_products(shape, preconditioning):
    assert left_out(*shape) > 0
    half, whole = (
        jax.jit(
            functools.partial(
                iterate,
                resolve_schedule("standard"),
                preconditioning,
                ALL_ROWS,
                native_bfloat16()._replace(mirrors=mirrors),
            )
        )(gaussian(shape))
        for mirrors in (True, False)
    )
    np.testing.assert_array_equal(half, whole)


def multiplied(function, *args):
    """FLOPs of the matrix products that a function traces."""

    def of(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracting, _), _ = eqn.params["dimension_numbers"]
                length = eqn.invars[0].aval.shape[contracting[0]]
                total += 2 * length * eqn.outvars[0].aval.size
            total += sum(map(of, jax.extend.core.jaxprs_in_params(eqn.params)))
        return total

    return of(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_out_is_counted(shape):
    x = gaussian(shape)
    whole = multiplied(lambda x: bfloat16_product(x, x), x)
    half = multiplied(lambda x: mirrored(x, bfloat16_product, to_bfloat16, []), x)
    assert half / whole == pytest.approx(1 - left_out(*shape[-2:]))


def test_panels_grow_with_the_rows_where_columns_are_many():
    assert [panels(rows, 1024) for rows in (64, 383, 384, 512, 768, 4096)] == [1, 1, 3, 4, 4, 4]
    assert panels(640, 639) == 1
    assert left_out(640, 639) == 0
    assert left_out(4096, 4096) == 3 / 8


def test_the_derivatives_are_those_of_whole_products():
    """Of a step, forward and backward, in a random direction; in float32 nothing is mirrored."""
    engine = native_bfloat16()
    exact = engines(jnp.dtype(jnp.float32))["default"]
    keys = jax.random.split(jax.random.key(1), 3)
    x, direction, cotangent = (jax.random.normal(key, (640, 640)) / 40 for key in keys)

    def derivatives(engine, dtype):
        function = functools.partial(step, abc=(3.4445, -4.775, 2.0315), arithmetic=engine)

        def both(x, direction, cotangent):
            _, forward = jax.jvp(function, (x,), (direction,))
            return forward, *jax.vjp(function, x)[1](cotangent)

        return jax.jit(both)(*(y.astype(dtype) for y in (x, direction, cotangent)))

    for half, whole, expected in zip(
        derivatives(engine, jnp.bfloat16),
        derivatives(engine._replace(mirrors=False), jnp.bfloat16),
        derivatives(exact, jnp.float32),
        strict=True,
    ):
        errors = [float(distance(y, expected)) for y in (half, whole)]
        assert errors[0] < 1.5 * errors[1] < 0.03


def distance(a, b):
    a, b = (y.astype(jnp.float32) for y in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


@pytest.mark.parametrize("platform", ["tpu", "default"])
def test_accelerators_multiply_the_whole(platform):
    """Nothing was measured on one."""
    assert not engines(jnp.dtype(jnp.bfloat16))[platform].mirrors
