"""How the products of Newton-Schulz are multiplied and rounded: two engines, one arithmetic.

What the precision rests on: in bfloat16 every product is accumulated in float32, its sum with
``a X`` or ``b A`` is formed in float32, and the result is rounded once. Written with bfloat16
sums instead, five steps drift 4-7% away from float32; rounded once, 1.2-1.5%.

Accelerators multiply bfloat16 operands in one batched product. XLA:CPU has no fast product of that
kind (some fail at run time), so there the bfloat16-rounded values are held in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Arithmetic(NamedTuple):
    """How one engine multiplies and rounds.

    Attributes:
      wide: the dtype in which products are accumulated, sums formed and norms taken.
      store: rounds a sum to what the next product reads.
      product: multiplies two stored matrices; the result is wide.
      unroll: whether the program repeats the step, or holds it once, in a loop.
    """

    wide: Any
    store: Callable[[jax.Array], jax.Array]
    product: Callable[..., jax.Array]
    unroll: bool

    def widen(self, x: jax.Array) -> jax.Array:
        """A stored matrix, as sums take it."""
        return x.astype(self.wide)


def arithmetics(dtype: jnp.dtype) -> tuple[Arithmetic, Arithmetic]:
    """The engines of XLA:CPU and of accelerators, for matrices that lie in `dtype`."""
    if dtype != jnp.bfloat16:
        exact = Arithmetic(dtype, lambda x: x, full_precision_product, unroll=True)
        return exact._replace(unroll=False), exact
    return (
        Arithmetic(jnp.float32, _round_to_bfloat16, full_precision_product, unroll=False),
        Arithmetic(jnp.float32, to_bfloat16, bfloat16_product, unroll=True),
    )


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    # reduce_precision, since XLA may drop a pair of casts as excess precision.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def to_bfloat16(x: jax.Array) -> jax.Array:
    """Round to bfloat16."""
    return x.astype(jnp.bfloat16)


def full_precision_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply without rounding the factors: a GPU or TPU would take fewer bits of float32."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def bfloat16_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply bfloat16 matrices; the sums are float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def adjoint(x: jax.Array) -> jax.Array:
    """``X^H``: the transpose, conjugated where it is complex."""
    return x.mT.conj() if jnp.iscomplexobj(x) else x.mT
