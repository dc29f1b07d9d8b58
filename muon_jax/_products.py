"""Which steps Newton-Schulz takes two at once, and how many products they are.

A step multiplies twice along the long side of a matrix, ``X X^T`` and ``P X``, and once along the
short one, ``A A``. Two steps at once (`_newton_schulz.two_steps`) leave out two long products, and
take three more short ones: fewer FLOPs where the long side is more than 3/2 of the short one.

Worked example, five standard steps on 512x2048: as 2 + 2 + 1 steps they are 6 long products and 11
short ones, instead of 10 and 5; 2 x 512^2 x (6 x 2048 + 11 x 512) = 9.4 GFLOP instead of 12.1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from muon_jax._polynomials import Schedule

STEEPEST = 12.5
"""What the a of two steps at once may come to, multiplied: the paper's 3.4445^2 is 11.9.

So much more do they multiply small singular values than those that end near 1, and the rounding of
their common polynomial is relative to its largest eigenvalue.
"""


class Products(NamedTuple):
    """The number of matrix products of one iteration on an m x n matrix, m <= n.

    Attributes:
      long: products over or along n: ``2 m^2 n`` FLOPs.
      short: products of two m x m matrices: ``2 m^3`` FLOPs.
    """

    long: int
    short: int

    @property
    def all(self) -> int:
        """How many there are."""
        return self.long + self.short

    def flops(self, rows: int, cols: int, *, is_complex: bool = False) -> int:
        """FLOPs on one matrix; a complex product is four real ones."""
        short, long = sorted((rows, cols))
        real = 2 * short * short * (self.long * long + self.short * short)
        return real * (4 if is_complex else 1)


def one_by_one(schedule: Schedule) -> Products:
    """The products of each step by itself."""
    return of_steps([(abc,) for abc in schedule])


def of_iteration(schedule: Schedule, rows: int, cols: int) -> Products:
    """The products of the iteration, as it is run on matrices of this shape."""
    return of_steps(at_once(schedule, rows, cols))


def of_steps(taken: Sequence[Schedule]) -> Products:
    """The products of steps that are taken together, any number at once."""
    squares = sum(has_square(abc) for steps in taken for abc in steps)
    return Products(2 * len(taken), squares + 3 * sum(len(steps) - 1 for steps in taken))


def at_once(schedule: Schedule, rows: int, cols: int) -> list[Schedule]:
    """The steps that are taken together, one or two, in their order.

    Two where they are cheaper, and their result is no worse rounded: see `STEEPEST`.
    """
    short, long = sorted((rows, cols))
    taken, start = [], 0
    while start < len(schedule):
        two = schedule[start : start + 2]
        steepness = math.prod(abs(a) for a, _, _ in two)
        together = 2 if 2 * long > 3 * short and steepness <= STEEPEST else 1
        taken.append(schedule[start : start + together])
        start += together
    return taken


def has_square(abc: Any) -> bool:
    """Whether a step needs ``A A``: not where its c is known, as the program is traced, to be 0."""
    return not (isinstance(abc[2], float) and abc[2] == 0)
