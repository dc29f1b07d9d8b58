"""AdamW's learning rate and batch size, from a grid at each of a few sizes to a law for all.

At each size the losses over (rate, batch) form a bowl (Figure 5 of the paper). A quadratic in the
logarithms of both, fitted around the best cell, gives its bottom; where that is no bowl, or its
bottom lies outside of the grid, the best cell stands. Power laws of compute through the bottoms
give the values at every size, those of the grids included.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Cells this much above the best one say little about the shape of the bottom.
_NEAR = 0.08

# Two digits of a rate are more than a bowl can tell.
_DIGITS = 2


class Bowl(NamedTuple):
    """What a grid of one size says.

    Attributes:
        learning_rate: At the bottom.
        batch: At the bottom; not rounded.
        loss: There, by the quadratic, or of the best cell.
        fitted: Whether the quadratic is a bowl with its bottom inside the grid.
        at_edge: Whether the best cell is at an edge of the grid.
    """

    learning_rate: float
    batch: float
    loss: float
    fitted: bool
    at_edge: bool


class TunedLaw(NamedTuple):
    """Power laws of compute C = 6ND in FLOPs: rate = a C^b, batch = c C^d."""

    rate_factor: float
    rate_power: float
    batch_factor: float
    batch_power: float

    def learning_rate(self, compute: float) -> float:
        """The peak rate at this compute, in two significant digits."""
        return float(f"{self.rate_factor * compute**self.rate_power:.{_DIGITS}g}")

    def batch(self, compute: float) -> int:
        """Sequences per step at this compute: the nearest even number."""
        return max(2, 2 * round(self.batch_factor * compute**self.batch_power / 2))


def find_bottom(losses: Mapping[tuple[float, int], float]) -> Bowl:
    """The bottom of one size's grid.

    Args:
        losses: Final losses by (learning rate, batch); infinite where a run diverged.

    Raises:
        ValueError: No run of the grid has a finite loss.
    """
    finite = {cell: loss for cell, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("every run of the grid diverged: the rates are too high")
    best_cell = min(finite, key=finite.__getitem__)
    best = finite[best_cell]
    rates, batches = (sorted(set(axis)) for axis in zip(*losses, strict=True))
    at_edge = best_cell[0] in (rates[0], rates[-1]) or best_cell[1] in (batches[0], batches[-1])
    near = {cell: loss for cell, loss in finite.items() if loss <= best + _NEAR}
    bottom = _quadratic_bottom(near)
    if bottom is not None:
        rate, batch, loss = bottom
        if rates[0] <= rate <= rates[-1] and batches[0] <= batch <= batches[-1]:
            return Bowl(rate, batch, loss, fitted=True, at_edge=at_edge)
    return Bowl(best_cell[0], float(best_cell[1]), best, fitted=False, at_edge=at_edge)


def fit_law(bowls: Mapping[float, Bowl]) -> TunedLaw:
    """Power laws through the bottoms, by least squares in the logarithms.

    Args:
        bowls: The bowls by compute, in FLOPs. A single one gives constants.
    """
    compute = np.log(np.array(list(bowls)))
    lines = []
    for values in ([b.learning_rate for b in bowls.values()], [b.batch for b in bowls.values()]):
        if len(bowls) == 1:
            lines.append((math.log(values[0]), 0.0))
            continue
        power, constant = np.polyfit(compute, np.log(values), 1)
        lines.append((float(constant), float(power)))
    (rate, rate_power), (batch, batch_power) = lines
    return TunedLaw(math.exp(rate), rate_power, math.exp(batch), batch_power)


def _quadratic_bottom(
    losses: Mapping[tuple[float, int], float],
) -> tuple[float, float, float] | None:
    """Rate, batch and loss at the minimum of a fitted quadratic, or None if it has none."""
    x, y = (np.log2(np.array(axis, float)) for axis in zip(*losses, strict=True))
    z = np.array(list(losses.values()))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    if len(z) <= terms.shape[1] or np.linalg.matrix_rank(terms) < terms.shape[1]:
        return None
    _, bx, by, cxx, cxy, cyy = coefficients = np.linalg.lstsq(terms, z)[0]
    hessian = np.array([[2 * cxx, cxy], [cxy, 2 * cyy]])
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    u, v = np.linalg.solve(hessian, [-bx, -by])
    loss = float(coefficients @ [1, u, v, u * u, u * v, v * v])
    return float(2**u), float(2**v), loss
