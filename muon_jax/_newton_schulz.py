"""Newton-Schulz: the step, and the iteration made of it (Liu et al. 2025, Section 2.1).

    X_0 = M / ||M||_F,    X_k = a X + b (X X^T) X + c (X X^T)^2 X

The step is an odd polynomial of X's singular values, which it moves towards 1: what comes out is
near the polar factor U V^T. Its coefficients, one triple for each step, are `_polynomials`' affair;
what divides M is `_preconditioning`'s, how products are rounded `_arithmetic`'s.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from muon_jax._arithmetic import Arithmetic, adjoint, arithmetics
from muon_jax._polynomials import Schedule
from muon_jax._preconditioning import precondition


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of each product this device computes: all of them.

    Devices may hold the same matrices and divide the work on them by rows: `_collectives.RowShare`
    overrides both methods. The mathematics needs no more of them, and knows nothing of a mesh.
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
    gram: Inexact[Array, "*batch rows rows"] | None = None,
) -> Inexact[Array, "*batch own cols"]:
    """``A = X X^T,  X' = a X + (b A + c A A) X``: the own rows of X', of all of X."""
    a, b, c = abc
    store, product, widen = arithmetic.store, arithmetic.product, arithmetic.widen
    if gram is None:
        gram = rows.gather(store(product(rows.own(x), adjoint(x))))
    own_gram = rows.own(gram)
    polynomial = store(b * widen(own_gram) + c * product(own_gram, gram))
    return store(a * widen(rows.own(x)) + product(polynomial, x))


@functools.partial(jax.jit, static_argnames=("schedule", "preconditioning", "rows"))
def newton_schulz(
    x: Inexact[Array, "batch rows cols"],
    schedule: Schedule,
    preconditioning: str = "frobenius",
    rows: Rows = ALL_ROWS,
) -> Inexact[Array, "batch own cols"]:
    """Orthogonalize wide matrices (rows <= cols) held in the dtype in which they are multiplied.

    Args:
      x: the matrices.
      schedule: the coefficients ``(a, b, c)`` of each step.
      preconditioning: what divides `x` first.
      rows: the rows to compute, and to return.
    """
    on_cpu, elsewhere = arithmetics(x.dtype)
    run = functools.partial(iterate, schedule, preconditioning, rows)
    # Sharers meet in every step, so their few matrices go through together on CPU too.
    cpu = functools.partial(_one_by_one, run) if rows.are_all else run
    default = functools.partial(run, elsewhere)
    return lax.platform_dependent(x, cpu=functools.partial(cpu, on_cpu), default=default)


def _one_by_one(
    run: Any, arithmetic: Arithmetic, x: Inexact[Array, "batch rows cols"]
) -> Inexact[Array, "batch rows cols"]:
    """One matrix after the other: it stays in the CPU's cache, which a batch would not."""
    # Widened before the loop: inside it the conversion costs more (EXPERIMENTS.md).
    return lax.map(functools.partial(run, arithmetic), arithmetic.widen(x)).astype(x.dtype)


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
    count = len(schedule) if rows.are_all else len(schedule) - 1
    real = jnp.finfo(arithmetic.wide).dtype
    if count > 0:
        x, _ = lax.scan(
            lambda x, abc: (rows.gather(step(x, abc, arithmetic, rows)), None),
            x,
            jnp.asarray(schedule[:count], real),
            unroll=count if arithmetic.unroll else 1,
        )
    for abc in schedule[max(count, 0) :]:
        x = step(x, jnp.asarray(abc, real), arithmetic, rows)
    return x.astype(dtype)
