"""Gram Newton-Schulz: several steps on ``R = X X^T`` alone, then one product with ``X``.

A step multiplies X from the left by ``P = a I + b R + c R^2``, all of whose factors commute:

    R = X X^T;   for each step:  P = a I + b R + c R^2,  Q <- Q P,  R <- P R P
    X <- Q X

For k steps these are ``4 k - 3`` products of m x m matrices (k fewer where each c is 0) and two
with the n columns, where the plain iteration has k and 2 k: cheaper where ``n > 1.5 m``. A restart
computes R anew from X. The library restarts after every second step (`_newton_schulz.two_steps`);
here it may be after any, and P and Q may be rounded in several ways, for a search.

Two things go wrong. R's small eigenvalues lie below the rounding of its large ones: one that
rounding makes negative is multiplied by about ``a^2`` in each step and never saturates. And where
all singular values are alike, P and Q are near a multiple of I: its rounding is as large as that
of everything else together.
"""

import itertools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from muon_jax._arithmetic import Arithmetic, adjoint, full_precision_product
from muon_jax._polynomials import Coefficients, Schedule
from muon_jax._products import Products, of_steps

Apart = Literal["nothing", "a", "mean"]
"""What multiple of I stays a number, which nothing rounds: none, P's own a, or about P's mean."""


def segments(schedule: Schedule, restarts: tuple[int, ...]) -> Iterator[Schedule]:
    """The steps between restarts; a restart at k comes after the k-th step."""
    edges = (0, *restarts, len(schedule))
    for start, stop in itertools.pairwise(edges):
        yield schedule[start:stop]


def products(schedule: Schedule, restarts: tuple[int, ...]) -> Products:
    """Two long products between restarts, and three short ones for each step that is not first."""
    return of_steps([*segments(schedule, restarts)])


def gram_newton_schulz(
    x: Float[Array, "*batch rows cols"],
    schedule: Schedule,
    restarts: tuple[int, ...],
    arithmetic: Arithmetic,
    gram_arithmetic: Arithmetic | None = None,
    apart: Apart = "mean",
) -> Float[Array, "*batch rows cols"]:
    """Orthogonalize wide matrices whose singular values are at most 1.

    Args:
      x: the matrices, stored as `arithmetic` holds them.
      schedule: the coefficients ``(a, b, c)`` of each step.
      restarts: after which steps X and R are computed anew, in rising order. All of 1 to
        ``len(schedule) - 1`` give the plain iteration.
      arithmetic: how the products with X are multiplied and rounded.
      gram_arithmetic: the same for products of Gram matrices; None means `arithmetic`.
      apart: which multiple of I is left out of P and Q as they are rounded. A step by itself
        leaves out a, as the plain iteration does.
    """
    small = gram_arithmetic or arithmetic
    for steps in segments(schedule, restarts):
        here = "a" if len(steps) == 1 else apart
        gram = small.store(arithmetic.product(x, x))
        scale, q = _polynomial(gram, steps[0], small, here)
        last = scale, q
        for abc in steps[1:]:
            gram = _congruence(gram, *last, small)
            other, w = last = _polynomial(gram, abc, small, here)
            # (scale I + Q)(other I + W) without its identity.
            wide = other * small.widen(q) + scale * small.widen(w)
            q = small.store(wide + small.product(w, q))
            scale = scale * other
        product = arithmetic.product(q.astype(x.dtype), adjoint(x))
        x = arithmetic.store(scale * arithmetic.widen(x) + product)
    return x


def _polynomial(
    gram: jax.Array, abc: Coefficients, small: Arithmetic, apart: Apart
) -> tuple[jax.Array | float, jax.Array]:
    """P as a multiple of I and the rest, rounded."""
    a, b, c = abc
    rest = b * small.widen(gram)
    if c:
        rest += c * small.product(gram, gram)
    if apart == "a":
        return a, small.store(rest)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1]), rest.shape)
    if apart == "nothing":
        return 0.0, small.store(a * identity + rest)
    mean = small.trace(gram)[..., None, None] / gram.shape[-1]
    mean = lax.reduce_precision(b * mean + c * mean * mean, 8, 7)
    return a + mean, small.store(rest - mean * identity)


def _congruence(
    gram: jax.Array, scale: jax.Array | float, w: jax.Array, small: Arithmetic
) -> jax.Array:
    """``P R P`` of ``P = scale I + W``."""
    half = small.store(scale * small.widen(gram) + small.product(w, gram))
    return small.store(scale * small.widen(half) + small.product(half, w))


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
