"""Products and floating-point operations of an iteration on an m x n matrix, m <= n."""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.polar_error.gram import segments
from muon_jax._polynomials import Schedule


class Products(NamedTuple):
    """Matrix products: `long` ones have n columns, `square` ones are m x m throughout."""

    long: int
    square: int

    @property
    def all(self) -> int:
        """How many there are."""
        return self.long + self.square

    def flops(self, rows: int, cols: int) -> int:
        """``2 m^2 n`` for a long product, ``2 m^3`` for a square one."""
        return 2 * rows * rows * (self.long * cols + self.square * rows)


def plain(schedule: Schedule) -> Products:
    """``X X^T`` and ``P X`` in each step, ``A A`` where its c is not 0."""
    return Products(2 * len(schedule), _squares(schedule))


def gram(schedule: Schedule, restarts: Iterable[int]) -> Products:
    """The same on Gram matrices: two long products between restarts, three for each next step."""
    parts = list(segments(schedule, tuple(restarts)))
    return Products(
        2 * len(parts), _squares(schedule) + sum(3 * (len(steps) - 1) for steps in parts)
    )


def _squares(schedule: Schedule) -> int:
    return sum(c != 0 for _, _, c in schedule)
