"""Orthogonalize matrices: which ones, in which dtype; the iteration itself is `_newton_schulz`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from muon_jax._common.checks import as_array, check_dtype
from muon_jax._newton_schulz import ALL_ROWS, Rows, newton_schulz
from muon_jax._polynomials import Schedule, resolve_schedule
from muon_jax._preconditioning import Preconditioning, check_preconditioning

_NS_DTYPES = ("bfloat16", "float32", "float64")


def orthogonalize(
    x: Inexact[Array, "*batch rows cols"],
    ns_coeffs: Any = "standard",
    ns_steps: int | None = None,
    *,
    preconditioning: Preconditioning = "frobenius",
    ns_dtype: jax.typing.DTypeLike = "bfloat16",
) -> Inexact[Array, "*batch rows cols"]:
    """Replace the singular values of each matrix by values near 1: the polar factor ``U V^T``.

    The result does not depend on the scale of `x`, from 1e-30 to 1e30; a zero matrix gives exact
    zeros, and a derivative of zero; a finite matrix never gives NaN. Wide and tall matrices cost
    the same: the iteration runs on the smaller Gram matrix. Where a matrix is more than 3/2 as long
    as wide, two steps are taken at once, with fewer products and no more rounding.

    Where a matrix lacks rank, its null directions stay near 0 in float32 (1e-5 measured). Rounding
    to bfloat16 fills them with noise, which the steps amplify: to singular values of 0.04 to 0.24
    for 64x128 matrices of rank 32.

    Args:
      x: matrices in the last two axes, any leading axes; float32, bfloat16, float16, float64 or
        complex.
      ns_coeffs: the schedule, by name or as data; see `muon_jax.SCHEDULES`.
      ns_steps: the number of steps; None means 5, or the schedule's own length.
      preconditioning: what divides `x` before the first step. ``"frobenius"``: the Frobenius
        norm (Liu et al. 2025). ``"spectral"``: the largest singular value, from an eigenvalue
        decomposition of the Gram matrix; costly. ``"aol"``: a scale for each row from the row
        sums of ``|X X^T|`` (Turbo-Muon, arXiv 2512.04632); ``"schatten"``: the Schatten-4 norm
        ``||X X^T||_F^(1/2)`` (arXiv 2506.10935). The last two reuse the first step's product.
      ns_dtype: the dtype that the products multiply: bfloat16 (the paper's), float32 or float64.
        Complex matrices iterate in complex64, or complex128 for float64.

    Returns:
      An array of `x`'s shape and dtype.

    Raises:
      ValueError: for fewer than two axes, an unknown name, contradicting steps, another dtype.
      TypeError: for an integer or boolean `x`.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (3, 64, 16))
      >>> s = jnp.linalg.svd(orthogonalize(x, "deepseek_v4"), compute_uv=False)
      >>> bool(abs(s - 1).max() < 0.02)
      True
    """
    x = as_array("orthogonalize", x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"orthogonalize takes floating-point or complex matrices, got dtype {x.dtype}; "
            "convert with x.astype(jnp.float32)."
        )
    if x.ndim < 2:
        raise ValueError(
            f"orthogonalize takes matrices in the last two axes, got shape {x.shape}; a vector "
            "belongs to AdamW."
        )
    iteration = resolve_iteration(ns_coeffs, ns_steps, preconditioning, ns_dtype)
    if not x.size:
        return x
    flat = iteration.cast(x.reshape(-1, *x.shape[-2:]))
    return iteration(flat).reshape(x.shape).astype(x.dtype)


def check_ns_dtype(ns_dtype: Any) -> str:
    """Return the dtype's name, or raise ValueError that says which can be iterated in."""
    name = check_dtype("ns_dtype", ns_dtype).name
    if name not in _NS_DTYPES:
        raise ValueError(
            f"ns_dtype must be one of {', '.join(_NS_DTYPES)}; got {name}. float16 is not offered: "
            "a gradient is cast before it is normalised, and its range ends at 6e-8."
        )
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("ns_dtype=float64 needs jax.config.update('jax_enable_x64', True).")
    return name


class Iteration(NamedTuple):
    """A hashable Newton-Schulz iteration, ready to run on batches of matrices."""

    schedule: Schedule
    preconditioning: str
    ns_dtype: str

    def cast(self, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """Cast to the dtype in which matrices are stacked, exchanged and multiplied.

        It comes before the norm, so that every device sees the values that one device would.
        """
        if jnp.iscomplexobj(x):
            real = "float64" if self.ns_dtype == "float64" else "float32"
            return lax.complex(_narrow(x.real, real), _narrow(x.imag, real))
        return _narrow(x, self.ns_dtype)

    def storage_dtype(self, *parts: jax.Array | jax.ShapeDtypeStruct) -> jnp.dtype:
        """The dtype of `cast`, given what is summed to what it casts."""
        if not any(jnp.iscomplexobj(part) for part in parts):
            return jnp.dtype(self.ns_dtype)
        return jnp.dtype("complex128" if self.ns_dtype == "float64" else "complex64")

    def __call__(
        self, x: Inexact[Array, "batch rows cols"], rows: Rows = ALL_ROWS
    ) -> Inexact[Array, "batch own cols"]:
        """Orthogonalize matrices held in their storage dtype.

        With other `rows`, devices that hold the same wide matrices divide the products among them,
        and each gets the rows that it computed.
        """
        return newton_schulz(x, self.schedule, self.preconditioning, rows)


def resolve_iteration(
    ns_coeffs: Any, ns_steps: int | None, preconditioning: str, ns_dtype: Any
) -> Iteration:
    """The iteration that the arguments of `orthogonalize` ask for; raise as it says."""
    return Iteration(
        resolve_schedule(ns_coeffs, ns_steps),
        check_preconditioning(preconditioning),
        check_ns_dtype(ns_dtype),
    )


def _narrow(x: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """Cast, keeping finite values finite: the largest of a wider dtype would become infinite."""
    limit = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(x.dtype).max) > limit:
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
    return x.astype(dtype)
