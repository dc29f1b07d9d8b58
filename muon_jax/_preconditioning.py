"""What divides a matrix before the first step, so that its singular values are at most 1.

    frobenius   X / ||X||_F                                  Liu et al. 2025, Section 2.1
    spectral    X / sigma_max(X)
    aol         row i times (sum_j |X X^T|_ij)^(-1/2)         Turbo-Muon, arXiv 2512.04632
    schatten    X / ||X X^T||_F^(1/2)                        arXiv 2506.10935

These are of wide matrices; tall ones have columns and X^T X for rows and X X^T.

The closer to 1 singular values begin, the fewer steps are needed. The Frobenius norm is the root of
the sum of all their squares, far more than the largest where there are many of one size. The last
two bounds are tighter, at no cost: the product that they need is the first step's, which is
rescaled and used again.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from muon_jax._arithmetic import Arithmetic, full_precision_product, short_side
from muon_jax._matrices import is_tall

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]


def check_preconditioning(name: str) -> str:
    """Return `name`, or raise ValueError that lists the known ones."""
    if name not in get_args(Preconditioning):
        raise ValueError(
            f"Unknown preconditioning {name!r}; known are {', '.join(get_args(Preconditioning))}."
        )
    return name


def precondition(
    x: Inexact[Array, "*batch rows cols"], name: str, arithmetic: Arithmetic
) -> tuple[Inexact[Array, "*batch rows cols"], Inexact[Array, "*batch short short"] | None]:
    """Divide matrices.

    Args:
      x: the matrices, in the arithmetic's wide dtype.
      name: one of `Preconditioning`.
      arithmetic: how to multiply and round.

    Returns:
      The iterate ``X_0``, stored, and its Gram matrix where that is known already.
    """
    x, gram = _divide_by_norm(x, arithmetic.norm_bits), None
    if name == "spectral":
        x = _divide_by_largest_singular_value(x)
    elif name != "frobenius":
        rescale = _aol if name == "aol" else _schatten
        # From the norm's rounded quotient, as the first step would read it.
        x = arithmetic.store(x)
        short = short_side(x)
        x, gram = rescale(arithmetic.widen(x), arithmetic.product(short, short))
        gram = arithmetic.store(gram)
    return arithmetic.store(x), gram


def _safe(divisor: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 where the divisor is 0, so that zeros stay zeros."""
    return jnp.where(divisor == 0, 1, divisor)


def _divide_by_norm(
    x: Inexact[Array, "*batch rows cols"], bits: int | None
) -> Inexact[Array, "*batch rows cols"]:
    """Divide by the Frobenius norm, after the largest component: its square can't overflow."""
    components = (
        jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    )
    peak = jnp.max(components, axis=(-2, -1), keepdims=True)
    # XLA divides by multiplying with the reciprocal, which is flushed to 0 from 2^126 up.
    quarter = jnp.where(peak > 1, jnp.asarray(0.25, peak.dtype), 1)
    x = (x * quarter) / _safe(peak * quarter)
    # At a zero matrix there is no derivative: 0 is given for it. A root of 0 would make it NaN.
    x = jnp.where(peak == 0, jnp.zeros((), x.dtype), x)
    norm = jnp.sqrt(_safe(jnp.sum(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)))
    if bits is not None:
        norm = lax.reduce_precision(norm, exponent_bits=8, mantissa_bits=bits)
    return x / norm


def _divide_by_largest_singular_value(
    x: Inexact[Array, "*batch rows cols"],
) -> Inexact[Array, "*batch rows cols"]:
    short = short_side(x)
    gram = full_precision_product(short, short)
    largest = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[..., -1], 0))
    return x / _safe(largest)[..., None, None]


def _aol(
    x: Inexact[Array, "*batch rows cols"], gram: Inexact[Array, "*batch short short"]
) -> tuple[Inexact[Array, "*batch rows cols"], Inexact[Array, "*batch short short"]]:
    """Scales of rows, or of columns, that bound the spectral norm by 1 (arXiv 2512.04632)."""
    scale = lax.rsqrt(_safe(jnp.sum(jnp.abs(gram), axis=-1)))
    of_rows, of_cols = scale[..., :, None], scale[..., None, :]
    # The larger first: symmetric to the last bit, and no entry is above the smaller of its row's
    # and its column's sum, so that nothing overflows on the way.
    larger, smaller = jnp.maximum(of_rows, of_cols), jnp.minimum(of_rows, of_cols)
    return x * (of_cols if is_tall(x.shape) else of_rows), gram * larger * smaller


def _schatten(
    x: Inexact[Array, "*batch rows cols"], gram: Inexact[Array, "*batch short short"]
) -> tuple[Inexact[Array, "*batch rows cols"], Inexact[Array, "*batch short short"]]:
    """Divide by the Schatten-4 norm, which bounds the spectral norm (arXiv 2506.10935)."""
    squared = jnp.sqrt(_safe(jnp.sum(jnp.square(jnp.abs(gram)), axis=(-2, -1), keepdims=True)))
    return x / jnp.sqrt(squared), gram / squared
