"""The picture of FLOPs against polar error, a panel for each aspect ratio."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from examples import colours


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of one dtype; a ring is a method whose steps are taken two at once."""
    aspects = sorted({row["aspect"] for row in rows})
    columns = min(2, len(aspects))
    lines = -(-len(aspects) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.2 * columns, 4.6 * lines), squeeze=False)
    for axis, aspect in zip(axes.flat, aspects, strict=False):
        _panel(axis, [row for row in rows if row["aspect"] == aspect])
        axis.set_title(f"{aspect}:1", fontsize=10, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("FLOPs of matrix products, five standard steps = 1")
    for line in axes:
        line[0].set_ylabel("polar error, mean of three spectra")
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=name)
        for name, colour in colours.PRECONDITIONINGS.items()
    ]
    handles += [
        Line2D(
            [],
            [],
            color=colours.INK,
            marker="o",
            mfc="none",
            linestyle="",
            label="two steps at once",
        ),
        Line2D([], [], color=colours.INK, linewidth=1, label="Pareto front"),
        Line2D([], [], color=colours.INK, marker="*", linestyle="", label="the default"),
    ]
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False)
    figure.suptitle(" ", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        colour = colours.PRECONDITIONINGS[row["preconditioning"]]
        face = "none" if row["by_twos"] else colour
        axis.plot(row["work"], row["error"], "o", color=colour, mfc=face, markersize=5, alpha=0.8)
        known = row["method"], row["preconditioning"]
        # What the library takes at this shape.
        if known == ("standard", "frobenius") and row["by_twos"] == (row["aspect"] > 3 / 2):
            axis.plot(row["work"], row["error"], "*", color=colours.INK, markersize=10)
    edge = sorted((row for row in rows if row["front"]), key=lambda row: row["flops"])
    axis.step(
        [row["work"] for row in edge],
        [row["error"] for row in edge],
        color=colours.INK,
        where="post",
        lw=0.8,
    )
    for row in edge:
        axis.annotate(
            row["method"],
            (row["work"], row["error"]),
            xytext=(-1, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=50,  # lines of neighbours do not meet
            fontsize=6.5,
        )
    axis.set_yscale("log")
    # What breaks, by up to 1e14, is outside: the table has it.
    axis.set_ylim(3e-4, 1)
    axis.margins(x=0.08)
    axis.grid(alpha=0.2, which="both")
