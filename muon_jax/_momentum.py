"""The momentum: its equation, and the dtype that it is kept in."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from muon_jax._common.checks import Scalar, check_dtype
from muon_jax._common.dtypes import promote


def heavy_ball(
    momentum: Inexact[Array, "*shape"],
    gradient: Inexact[Array, "*shape"],
    beta: Scalar,
    nesterov: bool,
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    """The momentum and the direction, what is orthogonalized, in float32 or wider (Eq. 1).

    ``M_t = beta M_{t-1} + G_t``, and ``beta M_t + G_t`` with Nesterov, else ``M_t`` itself.
    """
    wide = promote(promote(momentum.dtype, gradient.dtype), jnp.float32)
    gradient = gradient.astype(wide)
    beta = jnp.asarray(beta, jnp.finfo(wide).dtype)
    momentum = beta * momentum.astype(wide) + gradient
    return momentum, beta * momentum + gradient if nesterov else momentum


def check_mu_dtype(mu_dtype: Any) -> jnp.dtype | None:
    """Return the dtype, or raise where a momentum cannot have it."""
    if mu_dtype is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(check_dtype("mu_dtype", mu_dtype))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be a floating-point dtype or None; got {mu_dtype}.")
    return dtype


def momentum_dtype(mu_dtype: jnp.dtype | None, param: jnp.dtype) -> jnp.dtype:
    """The dtype of the momentum of a parameter of dtype `param`.

    Complex parameters keep a complex one.
    """
    if mu_dtype is None:
        return accumulator_dtype(param)
    complex_ = jnp.issubdtype(param, jnp.complexfloating)
    return promote(mu_dtype, jnp.complex64) if complex_ else mu_dtype


def accumulator_dtype(param: jnp.dtype) -> jnp.dtype:
    """The dtype in which sums and squares of a parameter's gradients are kept by default.

    float16 ends at 65504, and a heavy ball sums to twenty gradients; it begins at 6e-8, and the
    square of a gradient of 1e-4 is 1e-8. So float32 for float16, and the parameter's own otherwise.
    """
    return jnp.dtype(jnp.float32 if param == jnp.float16 else param)
