"""Orthogonalize matrices by Newton-Schulz: normalise, iterate (Liu et al. 2025, Section 2.1).

    X_0 = M / ||M||_F,    X_k = a X + b (X X^T) X + c (X X^T)^2 X

What the precision rests on: in bfloat16 every product is accumulated in float32, its sum with
``a X`` or ``b A`` is formed in float32, and the result is rounded once. Written with bfloat16
sums instead, five steps drift 4-7% away from float32; rounded once, 1.2-1.5%.

Two engines run the same arithmetic. Accelerators multiply bfloat16 operands in one batched
product. XLA:CPU has no fast product of that kind (some fail at run time), so there the
bfloat16-rounded values are held in float32, and matrices are taken one by one, in a loop that
stays in cache, which is faster there than its batched product.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from muon_jax._checks import as_array, check_dtype
from muon_jax._collectives import RowShare
from muon_jax._polynomials import Schedule, resolve_schedule

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]

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
    the same: the iteration runs on the smaller Gram matrix.

    Where a matrix lacks rank, its null directions stay near 0 in float32 (1e-5 measured). Rounding
    to bfloat16 fills them with noise, which the steps amplify: to singular values of 0.07 to 0.24
    for a 64x128 matrix of rank 32.

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

    Example:
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
    iteration = Iteration(
        resolve_schedule(ns_coeffs, ns_steps),
        check_preconditioning(preconditioning),
        check_ns_dtype(ns_dtype),
    )
    if not x.size:
        return x
    rows, cols = x.shape[-2:]
    wide = x if rows <= cols else x.mT
    flat = iteration.cast(wide.reshape(-1, *wide.shape[-2:]))
    out = iteration(flat).reshape(wide.shape).astype(x.dtype)
    return out if rows <= cols else out.mT


def check_preconditioning(name: str) -> str:
    """Return `name`, or raise ValueError that lists the known ones."""
    if name not in get_args(Preconditioning):
        raise ValueError(
            f"Unknown preconditioning {name!r}; known are {', '.join(get_args(Preconditioning))}."
        )
    return name


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
    """A hashable Newton-Schulz iteration, ready to run on batches of wide matrices."""

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

    def storage_dtype(self, *parts: jax.Array) -> jnp.dtype:
        """The dtype of `cast`, given what is summed to what it casts."""
        if not any(jnp.iscomplexobj(part) for part in parts):
            return jnp.dtype(self.ns_dtype)
        return jnp.dtype("complex128" if self.ns_dtype == "float64" else "complex64")

    def __call__(
        self, x: Inexact[Array, "batch rows cols"], share: RowShare | None = None
    ) -> Inexact[Array, "batch _ cols"]:
        """Orthogonalize wide matrices (rows <= cols) held in their storage dtype.

        With `share`, inside a `shard_map`, several devices hold the same matrices and divide the
        products by rows; each gets the rows that it computed.
        """
        return _newton_schulz(x, self, share)


def _narrow(x: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """Cast, keeping finite values finite: the largest of a wider dtype would become infinite."""
    limit = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(x.dtype).max) > limit:
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
    return x.astype(dtype)


@functools.partial(jax.jit, static_argnames=("iteration", "share"))
def _newton_schulz(
    x: Inexact[Array, "batch rows cols"], iteration: Iteration, share: RowShare | None
) -> Inexact[Array, "batch _ cols"]:
    if x.dtype != jnp.bfloat16:
        exact = _Arithmetic(x.dtype, lambda y: y, _full_precision_product, unroll=True)
        on_cpu, elsewhere = exact._replace(unroll=False), exact
    else:
        on_cpu = _Arithmetic(jnp.float32, _round_to_bfloat16, _full_precision_product, unroll=False)
        elsewhere = _Arithmetic(jnp.float32, _to_bfloat16, _bfloat16_product, unroll=True)
    # Sharers meet in every step, so their few matrices go through together on CPU too.
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_iterate if share else _one_by_one, on_cpu, iteration, share),
        default=functools.partial(_iterate, elsewhere, iteration, share),
    )


class _Arithmetic(NamedTuple):
    """How one engine multiplies and rounds; the iteration itself is written once."""

    wide: Any  # the dtype of accumulation, of sums and of norms
    store: Callable[[jax.Array], jax.Array]  # rounds a sum to what the next product reads
    product: Callable[..., jax.Array]  # stored x stored -> wide
    unroll: bool


def _round_to_bfloat16(x: jax.Array) -> jax.Array:
    # reduce_precision, since XLA may drop a pair of casts as excess precision.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _to_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def _full_precision_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _bfloat16_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _one_by_one(
    arithmetic: _Arithmetic,
    iteration: Iteration,
    share: None,
    x: Inexact[Array, "batch rows cols"],
) -> Inexact[Array, "batch rows cols"]:
    # Widened before the loop: inside it the conversion costs more (EXPERIMENTS.md).
    wide = x.astype(arithmetic.wide)
    return lax.map(functools.partial(_iterate, arithmetic, iteration, share), wide).astype(x.dtype)


def _iterate(
    arithmetic: _Arithmetic,
    iteration: Iteration,
    share: RowShare | None,
    x: Inexact[Array, "*batch rows cols"],
) -> Inexact[Array, "*batch _ cols"]:
    store, product = arithmetic.store, arithmetic.product
    dtype = x.dtype

    # What a device computes: all rows, or its own, which the others then get.
    def own(x: jax.Array) -> jax.Array:
        return share.own(x) if share else x

    def whole(x: jax.Array) -> jax.Array:
        return share.gather(x.astype(dtype)).astype(x.dtype) if share else x

    def step(x: jax.Array, abc: Any, gram: jax.Array | None = None) -> tuple[jax.Array, None]:
        a, b, c = abc
        gram = whole(store(product(own(x), _adjoint(x)))) if gram is None else gram
        poly = store(b * own(gram).astype(arithmetic.wide) + c * product(own(gram), gram))
        return store(a * own(x).astype(arithmetic.wide) + product(poly, x)), None

    # Where pieces are put together XLA would sum the squares in the pieces' order, not in the
    # matrix's: a norm that differs in its last bit moves 1 in 500 matrices by a bfloat16 rounding.
    x = lax.optimization_barrier(x)
    x = _divide_by_norm(x.astype(arithmetic.wide))
    schedule = iteration.schedule
    if iteration.preconditioning == "spectral":
        x = _divide_by_largest_singular_value(x)
    gram = None
    if iteration.preconditioning in ("aol", "schatten"):
        rescale = _aol if iteration.preconditioning == "aol" else _schatten
        x = store(x)
        x, gram = rescale(x.astype(arithmetic.wide), product(x, _adjoint(x)))
        gram = store(gram)
    x = store(x)
    if gram is not None:
        x, _ = step(x, schedule[0], gram)
        schedule = schedule[1:]
        x = whole(x) if schedule else x
    if schedule:
        # The last rows are not gathered: they are what this device returns.
        together, last = (schedule[:-1], schedule[-1:]) if share else (schedule, ())
        real = jnp.finfo(arithmetic.wide).dtype
        if together:
            unroll = len(together) if arithmetic.unroll else 1
            x, _ = lax.scan(
                lambda x, abc: (whole(step(x, abc)[0]), None),
                x,
                jnp.asarray(together, real),
                unroll=unroll,
            )
        for abc in last:
            x, _ = step(x, jnp.asarray(abc, real))
    return x.astype(dtype)


def _adjoint(x: jax.Array) -> jax.Array:
    return x.mT.conj() if jnp.iscomplexobj(x) else x.mT


def _safe(divisor: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 where the divisor is 0, so that zeros stay zeros."""
    return jnp.where(divisor == 0, 1, divisor)


def _divide_by_norm(x: Inexact[Array, "*batch rows cols"]) -> Inexact[Array, "*batch rows cols"]:
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
    return x / jnp.sqrt(_safe(jnp.sum(jnp.square(jnp.abs(x)), axis=(-2, -1), keepdims=True)))


def _divide_by_largest_singular_value(
    x: Inexact[Array, "*batch rows cols"],
) -> Inexact[Array, "*batch rows cols"]:
    gram = _full_precision_product(x, _adjoint(x))
    largest = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[..., -1], 0))
    return x / _safe(largest)[..., None, None]


def _aol(
    x: Inexact[Array, "*batch rows cols"], gram: Inexact[Array, "*batch rows rows"]
) -> tuple[Inexact[Array, "*batch rows cols"], Inexact[Array, "*batch rows rows"]]:
    """Row scales that bound the spectral norm by 1 (arXiv 2512.04632)."""
    scale = lax.rsqrt(_safe(jnp.sum(jnp.abs(gram), axis=-1)))
    return x * scale[..., :, None], gram * scale[..., :, None] * scale[..., None, :]


def _schatten(
    x: Inexact[Array, "*batch rows cols"], gram: Inexact[Array, "*batch rows rows"]
) -> tuple[Inexact[Array, "*batch rows cols"], Inexact[Array, "*batch rows rows"]]:
    """Divide by the Schatten-4 norm, which bounds the spectral norm (arXiv 2506.10935)."""
    squared = jnp.sqrt(_safe(jnp.sum(jnp.square(jnp.abs(gram)), axis=(-2, -1), keepdims=True)))
    return x / jnp.sqrt(squared), gram / squared
