"""Loss curves: of one run, and of optimizers against each other. And the plan of a run."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from examples import colours
from examples.moonlight.run_folder.metrics import SMOOTHING
from examples.moonlight.schedule.plan import Plan

Curve = tuple[Sequence[int], Sequence[float]]


def draw_losses(path: Path, *, train: Curve, validation: Curve, title: str) -> None:
    """Draws training and validation loss over optimizer steps into a PNG.

    Line styles, markers and labels at the curves carry the meaning; colour only repeats it.

    Args:
        path: The PNG to write.
        train: Steps and losses, in nats per token, one per step.
        validation: Steps and losses, likewise, where the held-out text was evaluated; empty, if
            nothing was held out.
        title: What was trained, and how.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    steps, losses = (np.asarray(values) for values in train)
    window = min(len(losses), SMOOTHING)
    mean = _smooth(losses, window)
    few = {"marker": ".", "markersize": 8} if len(losses) < 2 * SMOOTHING else {}
    if window == SMOOTHING:
        axes.plot(steps, losses, color=colours.FAINT, linewidth=0.8, label="training, each step")
        label = f"training, mean of {window} steps: {mean[-1]:.4f}"
        axes.plot(steps[window - 1 :], mean, color=colours.TRAINING, linewidth=1.8, label=label)
    else:
        label = f"training, each step; mean of {window}: {mean[-1]:.4f}"
        axes.plot(steps, losses, color=colours.TRAINING, label=label, **few)
    highest = losses
    if validation[0]:
        axes.plot(
            *validation,
            color=colours.VALIDATION,
            linestyle="--",
            marker="o",
            markersize=5,
            label=f"validation, held-out text: {validation[1][-1]:.4f}",
        )
        highest = np.append(losses, validation[1])
    # The first steps fall from log(vocabulary); the rest of the curve is what one looks at.
    least, most = highest.min(), min(highest.max(), np.quantile(highest, 0.75) + 2.5)
    room = 0.05 * (most - least) or 0.5
    axes.set_ylim(least - room, most + room)
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_plan(path: Path, plan: Plan, *, title: str) -> None:
    """Draws learning rate, batch size and bias rate of a plan over its tokens into a PNG.

    Args:
        path: The PNG to write.
        plan: What to draw.
        title: Whose plan it is.
    """
    total = plan.tokens(plan.steps)
    unit, size = next(((u, s) for u, s in _UNITS if total >= s), ("", 1))
    figure, rows = plt.subplots(
        3, 1, figsize=(8, 6.4), sharex=True, height_ratios=(3, 1.4, 1.4), layout="constrained"
    )
    # Enough points for a curve; a segment's last step, not the next one's first.
    places = [
        np.unique(np.linspace(start, end - 1, 200).astype(int))
        for start, end in itertools.pairwise(plan.starts)
    ]
    ends = np.cumsum([len(steps) for steps in places])
    drawn_rates = np.split(plan.rates(np.concatenate(places)), ends[:-1])
    tokens, rates, batches, bias_rates = [], [], [], []
    for segment, start, steps, drawn in zip(
        plan.segments, plan.starts, places, drawn_rates, strict=False
    ):
        first, each = plan.tokens(start), segment.batch * plan.sequence_length
        tokens += [first / size, *((first + (steps - start + 0.5) * each) / size)]
        tokens += [(first + segment.steps * each) / size]
        rates += [drawn[0], *drawn, drawn[-1]]
        batches += [segment.batch] * (len(steps) + 2)
        bias_rates += [segment.bias_rate] * (len(steps) + 2)
    for axes, values, label in zip(
        rows, (rates, batches, bias_rates), ("learning rate", "sequences", "bias rate"), strict=True
    ):
        axes.plot(tokens, values, color=colours.INK, linewidth=1.8)
        axes.set_ylim(0, 1.15 * max(*values, 1e-12))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        for end in plan.stage_ends().values():
            axes.axvline(plan.tokens(end) / size, color=colours.INK, linestyle=":", linewidth=1)
    rows[1].set_ylabel("sequences\nper step")
    starts = [0, *plan.stage_ends().values()]
    for start, end, (name, _) in zip(starts, starts[1:], plan.stage_ends().items(), strict=False):
        low, high = plan.tokens(start) / total, plan.tokens(end) / total
        # A stage too narrow for its name has it to the right of its end.
        narrow = high - low < 0.1
        rows[0].annotate(
            name,
            (high if narrow else (low + high) / 2, 1),
            xycoords=("axes fraction", "axes fraction"),
            xytext=(3 if narrow and high < 0.9 else 0, 3),
            textcoords="offset points",
            ha="left" if narrow and high < 0.9 else "right" if narrow else "center",
        )
    rows[0].set_xlim(0, total / size)
    rows[-1].set_xlabel(f"tokens{f' ({unit})' if unit else ''}")
    rows[0].set_title(f"{title}: {plan.steps:,} steps", pad=18)
    figure.savefig(path, dpi=120)
    plt.close(figure)


_UNITS = (("trillions", 10**12), ("billions", 10**9), ("millions", 10**6), ("thousands", 10**3))


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` values; the first `window - 1` have none."""
    return np.convolve(values, np.ones(window) / window, mode="valid")
