"""The study's picture: right answers of every seed, by pre-training and fine-tuning."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt

from examples import colours
from examples.finetune.study.protocol import OPTIMIZERS, TUNERS
from examples.finetune.study.tables import NAMES, TITLES

_STYLES: dict[str, dict[str, Any]] = {
    "muon": {"color": colours.MUON, "marker": "o"},
    "adamw": {"color": colours.ADAMW, "marker": "s"},
}


def draw(path: Path, summary: dict[str, Any]) -> None:
    """Draws a panel for each tuner: a dot for each seed, a bar at their mean.

    Args:
        path: The PNG to write.
        summary: What `summarize` returned.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    for axes, tuner in zip(panels, TUNERS, strict=True):
        cells = summary[tuner]["cells"]
        for place, before in enumerate(OPTIMIZERS):
            for side, after in enumerate(OPTIMIZERS):
                values = [100 * x for x in cells[f"{before} -> {after}"]["exact"]]
                x = place + (side - 0.5) * 0.5
                label = f"fine-tuned with {NAMES[after]}" if place == 0 else None
                spread = [x + 0.02 * (i - (len(values) - 1) / 2) for i in range(len(values))]
                axes.scatter(spread, values, s=28, label=label, zorder=3, **_STYLES[after])
                mean = statistics.mean(values)
                axes.hlines(mean, x - 0.12, x + 0.12, color=_STYLES[after]["color"], linewidth=2)
                axes.annotate(
                    f"{mean:.1f}",
                    (x + 0.12, mean),
                    xytext=(2, -3),
                    textcoords="offset points",
                    fontsize=9,
                )
        names = [f"pre-trained with {NAMES[name]}" for name in OPTIMIZERS]
        axes.set_xticks(range(len(OPTIMIZERS)), names)
        axes.set_xlim(-0.6, 1.6)
        axes.set_title(TITLES[tuner][0].upper() + TITLES[tuner][1:])
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("right answers on the test questions (%)")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
