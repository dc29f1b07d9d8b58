"""Gram Newton-Schulz: several steps on ``R = X X^T`` alone, then one product with ``X``.

A step multiplies X from the left by ``P = a I + b R + c R^2``, all of whose factors commute:

    R = X X^T;   for each step:  W = b R + c R^2,  Q <- Q (a I + W),  R <- (a I + W) R (a I + W)
    X <- Q X

For k steps these are ``4 k - 3`` products of m x m matrices (k fewer where each c is 0) and two
with the n columns, where the plain iteration has k and 2 k: cheaper where ``n > 1.5 m``.

What goes wrong: R's small eigenvalues lie below the rounding of its large ones. One that rounding
makes negative is multiplied by about ``a^2`` in each step and never saturates. A restart computes R
anew from X, where no eigenvalue can be negative but for one rounding.
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muon_jax._arithmetic import Arithmetic, adjoint, full_precision_product
from muon_jax._polynomials import Schedule


def segments(schedule: Schedule, restarts: tuple[int, ...]) -> Iterator[Schedule]:
    """The steps between restarts; a restart at k comes after the k-th step."""
    edges = (0, *restarts, len(schedule))
    for start, stop in itertools.pairwise(edges):
        yield schedule[start:stop]


def gram_newton_schulz(
    x: Float[Array, "*batch rows cols"],
    schedule: Schedule,
    restarts: tuple[int, ...],
    arithmetic: Arithmetic,
    gram_arithmetic: Arithmetic | None = None,
    identity_apart: bool = True,
) -> Float[Array, "*batch rows cols"]:
    """Orthogonalize wide matrices whose singular values are at most 1.

    Args:
      x: the matrices, stored as `arithmetic` holds them.
      schedule: the coefficients ``(a, b, c)`` of each step.
      restarts: after which steps X and R are computed anew, in rising order. All of 1 to
        ``len(schedule) - 1`` give the plain iteration.
      arithmetic: how the products with X are multiplied and rounded.
      gram_arithmetic: the same for products of Gram matrices; None means `arithmetic`.
      identity_apart: whether the multiples of I in P and Q stay numbers, which nothing rounds.
    """
    small = gram_arithmetic or arithmetic
    for steps in segments(schedule, restarts):
        gram = small.store(arithmetic.product(x, x))
        scale, q = 1.0, None
        for index, abc in enumerate(steps):
            a, w = _factor(gram, abc, small, identity_apart)
            if q is None:
                scale, q = a, w
            else:
                # (scale + Q)(a + W) without its identity.
                q = small.store(a * small.widen(q) + scale * small.widen(w) + small.product(q, w))
                scale = scale * a
            if index + 1 < len(steps):
                gram = _congruence(gram, a, w, small)
        assert q is not None  # no segment is empty
        product = arithmetic.product(q.astype(x.dtype), adjoint(x))
        x = arithmetic.store(scale * arithmetic.widen(x) + product)
    return x


def _factor(
    gram: jax.Array, abc: tuple[float, float, float], small: Arithmetic, identity_apart: bool
) -> tuple[float, jax.Array]:
    """``a`` and ``W = b R + c R^2``, or 0 and ``a I + W``."""
    a, b, c = abc
    w = b * small.widen(gram)
    if c:
        w += c * small.product(gram, gram)
    if identity_apart:
        return a, small.store(w)
    return 0.0, small.store(w + a * jnp.broadcast_to(jnp.eye(gram.shape[-1]), w.shape))


def _congruence(gram: jax.Array, a: float, w: jax.Array, small: Arithmetic) -> jax.Array:
    """``(a I + W) R (a I + W)``."""
    half = small.store(a * small.widen(gram) + small.product(w, gram))
    return small.store(a * small.widen(half) + small.product(half, w))


def rounded(exponent_bits: int, mantissa_bits: int) -> Arithmetic:
    """Any number format, held in float32: what an accelerator's products of it would give."""
    return Arithmetic(
        jnp.float32,
        lambda x: lax.reduce_precision(x, exponent_bits, mantissa_bits),
        full_precision_product,
        jnp.float32,
    )


ARITHMETICS = {
    "bfloat16": rounded(8, 7),
    "float16": rounded(5, 10),
    "float32": rounded(8, 23),
}
