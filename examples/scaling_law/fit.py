"""Scaling laws by robust least squares, and the compute that one optimizer needs of another's.

    L(C) = a C^-b            as the paper's Table 3
    L(C) = E + a C^-b        with an irreducible loss E, which few data can tell from 0

The compute ratio at equal loss is `C_muon / C_adamw`, both at the loss that AdamW's law has at some
compute: below 1, Muon needs less. Uncertainty is that of seeds, by bootstrap.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm, t

INTERVAL = 0.90
RESAMPLES = 500

# Residuals in the logarithm of the loss beyond this count linearly: a few times the seeds' spread.
_OUTLIER = 0.01


class Law(NamedTuple):
    """`irreducible + factor * compute^-power`, in nats; compute in the unit of the fit."""

    factor: float
    power: float
    irreducible: float = 0.0

    def loss(self, compute: Any) -> Any:
        """The loss at a compute."""
        return self.irreducible + self.factor * np.asarray(compute) ** -self.power

    def compute(self, loss: float) -> float:
        """The compute at a loss; infinite where the law does not come down to it."""
        if loss <= self.irreducible or self.power <= 0:
            return math.inf
        with np.errstate(over="ignore"):
            return float(np.float64(self.factor / (loss - self.irreducible)) ** (1 / self.power))


def fit_power_law(compute: Sequence[float], loss: Sequence[float]) -> Law:
    """Fits `a C^-b` to the logarithms, with a loss that outliers do not rule (soft L1).

    Raises:
        ValueError: There are fewer than two different computes, or values that are not positive.
    """
    x, y = _logs(compute, loss, least=2)
    middle = x.mean()  # Else factor and power are nearly one parameter.

    def residuals(p: np.ndarray) -> np.ndarray:
        return p[0] - p[1] * (x - middle) - y

    def jacobian(_: np.ndarray) -> np.ndarray:
        return np.stack([np.ones_like(x), middle - x], axis=1)

    p = _solve(residuals, jacobian, [y.mean(), 0.1])
    return Law(math.exp(p[0] + p[1] * middle), float(p[1]))


def fit_with_irreducible(compute: Sequence[float], loss: Sequence[float]) -> Law:
    """Fits `E + a C^-b`, E >= 0, in the same way.

    Raises:
        ValueError: There are fewer than three different computes, or values that are not positive.
    """
    x, y = _logs(compute, loss, least=3)
    middle, lowest = x.mean(), float(np.exp(y.min()))

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(p[0] + np.exp(p[1] - p[2] * (x - middle))) - y

    def jacobian(p: np.ndarray) -> np.ndarray:
        falling = np.exp(p[1] - p[2] * (x - middle))
        slopes = np.stack([np.ones_like(x), falling, (middle - x) * falling], axis=1)
        return slopes / (p[0] + falling)[:, None]

    def start(irreducible: float) -> list[float]:
        rest = math.exp(y.mean()) - irreducible
        return [irreducible, math.log(rest), 0.1 * math.exp(y.mean()) / rest]

    # From several sides: the valley between E and b is long and flat.
    starts = [start(share * lowest) for share in (0.0, 0.6)]
    bounds = ([0, -np.inf, 1e-4], [lowest, np.inf, np.inf])
    solutions = [_solve(residuals, jacobian, s, bounds) for s in starts]
    p = min(solutions, key=lambda p: float(np.sum(_soft_l1(residuals(p)))))
    return Law(math.exp(p[1] + p[2] * middle), float(p[2]), float(p[0]))


def aicc(law: Law, compute: Sequence[float], loss: Sequence[float]) -> float:
    """Akaike's criterion with the correction for few points; lower is better supported.

    Seeds count as points, which flatters the law with more parameters. Infinite where there are
    too few points for the law's parameters.
    """
    n, parameters = len(loss), 3 + (law.irreducible > 0)  # the noise is one
    if n <= parameters + 1:
        return math.inf
    squares = float(np.sum(np.square(np.log(law.loss(compute)) - np.log(loss))))
    correction = 2 * parameters * (parameters + 1) / (n - parameters - 1)
    fit = n * math.log(squares / n) if squares > 0 else -math.inf
    return fit + 2 * parameters + correction


def compute_ratio(muon: Law, adamw: Law, compute: float) -> float:
    """Muon's share of AdamW's compute at the loss that AdamW's law has at `compute`."""
    return muon.compute(float(adamw.loss(compute))) / compute


class DirectRatio(NamedTuple):
    """The share of tokens on which Muon reaches AdamW's loss, from runs of several lengths.

    Attributes:
        ratio: The ratio between two lengths whose losses enclose AdamW's, both axes logarithmic.
        inside: Whether there are such; else it is on the line through all of them.
    """

    ratio: float
    inside: bool


def direct_ratio(muon: Mapping[float, float], adamw: float) -> DirectRatio:
    """Where Muon's losses over the fraction of tokens meet AdamW's loss with all of them.

    Infinite where Muon's losses do not fall with the tokens.

    Args:
        muon: Mean loss by fraction of AdamW's tokens, each run with its own schedule.
        adamw: Mean loss with all tokens.

    Raises:
        ValueError: There are fewer than two fractions.
    """
    if len(muon) < 2:
        raise ValueError(f"runs of at least two lengths are needed, got {len(muon)}")
    points = sorted(muon.items())
    for (short, high), (long, low) in itertools.pairwise(points):
        if high >= adamw >= low and high > low:
            share = math.log(high / adamw) / math.log(high / low)
            return DirectRatio(short * (long / short) ** share, True)
    return DirectRatio(fit_power_law(*zip(*points, strict=True)).compute(adamw), False)


# --------------------------------------------------------------------------------------------------
# Seeds
# --------------------------------------------------------------------------------------------------

# Losses `[seeds]` of every cell: a size, an optimizer, a length.
Losses = Mapping[Any, np.ndarray]


class Interval(NamedTuple):
    """An estimate, and the interval that holds `INTERVAL` of its resamples."""

    value: float
    low: float
    high: float


def bootstrap(
    losses: Losses,
    statistic: Callable[[Mapping[Any, np.ndarray]], Mapping[str, float]],
    *,
    group: Callable[[Any], Any],
    groups: Callable[[str], int] = lambda name: 1,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Resamples the seeds and looks at how far the statistics move.

    Cells of one group drew the same initial weights and data, seed by seed, and are resampled
    together. n seeds look closer together than they are: deviations from a cell's mean are widened
    by sqrt(n / (n - 1)), and those of the resamples by what Student's distribution is wider than
    the normal one, with n - 1 degrees of freedom from each group. Without that, "90%" of three
    seeds hold 72%. What tuning missed, and what no law describes, is not in the interval.

    Args:
        losses: Losses of every cell, seed by seed.
        statistic: A function from such losses to numbers by name.
        group: A function from a cell to what its seeds are drawn with.
        groups: The number of groups that each named number is made of.
        seed: The seed of the resampling.
        resamples: How many.

    Returns:
        Of each number its value on all seeds, and the interval.

    Raises:
        ValueError: Cells of one group have different numbers of seeds, or a cell has only one.
    """
    counts: dict[Any, int] = {}
    for cell, values in losses.items():
        if counts.setdefault(group(cell), len(values)) != len(values):
            raise ValueError(f"{cell}: {len(values)} seeds, and {counts[group(cell)]} beside it")
        if len(values) < 2:
            raise ValueError(f"{cell}: one seed does not tell how far seeds are apart")
    point = statistic(losses)
    rng = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in point}
    for _ in range(resamples):
        picked = {name: rng.integers(count, size=count) for name, count in counts.items()}
        resampled = {}
        for cell, values in losses.items():
            mean, n = values.mean(), len(values)
            widened = mean + (values - mean) * math.sqrt(n / (n - 1))
            resampled[cell] = widened[picked[group(cell)]]
        for name, value in statistic(resampled).items():
            samples[name].append(value)
    tail = (1 - INTERVAL) / 2
    fewest = min(counts.values())

    def interval(name: str) -> Interval:
        freedom = groups(name) * (fewest - 1)
        widening = t.ppf(1 - tail, freedom) / norm.ppf(1 - tail)
        # Not np.quantile, which interpolates between infinities.
        ordered = np.sort(samples[name])
        ends = ordered[np.rint(np.array([tail, 1 - tail]) * (len(ordered) - 1)).astype(int)]
        if not np.isfinite(point[name]):
            return Interval(float(point[name]), float(ends[0]), float(ends[1]))
        low, high = point[name] + widening * (ends - point[name])
        return Interval(float(point[name]), float(low), float(high))

    return {name: interval(name) for name in samples}


def _logs(
    compute: Sequence[float], loss: Sequence[float], *, least: int
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(compute, float), np.asarray(loss, float)
    if len(np.unique(x)) < least:
        raise ValueError(f"this law needs {least} different computes, got {len(np.unique(x))}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError("compute and loss must be positive and finite")
    return np.log(x), np.log(y)


def _soft_l1(residual: np.ndarray) -> np.ndarray:
    """What `least_squares` sums up."""
    return 2 * (np.sqrt(1 + np.square(residual / _OUTLIER)) - 1)


def _solve(
    residuals: Any, jacobian: Any, start: Sequence[float], bounds: Any = (-np.inf, np.inf)
) -> np.ndarray:
    low, high = (np.broadcast_to(bound, len(start)) for bound in bounds)
    inside = np.clip(start, low + 1e-9, high - 1e-9)
    return least_squares(
        residuals,
        inside,
        jacobian,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=_OUTLIER,
        x_scale="jac",
    ).x
