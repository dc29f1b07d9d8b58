"""Schedules of the least error for their products: `python -m benchmarks.polar_error.derive`.

A step with three coefficients is an odd quintic and costs three products (``X X^T``, ``A A``,
``P X``); one with c = 0 is an odd cubic and costs two. On ``[low, high]`` the odd polynomial that
comes closest to 1 is the one whose error has as many alternating extremes as it has coefficients,
and one more (Chebyshev). It maps the interval to ``[1 - error, 1 + error]``, on which the next step
is derived in turn: among all compositions of steps of these degrees none has a smaller largest
error (Polar Express, arXiv 2505.16932, Theorem 3.1). Which degrees, in which order, is left open by
that: here all that cost the budget are tried.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.harness import make_console
from examples.moonlight.common.command_line import CommandLine
from muon_jax._polynomials import Coefficients, Schedule, with_margin

PRODUCTS = {3: 2, 5: 3}
"""Matrix products of a step, by the degree of its polynomial."""


def value(abc: Sequence[float], s: Any) -> Any:
    """``a s + b s^3 + c s^5``."""
    a, b, c = abc
    square = np.square(s)
    return s * (a + square * (b + square * c))


def cubic(low: float, high: float) -> Coefficients:
    """The odd cubic closest to 1 on an interval: its error is largest at both ends and between."""
    # p(low) = p(high) fixes the ratio of the coefficients, the two sizes of error their scale.
    peak = np.sqrt((low * low + low * high + high * high) / 3)
    shape = (3 * peak * peak, -1.0, 0.0)
    scale = 2 / (value(shape, low) + value(shape, peak))
    return float(scale * shape[0]), float(scale * shape[1]), 0.0


def quintic(low: float, high: float) -> Coefficients:
    """The odd quintic closest to 1 on an interval, by Remez' exchange of its inner extremes."""
    # Where the interval is short, the equations are singular to rounding, and the limit is known.
    if 1 - low / high < 1e-4:
        middle = (low + high) / 2
        return 1.875 / middle, -1.25 / middle**3, 0.375 / middle**5
    inner = np.array([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high])
    a = b = c = 0.0
    for _ in range(200):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c = np.linalg.solve(system, np.ones(4))[:3]
        # The roots of p' = a + 3 b s^2 + 5 c s^4.
        middle, width = -0.3 * b / c, np.sqrt((0.3 * b / c) ** 2 - 0.2 * a / c)
        moved = np.sqrt([middle - width, middle + width])
        if np.allclose(moved, inner, rtol=1e-14, atol=0):
            break
        inner = moved
    return float(a), float(b), float(c)


CLOSEST = {3: cubic, 5: quintic}


def compose(degrees: Sequence[int], low: float) -> tuple[Schedule, float]:
    """The best steps of these degrees for singular values in ``[low, 1]``, and their error."""
    steps, interval = [], (low, 1.0)
    error = 1 - low
    for degree in degrees:
        steps.append(CLOSEST[degree](*interval))
        error = float(1 - value(steps[-1], interval[0]))
        interval = 1 - error, 1 + error
    return tuple(steps), error


def equioscillates(abc: Coefficients, low: float, high: float, tolerance: float = 1e-6) -> bool:
    """Whether a step's error alternates between its largest sizes, once more than it has terms.

    That is Chebyshev's condition for no other odd polynomial of the degree to be closer to 1.
    """
    a, b, c = abc
    roots = np.roots([5 * c, 3 * b, a] if c else [3 * b, a])
    inner = np.sqrt(np.sort(roots[np.isreal(roots)].real.clip(0)))
    inside = [s for s in inner if low < s < high]
    error = value(abc, np.array([low, *inside, high])) - 1
    signs = np.resize([-1, 1], len(error))
    largest = np.abs(error).max()
    terms = 3 if c else 2
    return len(error) == terms + 1 and bool(np.abs(error - largest * signs).max() < tolerance)


def sequences(products: int) -> Iterator[tuple[int, ...]]:
    """All orders of cubics and quintics that take so many products."""
    for steps in range(1, products // 2 + 1):
        for degrees in itertools.product(PRODUCTS, repeat=steps):
            if sum(PRODUCTS[degree] for degree in degrees) == products:
                yield degrees


def bound(products: int) -> float:
    """The smallest singular value that a budget is meant to lift: 1e-2 for 12, 3.2e-3 for 15."""
    return float(10 ** (-products / 6))


def best(products: int, low: float) -> tuple[tuple[int, ...], float]:
    """The degrees of the least error for a budget, and that error."""
    tried = ((compose(degrees, low)[1], degrees) for degrees in sequences(products))
    error, degrees = min(tried)
    return degrees, error


def schedule(products: int) -> Schedule:
    """The best steps for a budget, as they are run: with Polar Express' margin for rounding."""
    low = bound(products)
    steps, _ = compose(best(products, low)[0], low)
    return (*with_margin(steps), steps[-1])


@dataclasses.dataclass(frozen=True)
class Args:
    """Search the degrees of steps for each number of products, and print the coefficients.

    Attributes:
      products: the budgets.
      coefficients: whether they are printed, as the library holds them.
    """

    products: tuple[int, ...] = (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)
    coefficients: bool = False


def main(args: Args) -> dict[int, tuple[int, ...]]:
    """Print the best degrees for each budget beside the best of cubics and of quintics alone."""
    table = Table(title="largest error between the bound and 1", title_justify="left", box=None)
    for column in (
        "products",
        "bound",
        "degrees",
        "error",
        "cubics only",
        "worst order",
        "optimal",
    ):
        table.add_column(column, justify="right")
    found = {}
    for products in args.products:
        low = bound(products)
        degrees, error = best(products, low)
        found[products] = degrees
        steps, _ = compose(degrees, low)
        orders = [compose(order, low)[1] for order in set(itertools.permutations(degrees))]
        cubics = f"{compose((3,) * (products // 2), low)[1]:.4f}" if products % 2 == 0 else "-"
        interval, optimal = (low, 1.0), True
        for abc in steps:
            optimal &= equioscillates(abc, *interval)
            interval = value(abc, interval[0]), 2 - value(abc, interval[0])
        shown = " ".join(map(str, degrees))
        row = [str(products), f"{low:.4f}", shown, f"{error:.4f}", cubics, f"{max(orders):.4f}"]
        table.add_row(*row, "yes" if optimal else "NO")
        if args.coefficients:
            make_console().print(products, steps)
    make_console().print(table)
    return found


if __name__ == "__main__":
    CommandLine("benchmarks.polar_error.derive", Args, __doc__).run(main)
