"""The pictures of docs/benchmarks.md, from the records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.model_shapes import TITLES
from benchmarks.orthogonalize.sides import PEERS
from benchmarks.orthogonalize.tables import NAMES
from benchmarks.step import TITLES as CASES
from benchmarks.step import newton_schulz_flops
from examples import colours

Rows = Sequence[Mapping[str, Any]]


def draw_all(records: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what there are records for, and returns the paths of the PNG files."""
    drawn = []
    if step := records.get("step"):
        drawn.append(draw_steps(folder / "step.png", step))
    if orthogonalize := records.get("orthogonalize"):
        drawn.append(draw_shapes(folder / "orthogonalize.png", orthogonalize))
    if accelerator := records.get("accelerator"):
        drawn.append(draw_accelerator(folder / "accelerator.png", accelerator))
    return drawn


def draw_steps(path: Path, record: Mapping[str, Any]) -> Path:
    """Whole steps, relative to Optax's."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    step_bars(axes, record["cases"])
    axes.set_title(_device(record))
    return _save(figure, path)


def draw_shapes(path: Path, record: Mapping[str, Any]) -> Path:
    """The speed at every shape, and the speed of plain products as lines."""
    rows = [row for row in record["rows"] if row["measured"]]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.62 * len(rows)), layout="constrained")
    shape_bars(axes, rows, record["matmul_peak_flops"])
    axes.set_title(_device(record))
    return _save(figure, path)


def draw_accelerator(path: Path, record: Mapping[str, Any]) -> Path:
    """Shapes beside whole steps and the training step."""
    rows = [row for row in record["shapes"] if row["measured"]]
    figure, panels = plt.subplot_mosaic(
        [["shapes", "steps"], ["shapes", "training"]],
        figsize=(14, 2 + 0.62 * max(6, len(rows))),
        layout="constrained",
    )
    shape_bars(panels["shapes"], rows, record.get("matmul_peak_flops") or {})
    step_bars(panels["steps"], record["cases"])
    training = record["training"]
    step_bars(panels["training"], {"training": training} if training else {})
    panels["training"].set_title("a training step")
    figure.suptitle(f"{_device(record)}, timed by {record['clock']}")
    return _save(figure, path)


def shape_bars(axes: Axes, rows: Rows, peaks: Mapping[str, float]) -> None:
    """GFLOP/s of each implementation at each shape: bars to the right, longer is better.

    As if all took five steps one by one: who reaches the same with fewer products is faster.
    """
    for place, row in enumerate(rows):
        steps = newton_schulz_flops({"": (row["rows"], row["cols"])})
        for i, peer in enumerate(PEERS):
            found = row["peers"].get(peer, {})
            if "matrix_s" in found:
                speed = steps / found["matrix_s"] / 1e9
                axes.barh(place + 0.27 * (i - 1), speed, 0.25, color=colours.OPTIMIZERS[peer])
    for peer in PEERS:
        axes.barh(0, 0, color=colours.OPTIMIZERS[peer], label=NAMES[peer])
    for (name, peak), style in zip(peaks.items(), ("--", ":"), strict=False):
        axes.axvline(peak / 1e9, color=colours.INK, linestyle=style, label=f"products in {name}")
    names = [f"{TITLES[row['model']]}, {row['rows']} x {row['cols']}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s, counted as five steps one by one")
    axes.grid(axis="x", alpha=0.3)
    # Below the axes: inside them it would lie on a bar, or on the line of a peak.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def step_bars(axes: Axes, cases: Mapping[str, Any]) -> None:
    """Seconds of each optimizer's step relative to Optax's: shorter is better."""
    for place, found in enumerate(cases.values()):
        for i, (peer, row) in enumerate(found["optimizers"].items()):
            if (ratio := row.get("step_s_to_optax")) is not None:
                axes.bar(place + 0.2 * (i - 1.5), ratio, 0.18, color=colours.OPTIMIZERS[peer])
                axes.annotate(
                    f"{ratio:.2f}", (place + 0.2 * (i - 1.5), ratio), ha="center", va="bottom"
                )
    for peer, name in NAMES.items():
        axes.bar(0, 0, color=colours.OPTIMIZERS[peer], label=name)
    axes.set_xticks(range(len(cases)), [CASES.get(case, case) for case in cases], fontsize=8)
    axes.margins(y=0.08)  # room for the numbers on the bars
    axes.set_ylabel("time of a step, Optax = 1")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def _device(record: Mapping[str, Any]) -> str:
    there = record["environment"]
    device = there["device"]
    name = f"{there['processor']}, {there['cpus']} cores" if device == "cpu: cpu" else device
    return f"{name}, jax {there['versions']['jax']}"


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
