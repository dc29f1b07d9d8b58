"""Loss curves: of one run, and of optimizers against each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
import numpy as np

Curve = tuple[Sequence[int], Sequence[float]]

# Steps in a running mean: single steps differ by more than what the curves are to show.
SMOOTHING = 25

# Told apart without colour, too.
_STYLES = (("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", ":"))


def draw_losses(path: Path, *, train: Curve, validation: Curve, title: str) -> None:
    """Draws training and validation loss over optimizer steps into a PNG.

    Line styles, markers and labels at the curves carry the meaning; colour only repeats it.

    Args:
        path: The PNG to write.
        train: Steps and losses, in nats per token, one per step.
        validation: The same, where the held-out text was evaluated.
        title: What was trained, and how.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    steps, losses = (np.asarray(values) for values in train)
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each step")
    window = min(len(losses), SMOOTHING)
    axes.plot(
        steps[window - 1 :],
        _smooth(losses, window),
        color="tab:blue",
        linewidth=1.8,
        label=f"training, mean of {window} steps",
    )
    axes.plot(
        *validation,
        color="black",
        linestyle="--",
        marker="o",
        markersize=5,
        label="validation, held-out text",
    )
    axes.annotate(
        f"{validation[1][-1]:.3f}",
        (validation[0][-1], validation[1][-1]),
        xytext=(-4, -16),
        textcoords="offset points",
        ha="right",
    )
    # The first steps fall from log(vocabulary); the rest of the curve is what one looks at.
    axes.set_ylim(top=min(losses.max(), np.quantile(losses, 0.75) + 2.5))
    axes.set_xlim(0, steps[-1] * 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_comparison(path: Path, curves: Mapping[str, Sequence[Curve]], *, title: str) -> None:
    """Draws the smoothed training losses of several runs per optimizer: their mean and their range.

    Args:
        path: The PNG to write.
        curves: Steps and losses, in nats per token, of every run of an optimizer; at most three
            optimizers, and the same steps everywhere.
        title: What was compared.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    means = {}
    all_steps = np.asarray(next(iter(curves.values()))[0][0])
    window = max(1, min(len(all_steps) // 4, SMOOTHING))
    steps = all_steps[window - 1 :]
    for (name, runs), (color, line) in zip(curves.items(), _STYLES, strict=False):
        smoothed = np.stack([_smooth(np.asarray(losses), window) for _, losses in runs])
        means[name] = smoothed.mean(axis=0)
        label = f"{name}: mean and range of {len(runs)} runs"
        axes.plot(steps, means[name], color=color, linestyle=line, linewidth=1.8, label=label)
        axes.fill_between(
            steps, smoothed.min(axis=0), smoothed.max(axis=0), color=color, alpha=0.25, linewidth=0
        )
    ends = sorted((float(mean[-1]), name) for name, mean in means.items())
    for place, (loss, name) in enumerate(ends):
        axes.annotate(
            f"{name} {loss:.3f}",
            (steps[-1], loss),
            # The lower label a little down, the upper a little up: close ends do not collide.
            xytext=(6, -9 if place == 0 else 1),
            textcoords="offset points",
        )
    axes.set_xlim(steps[0], steps[-1] + max(1, 0.18 * (steps[-1] - steps[0])))
    lowest, highest = ends[0][0], max(mean.max() for mean in means.values())
    axes.set_ylim(lowest - 0.3, min(highest, lowest + 3))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss, mean of {window} steps (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` values; the first `window - 1` have none."""
    return np.convolve(values, np.ones(window) / window, mode="valid")
