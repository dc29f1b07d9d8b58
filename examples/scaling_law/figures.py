"""The study's pictures, from its summaries alone.

Line styles, markers and labels carry the meaning; colour only repeats it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from examples import colours
from examples.scaling_law.fit import INTERVAL, Law

Summary = Mapping[str, Any]

# The paper's claim. Its own laws (Table 3) give 0.44 to 0.49 over the sizes of its Table 2.
PAPER_RATIO = 0.52

_STYLES: Mapping[str, dict[str, Any]] = {
    "adamw": {
        "color": colours.ADAMW,
        "linestyle": "--",
        "marker": "s",
        "markerfacecolor": "white",
    },
    "muon": {"color": colours.MUON, "linestyle": "-", "marker": "o"},
}
_NAMES = {"adamw": "AdamW", "muon": "Muon"}
_LINES = ("-", "--", "-.", ":", (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P")


# --------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------


def draw_scaling(path: Path, summary: Summary) -> None:
    """Loss against compute with both power laws, every seed, and Muon's shorter runs (Figure 1a).

    Args:
        path: The PNG to write.
        summary: What `summarize` returned.
    """
    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    sizes = list(summary["sizes"].values())
    reach = [size["compute"] for size in sizes]
    fractions = [float(f) for f in sizes[0]["muon"]]
    line = np.geomspace(min(reach) * min(fractions) * 0.9, max(reach) * 1.3, 100)
    for optimizer, style in _STYLES.items():
        label = _NAMES[optimizer]
        if "power" in summary["laws"]:
            law = _law(summary["laws"]["power"][optimizer])
            label += f": {law.factor:.3g} C$^{{-{law.power:.3f}}}$"
            axes.plot(line, law.loss(line), color=style["color"], linestyle=style["linestyle"])
        points = [
            (size["compute"], loss)
            for size in sizes
            for loss in (size["adamw"] if optimizer == "adamw" else size["muon"]["1"])
        ]
        _plot(axes, points, label=label, **style | {"linestyle": "none"})
    shorter = [
        (size["compute"] * size["shares"][f], np.mean(losses))
        for size in sizes
        for f, losses in size["muon"].items()
        if f != "1"
    ]
    _plot(
        axes,
        shorter,
        linestyle="none",
        marker="x",
        color=colours.INK,
        label="Muon on fewer tokens, own schedule",
    )
    for size in sizes:
        ratio = size["direct"]["value"]
        if ratio is None:
            continue
        loss = float(np.mean(size["adamw"]))
        axes.annotate(
            "",
            (size["compute"] * ratio, loss),
            (size["compute"], loss),
            arrowprops={"arrowstyle": "->", "color": colours.INK},
        )
        axes.annotate(
            f"{ratio:.2f}",
            (size["compute"] * ratio**0.5, loss),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    step = 0.2 if high - low > 0.5 else 0.1
    ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    _plain_ticks(axes.yaxis)
    axes.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.set_xlabel("compute C = 6ND (PFLOP/s-days)")
    axes.set_ylabel("validation loss (nats per byte)")
    names = [_millions(size["parameters"]) for size in sizes]
    axes.set_title(
        f"{' to '.join(dict.fromkeys((names[0], names[-1])))} parameters, "
        f"{len(summary['seeds'])} seeds\narrows: Muon's share of the compute at equal loss"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper right")
    _save(figure, path)


def draw_ratios(path: Path, summary: Summary) -> None:
    """The compute ratio at equal loss by size, by each way of finding it, with its interval."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    names = [_millions(size["parameters"]) for size in summary["sizes"].values()]
    ways = {"shorter runs of Muon": [size["direct"] for size in summary["sizes"].values()]}
    titles = {"power": "power laws", "irreducible": "laws with an irreducible loss"}
    for law, title in titles.items():
        if law in summary["laws"]:
            ways[title] = list(summary["laws"][law]["ratio"].values())
    for i, (label, intervals) in enumerate(ways.items()):
        x = np.arange(len(names)) + (i - (len(ways) - 1) / 2) * 0.15
        # None stands for infinity, at a loss that Muon does not reach: no point, or an open end.
        values, low, high = (
            np.array([none if interval[end] is None else interval[end] for interval in intervals])
            for end, none in (("value", np.nan), ("low", 0.0), ("high", 10.0))
        )
        axes.errorbar(
            x,
            values,
            yerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)],
            linestyle="none",
            marker=_MARKERS[i],
            color=colours.INK,
            markerfacecolor="white" if i else colours.INK,
            capsize=4,
            label=label,
        )
    axes.axhline(PAPER_RATIO, color=colours.INK, linestyle=":", label=f"the paper, {PAPER_RATIO}")
    axes.axhline(1, color=colours.FAINT, linewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("parameters without embedding and head")
    axes.set_ylabel("Muon's share of AdamW's compute")
    highs = (interval["high"] for intervals in ways.values() for interval in intervals)
    tallest = max((high for high in highs if high is not None), default=1.0)
    axes.set_ylim(0, min(1.6, max(1.1, 1.05 * tallest)))
    axes.set_title(f"Compute at equal loss, with {INTERVAL:.0%} intervals over seeds")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="lower left")
    _save(figure, path)


def draw_bowls(path: Path, summary: Summary) -> None:
    """AdamW's loss over learning rate and batch size at every tuned size (Figure 5)."""
    grids = summary["tuned"]["grids"]
    figure, row = plt.subplots(
        1, len(grids), figsize=(4.4 * len(grids), 4.8), layout="constrained", squeeze=False
    )
    for axes, (size, cells) in zip(row[0], grids.items(), strict=True):
        bowl = summary["tuned"]["bowls"][size]
        batches = sorted({batch for _, batch, _ in cells})
        shades = plt.get_cmap(colours.ORDERED)(np.linspace(0, colours.LIGHTEST, len(batches)))
        for i, batch in enumerate(batches):
            line = sorted((r, loss) for r, b, loss in cells if b == batch and loss is not None)
            _plot(
                axes,
                line,
                label=f"batch {batch}",
                marker=_MARKERS[i],
                linestyle=_LINES[i],
                color=shades[i],
            )
        what = "bottom" if bowl["fitted"] else "best cell"
        axes.plot(
            bowl["learning_rate"],
            bowl["loss"],
            "*k",
            markersize=14,
            label=f"{what}: {bowl['learning_rate']:.2g}, {bowl['batch']:.1f}",
        )
        losses = [loss for _, _, loss in cells if loss is not None]
        axes.set_ylim(min(losses) - 0.02, min(max(losses), min(losses) + 0.45))
        axes.set_xscale("log")
        rates = sorted({rate for rate, _, _ in cells})
        _plain_ticks(axes.xaxis)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xlabel("peak learning rate")
        axes.set_title(f"{size} layers")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
    row[0][0].set_ylabel("AdamW's loss on the tuning files (nats per byte)")
    _save(figure, path)


# --------------------------------------------------------------------------------------------------
# Ablations
# --------------------------------------------------------------------------------------------------


def draw_ablations(path: Path, ablations: Mapping[str, Summary]) -> None:
    """Losses of the ablations that compare one number, a panel each."""
    figure, panels = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    _draw_rates(panels[0, 0], ablations["learning_rate"])
    _draw_batches(panels[0, 1], ablations["batch"])
    _draw_update_rms(panels[0, 2], ablations["update_rms"])
    for axes, name, title in zip(
        panels[1],
        ("newton_schulz", "scales", "routing"),
        ("Newton-Schulz schedule", "update scale, two-layer MLP", "leaves given to Muon"),
        strict=True,
    ):
        _draw_bars(axes, ablations[name], title)
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss (nats per byte)")
    panels[1, 0].set_ylabel("")
    _save(figure, path)


def draw_entropy(path: Path, ablation: Summary) -> None:
    """SVD entropy over training, by group, dense and with experts, of seed 0 (Figure 4)."""
    settings = ablation["settings"]
    families = {"dense": "dense", "moe": "with experts"}
    figure, rows = plt.subplots(2, 6, figsize=(15, 5.6), layout="constrained", sharey=True)
    for row, (family, family_name) in zip(rows, families.items(), strict=True):
        groups = list(settings[f"muon, {family}"]["svd_entropy"])
        for axes in row[len(groups) :]:
            axes.set_visible(False)
        for axes, group in zip(row, groups, strict=False):
            for optimizer, style in _STYLES.items():
                points = settings[f"{optimizer}, {family}"]["watched"]
                axes.plot(
                    [point["tokens"] / 1e6 for point in points],
                    [point["svd_entropy"][group] for point in points],
                    label=_NAMES[optimizer],
                    markersize=3,
                    **style,
                )
            axes.set_title(group, fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"SVD entropy, {family_name}")
    for axes in rows.flat:
        axes.set_xlabel("tokens (millions)")
    # Where the dense model has no groups to draw.
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", fontsize=12, bbox_to_anchor=(0.98, 0.95))
    _save(figure, path)


def draw_weight_decay(path: Path, ablation: Summary) -> None:
    """Loss, weight RMS and output RMS over an over-trained run, with and without decay (Figure 2).

    RMS are of the MLP's last matrix and of what the last layer's MLP adds to the stream, of seed 0.
    """
    figure, row = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for i, (name, setting) in enumerate(ablation["settings"].items()):
        points = setting["watched"]
        tokens = [point["tokens"] / 1e6 for point in points]
        values = (
            [np.nan if point["val_loss"] is None else point["val_loss"] for point in points],
            [point["weight_rms"]["mlp/down_proj"] for point in points],
            [point["mlp_rms"][-1] for point in points],
        )
        for axes, value in zip(row, values, strict=True):
            axes.plot(
                tokens,
                value,
                label=name.replace("adamw", "AdamW").replace("muon", "Muon"),
                color=(color := colours.OPTIMIZERS[name.split(",")[0]]),
                linestyle=_LINES[i],
                marker=_MARKERS[i],
                markersize=4,
                markerfacecolor="white" if i % 2 else color,
            )
    titles = ("validation loss (nats per byte)", "RMS of down_proj", "RMS of the last MLP's output")
    for axes, title in zip(row, titles, strict=True):
        axes.set_title(title)
        axes.set_xlabel("tokens (millions)")
        axes.grid(alpha=0.3)
    points = [p for setting in ablation["settings"].values() for p in setting["watched"][1:]]
    losses = [point["val_loss"] for point in points if point["val_loss"] is not None]
    row[0].set_ylim(min(losses) - 0.02, min(losses) + 0.5 * (max(losses) - min(losses)))
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="optimizer,\nweight decay")
    _save(figure, path)


def _draw_rates(axes: Axes, ablation: Summary) -> None:
    for optimizer, style in _STYLES.items():
        _draw_line(axes, _of(ablation, optimizer, "learning_rate"), _NAMES[optimizer], style)
    axes.axvline(
        ablation["settings"]["adamw x1"]["learning_rate"],
        color=colours.INK,
        linestyle=":",
        linewidth=1,
    )
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate (dotted: AdamW's tuned)")
    axes.set_title("learning rate")
    axes.legend(loc="upper center")
    axes.grid(alpha=0.3)


def _draw_batches(axes: Axes, ablation: Summary) -> None:
    for optimizer, style in _STYLES.items():
        _draw_line(axes, _of(ablation, optimizer, "batch"), _NAMES[optimizer], style)
    axes.set_xscale("log", base=2)
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("sequences per step")
    axes.set_title("batch size, same tokens")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)


def _draw_update_rms(axes: Axes, ablation: Summary) -> None:
    settings = ablation["settings"]
    points = [(float(k), v["mean"]) for k, v in settings.items() if k != "AdamW" and v["mean"]]
    _draw_line(axes, points, "Muon", _STYLES["muon"])
    axes.axhline(settings["AdamW"]["mean"], color=colours.ADAMW, linestyle="--", label="AdamW")
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
    axes.set_xlabel("update RMS")
    axes.set_title("update RMS")
    axes.legend(loc="upper center")
    axes.grid(alpha=0.3)


def _of(ablation: Summary, optimizer: str, field: str) -> list[tuple[float, float]]:
    return [
        (setting[field], setting["mean"])
        for name, setting in ablation["settings"].items()
        if name.startswith(f"{optimizer} ") and setting["mean"] is not None
    ]


def _draw_line(
    axes: Axes, points: list[tuple[float, float]], label: str, style: Mapping[str, Any]
) -> None:
    _plot(axes, sorted(points), label=label, **style)


def _draw_bars(axes: Axes, ablation: Summary, title: str) -> None:
    """Means as points with every seed as a tick: losses have no meaningful zero for a bar."""
    settings = list(ablation["settings"].items())[::-1]
    for y, (_, setting) in enumerate(settings):
        there = [value for value in setting["val_loss"] if value is not None]
        axes.plot(there, [y] * len(there), "|", color=colours.INK, markersize=14)
        if setting["mean"] is not None:
            axes.plot(setting["mean"], y, "o", color=colours.MUON)
            axes.annotate(
                f"{setting['mean']:.3f}",
                (setting["mean"], y),
                xytext=(0, 10),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    names = [name.replace("_", " ").replace(" and ", "\n+ ") for name, _ in settings]
    axes.set_yticks(range(len(settings)), names)
    axes.set_ylim(-0.5, len(settings) - 0.3)
    axes.margins(x=0.15)
    axes.set_xlabel("validation loss (nats per byte)")
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")


def _plot(axes: Axes, points: Sequence[tuple[Any, Any]], **style: Any) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def _law(fields: Mapping[str, Any]) -> Law:
    return Law(fields["factor"], fields["power"], fields["irreducible"])


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2g}M" if parameters < 1e6 else f"{parameters / 1e6:.3g}M"


def _plain_ticks(axis: Any) -> None:
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
