"""The pictures of docs/debugging.md, and its table, from the records of the runs."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.sick_runs.cases import CASES, Case
from benchmarks.sick_runs.train import Record
from examples.colours import HEALTHY, SICK

_TITLES = {
    "loss": "loss, nats per character",
    "update_rms": "update RMS / learning rate,\nMuon's matrices",
    "adam_rms": "update RMS / learning rate,\nAdamW's leaves",
    "embed_update": "update RMS / learning rate,\nthe embedding",
    "weight_rms": "weight RMS of the matrices",
    "max_logit": "largest attention logit",
    "orthogonality": "orthogonality error\nof each layer's updates",
    "entropy": "SVD entropy\nof each layer's weights",
    "arrived": "RMS by which weights moved /\nRMS of the update",
    "unseen": "weight RMS of\nrows that no text uses",
}
_LOGARITHMIC = {"max_logit"}
_FROM_ZERO = {"update_rms", "adam_rms", "embed_update", "weight_rms", "arrived", "orthogonality"}


def draw(folder: Path, records: Mapping[str, Record], every: int) -> list[Path]:
    """Draws each run into a folder, the healthy one in grey behind the sick.

    Args:
      folder: where the PNGs go.
      records: the records of some of the `CASES`.
      every: the number of steps of a record.

    Returns:
      The pictures' paths.
    """
    drawn = []
    for name, case in CASES.items():
        if case.shows and name in records:
            drawn.append(folder / f"run_{name}.png")
            _draw(drawn[-1], name, case, records, every)
    return drawn


def _draw(path: Path, name: str, case: Case, records: Mapping[str, Record], every: int) -> None:
    shown = ("loss", *case.shows)
    rows = -(-len(shown) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(12, 2.75 * rows), layout="constrained")
    healthy = name == case.beside
    for axis, diagnostic in zip(axes.flat, shown, strict=True):
        ours, beside = (np.asarray(records[n][diagnostic]) for n in (name, case.beside))
        steps = every * np.arange(1, len(ours) + 1)
        label = CASES[case.beside].title
        axis.plot(steps, beside, color=HEALTHY, linewidth=3 if not healthy else 1.6, label=label)
        if not healthy:
            axis.plot(steps, ours, color=SICK, linewidth=1.6, label=case.title)
        _frame(axis, diagnostic)
    for axis in axes.flat[-4:]:
        axis.set_xlabel("step", fontsize=9)
    if not healthy:
        handles = axes.flat[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _frame(axis: Axes, diagnostic: str) -> None:
    axis.set_title(_TITLES[diagnostic], fontsize=10)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    if diagnostic in _LOGARITHMIC:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(axis) < 1.5 else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    if diagnostic in _FROM_ZERO:
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])


def _decades(axis: Axes) -> float:
    low, high = axis.get_ylim()
    return np.log10(high / low)


_COLUMNS = {
    "loss": "loss",
    "update_rms": "update RMS, Muon",
    "adam_rms": "update RMS, AdamW",
    "weight_rms": "weight RMS",
    "max_logit": "largest logit",
    "orthogonality": "orthogonality error",
    "arrived": "arrived",
}


def table(records: Mapping[str, Record]) -> str:
    """The table of the page: means over the last tenth of each run."""
    lines = [f"| run | {' | '.join(_COLUMNS.values())} |", f"|---|{'---|' * len(_COLUMNS)}"]
    for name, case in CASES.items():
        tail = max(1, len(records[name]["loss"]) // 10)
        values = [np.mean(records[name][column][-tail:]) for column in _COLUMNS]
        title = f"{case.title}, rate {case.rate:g}"
        lines.append(f"| {title} | {' | '.join(f'{value:.3g}' for value in values)} |")
    return "\n".join(lines)
