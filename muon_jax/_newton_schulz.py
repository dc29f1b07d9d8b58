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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from muon_jax._arithmetic import Arithmetic, adjoint, engines, short_side
from muon_jax._common.loops import map_chunks
from muon_jax._matrices import is_tall
from muon_jax._polynomials import Coefficients, Schedule
from muon_jax._preconditioning import precondition


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
    beside: Inexact[Array, "*batch cols rows"] | None = None,
) -> Inexact[Array, "*batch own cols"]:
    """``A = X X^T,  X' = a X + (b A + c A A) X``: the own rows of X', of all of X.

    Of a tall X it is ``A = X^T X,  X' = a X + X (b A + c A A)``, and all rows are own. `beside` is
    ``X^T``, where the arithmetic keeps it. A step whose c is the number 0 has no A A.
    """
    a, b, c = abc
    store, product, widen = arithmetic.store, arithmetic.product, arithmetic.widen
    if gram is None:
        short = short_side(x)
        gram = rows.gather(store(product(rows.own(short), short)))
    own_gram = rows.own(gram)
    polynomial = b * widen(own_gram)
    if has_square(abc):
        polynomial += c * product(own_gram, gram)
    polynomial = store(polynomial)
    if is_tall(x.shape):
        moved = product(x, polynomial)
    else:
        moved = product(polynomial, adjoint(x) if beside is None else beside)
    return store(a * widen(rows.own(x)) + moved)


def has_square(abc: Any) -> bool:
    """Whether a step needs ``A A``: not where its c is known, as the program is traced, to be 0."""
    return not (isinstance(abc[2], float) and abc[2] == 0)


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
    if gram is not None:
        x = step(x, schedule[0], arithmetic, rows, gram)
        schedule = schedule[1:]
        x = rows.gather(x) if schedule else x
    # Sharers do not gather the rows of the last step: they are what each returns.
    count = len(schedule) if rows.are_all else max(len(schedule) - 1, 0)
    held = x, arithmetic.beside(x)
    for _, alike in itertools.groupby(schedule[:count], has_square):
        held = _steps([*alike], arithmetic, rows, held)
    x, beside = held
    for abc in schedule[count:]:
        x = step(x, abc, arithmetic, rows, beside=beside)
    return x.astype(dtype)


def _steps(alike: list[Coefficients], arithmetic: Arithmetic, rows: Rows, held: Any) -> Any:
    """Steps of which all have the product ``A A``, or none: of a whole X, and what is beside it."""
    real = jnp.finfo(arithmetic.wide).dtype

    def one(held: Any, abc: Any) -> tuple[Any, None]:
        a, b, c = abc
        x, beside = held
        abc = (a, b, c if has_square(alike[0]) else 0.0)
        x = rows.gather(step(x, abc, arithmetic, rows, beside=beside))
        return (x, arithmetic.beside(x)), None

    held, _ = lax.scan(one, held, jnp.asarray(alike, real), unroll=arithmetic.unroll)
    return held
