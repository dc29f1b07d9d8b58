"""Newton-Schulz: the step, and the iteration made of it (Liu et al. 2025, Section 2.1).

    X_0 = M / ||M||_F,    X_k = a X + b (X X^T) X + c (X X^T)^2 X

The step is an odd polynomial of X's singular values, which it moves towards 1: what comes out is
near the polar factor U V^T. Of a tall X the same polynomial takes the smaller Gram matrix,

    X_k = a X + X (b X^T X + c (X^T X)^2)

Its coefficients, one triple for each step, are `_polynomials`' affair; what divides M is
`_preconditioning`'s, how products are rounded `_arithmetic`'s.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from muon_jax._arithmetic import Arithmetic, engines, short_side
from muon_jax._common.loops import map_chunks
from muon_jax._matrices import is_tall
from muon_jax._polynomials import Schedule
from muon_jax._preconditioning import precondition
from muon_jax._products import at_once, has_square


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of each product this device computes: all of them.

    Devices may hold the same matrices and divide the work on them by rows: `_collectives.RowShare`
    overrides both methods, for wide matrices. The mathematics needs no more of them, and knows
    nothing of a mesh.
    """

    def own(self, x: Inexact[Array, "*batch rows cols"]) -> Inexact[Array, "*batch own cols"]:
        """The rows that this device computes."""
        return x

    def gather(self, x: Inexact[Array, "*batch own cols"]) -> Inexact[Array, "*batch rows cols"]:
        """All rows, of which each device has computed its own."""
        return x

    @property
    def are_all(self) -> bool:
        """Whether no other device computes rows of these matrices."""
        return type(self) is Rows


ALL_ROWS = Rows()


def step(
    x: Inexact[Array, "*batch rows cols"],
    abc: Any,
    arithmetic: Arithmetic,
    rows: Rows = ALL_ROWS,
    gram: Inexact[Array, "*batch short short"] | None = None,
) -> Inexact[Array, "*batch own cols"]:
    """``A = X X^T,  X' = a X + (b A + c A A) X``: the own rows of X', of all of X.

    Of a tall X it is ``A = X^T X,  X' = a X + X (b A + c A A)``, and all rows are own. A step whose
    c is the number 0 has no A A.
    """
    a, b, c = abc
    gram = _gram(x, arithmetic, rows) if gram is None else gram
    own = rows.own(gram)

    def with_square(sums: jax.Array, gram: jax.Array) -> jax.Array:
        return b * arithmetic.widen(gram) + c * sums

    if has_square(abc):
        polynomial = arithmetic.symmetric(gram, own, with_square, own)
    else:
        polynomial = arithmetic.store(b * arithmetic.widen(own))
    return _apply(a, polynomial, x, arithmetic, rows)


def two_steps(
    x: Inexact[Array, "*batch rows cols"],
    first: Any,
    second: Any,
    arithmetic: Arithmetic,
    rows: Rows = ALL_ROWS,
    gram: Inexact[Array, "*batch short short"] | None = None,
) -> Inexact[Array, "*batch own cols"]:
    """Two steps as one: the second Gram matrix comes from the first, not from X'.

        R = X X^T,  P = a I + b R + c R R,  R' = P R P,  P' = a' I + b' R' + c' R' R',  X'' = P' P X

    X is read and written once, and takes part in two products instead of four; `_products` says
    where that is less. Of a tall X it is ``X P P'``, with ``X^T X``.

    What it rests on in bfloat16: P is near a multiple of I, of which a rounded diagonal would lose
    as much as all the rest is worth. So that multiple, p(r) at the mean r of R's eigenvalues, is
    kept apart, as a number in the wide dtype; ``P - p(r) I`` and ``P' P - p'(r') p(r) I`` are what
    is rounded. More than two steps at once do not hold: an eigenvalue of R near 0 that rounding has
    made negative grows by up to a^2 in each, and nothing brings it back (EXPERIMENTS.md).

    No product but the first is mirrored on CPUs: R' is symmetric but for its rounding.
    """
    store, product, widen = arithmetic.store, arithmetic.product, arithmetic.widen
    gram = _gram(x, arithmetic, rows) if gram is None else gram
    own = rows.own(gram)
    scale, polynomial = _polynomial(gram, own, first, arithmetic, rows)
    whole = rows.gather(polynomial)
    half = store(scale * widen(own) + product(polynomial, gram))
    own = store(scale * widen(half) + product(half, whole))
    gram = rows.gather(own)
    other, second_polynomial = _polynomial(gram, own, second, arithmetic, rows)
    both = scale * widen(second_polynomial) + other * widen(polynomial)
    both = store(both + product(second_polynomial, whole))
    return _apply(scale * other, both, x, arithmetic, rows)


def take(
    x: Inexact[Array, "*batch rows cols"],
    steps: Sequence[Any],
    arithmetic: Arithmetic,
    rows: Rows = ALL_ROWS,
    gram: Inexact[Array, "*batch short short"] | None = None,
) -> Inexact[Array, "*batch own cols"]:
    """One step, or two at once."""
    if len(steps) == 1:
        return step(x, steps[0], arithmetic, rows, gram)
    first, second = steps
    return two_steps(x, first, second, arithmetic, rows, gram)


def _gram(
    x: Inexact[Array, "*batch rows cols"], arithmetic: Arithmetic, rows: Rows
) -> Inexact[Array, "*batch short short"]:
    """``X X^T``, or ``X^T X`` of a tall X: whole, and rounded."""
    short = short_side(x)
    return rows.gather(arithmetic.symmetric(short, rows.own(short), lambda sums: sums))


def _apply(
    multiple: Any,
    rest: Inexact[Array, "*batch own short"],
    x: Inexact[Array, "*batch rows cols"],
    arithmetic: Arithmetic,
    rows: Rows,
) -> Inexact[Array, "*batch _ cols"]:
    """``P X`` of ``P = multiple I + rest``, of which own rows are given; ``X P`` of a tall X."""
    product = arithmetic.product
    moved = product(x, rest) if is_tall(x.shape) else product(rest, arithmetic.adjoint(x))
    return arithmetic.store(multiple * arithmetic.widen(rows.own(x)) + moved)


def _polynomial(
    gram: Inexact[Array, "*batch short short"],
    own: Inexact[Array, "*batch own short"],
    abc: Any,
    arithmetic: Arithmetic,
    rows: Rows,
) -> tuple[Inexact[Array, "*batch 1 1"], Inexact[Array, "*batch own short"]]:
    """``P = a I + b R + c R R`` as a multiple of I and the own rows of the rest, rounded."""
    a, b, c = abc
    wide = arithmetic.widen(own)
    mean = arithmetic.trace(gram)[..., None, None] / gram.shape[-1]
    apart = b * mean
    rest = b * wide
    if has_square(abc):
        apart += c * mean * mean
        rest += c * arithmetic.product(own, gram)
    # Any number near it will do. One of few digits is the same whatever order the trace is summed
    # in, and a matrix has the same bits in every batch.
    apart = lax.reduce_precision(apart, exponent_bits=8, mantissa_bits=7)
    identity = rows.own(jnp.eye(gram.shape[-1], dtype=arithmetic.wide))
    return a + apart, arithmetic.store(rest - apart * jnp.broadcast_to(identity, rest.shape))


@functools.partial(jax.jit, static_argnames=("schedule", "preconditioning", "rows"))
def newton_schulz(
    x: Inexact[Array, "batch rows cols"],
    schedule: Schedule,
    preconditioning: str = "frobenius",
    rows: Rows = ALL_ROWS,
) -> Inexact[Array, "batch own cols"]:
    """Orthogonalize matrices held in the dtype in which they are multiplied.

    Args:
      x: the matrices.
      schedule: the coefficients ``(a, b, c)`` of each step.
      preconditioning: what divides `x` first.
      rows: the rows to compute, and to return; all of tall matrices.
    """
    run = functools.partial(iterate, schedule, preconditioning, rows)
    # Sharers meet in every step, so their few matrices go through together on CPU too.
    cpu = functools.partial(_some_at_a_time, run) if rows.are_all else run
    by_platform = {
        platform: functools.partial(cpu if platform == "cpu" else run, engine)
        for platform, engine in engines(x.dtype).items()
    }
    return lax.platform_dependent(x, **by_platform)


def _some_at_a_time(
    run: Any, arithmetic: Arithmetic, x: Inexact[Array, "batch rows cols"]
) -> Inexact[Array, "batch rows cols"]:
    """One loop over chunks of at most `batch_bytes`, all alike: their length divides the batch.

    Tall matrices are turned: XLA:CPU multiplies bfloat16 fast in one layout, and so a matrix has
    the same bits here as where a mesh has turned it.
    """
    if is_tall(x.shape):
        return _some_at_a_time(run, arithmetic, x.mT).mT
    count, rows, cols = x.shape
    capacity = max(1, (arithmetic.batch_bytes or 0) // (rows * cols * x.dtype.itemsize))
    together = max(n for n in range(1, min(capacity, count) + 1) if count % n == 0)
    # Cast before the loop: inside it the conversion costs more (EXPERIMENTS.md).
    held = x.astype(arithmetic.held)
    chunks = held.reshape(count // together, *([together] if together > 1 else []), rows, cols)
    out = map_chunks(lambda _, chunk: run(arithmetic, chunk), chunks)
    return out.reshape(x.shape).astype(x.dtype)


def iterate(
    schedule: Schedule,
    preconditioning: str,
    rows: Rows,
    arithmetic: Arithmetic,
    x: Inexact[Array, "*batch rows cols"],
) -> Inexact[Array, "*batch own cols"]:
    """Precondition, and take all steps; the result has the dtype of `x`."""
    dtype = x.dtype
    # Where pieces are put together XLA would sum the squares in the pieces' order, not in the
    # matrix's: a norm that differs in its last bit moves 1 in 500 matrices by a bfloat16 rounding.
    x = lax.optimization_barrier(x)
    x, gram = precondition(arithmetic.widen(x), preconditioning, arithmetic)
    taken = at_once(schedule, *x.shape[-2:])
    # Sharers do not gather the rows of the last steps: they are what each returns.
    last = [] if rows.are_all else [taken.pop()]
    if gram is not None and taken:
        x = rows.gather(take(x, taken.pop(0), arithmetic, rows, gram))
        gram = None
    for _, alike in itertools.groupby(taken, lambda steps: [*map(has_square, steps)]):
        x = _loop([*alike], arithmetic, rows, x)
    for steps in last:
        x = take(x, steps, arithmetic, rows, gram)
    return x.astype(dtype)


def _loop(
    alike: list[Schedule],
    arithmetic: Arithmetic,
    rows: Rows,
    x: Inexact[Array, "*batch rows cols"],
) -> Inexact[Array, "*batch rows cols"]:
    """Steps, by ones or twos, that are alike in which of them have the product ``A A``."""
    real = jnp.finfo(arithmetic.wide).dtype

    def one(x: Any, steps: Any) -> tuple[Any, None]:
        known = [
            (a, b, c if has_square(abc) else 0.0)
            for (a, b, c), abc in zip(steps, alike[0], strict=True)
        ]
        return rows.gather(take(x, known, arithmetic, rows)), None

    unroll = max(1, arithmetic.unroll // len(alike[0]))
    x, _ = lax.scan(one, x, jnp.asarray(alike, real), unroll=unroll)
    return x
