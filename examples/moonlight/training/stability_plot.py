"""The monitors' records as one page of small plots, legible in print."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples import colours
from examples.moonlight.model.attention import HOT_LOGIT
from examples.moonlight.training.monitors import Record, group_of, rms_over_layers

# Told apart without colour, too; by name, so that a group looks the same in every plot.
_STYLES = {
    "AttnQO": (colours.ATTENTION, "-"),
    "AttnKV": (colours.ATTENTION, "--"),
    "Experts": (colours.EXPERTS, "-"),
    "SharedExperts": (colours.EXPERTS, "--"),
    "Router": (colours.EXPERTS, ":"),
    "Dense": (colours.DENSE, "-"),
    "embed": (colours.EMBEDDINGS, "-"),
    "lm_head": (colours.EMBEDDINGS, "--"),
}

# Loads up to this many experts and layers are written into their cells.
_MOST_LABELLED = (16, 6)


def draw_stability(
    path: Path, records: Sequence[Record], *, title: str, threshold: float | None = None
) -> None:
    """Draws a run's monitors over its optimizer steps into a PNG.

    What differs by layer has a curve for each, from dark (first) to light (last); what differs by
    kind of matrix has a labelled curve for each of the paper's groups. A lone record has no curves:
    layers stand side by side then, and groups one below the other.

    Args:
        path: The PNG to write.
        records: The run's records, one at least, as `metrics.jsonl` has them.
        title: What was trained, and how.
        threshold: The largest logit that QK-Clip allowed, where it was used.

    Raises:
        ValueError: There is no record.
    """
    if not records:
        raise ValueError("there is no monitor record to draw: train with --monitor-every N")
    if len(records) == 1:
        figure = _of_one_step(records[0], threshold)
    else:
        figure = _over_steps(records, threshold)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _over_steps(records: Sequence[Record], threshold: float | None) -> Figure:
    steps = [record["step"] for record in records]
    layers = len(records[0]["max_logit"])
    shades = plt.get_cmap(colours.ORDERED)(np.linspace(0, colours.LIGHTEST, layers))
    has_experts = "load" in records[0]
    figure = plt.figure(figsize=(12, 12.5 if has_experts else 9.5), layout="constrained")
    grid = figure.add_gridspec(4 if has_experts else 3, 3)
    places = iter([grid[row, column] for row in range(3) for column in range(3)])

    def panel(name: str) -> Axes:
        axes = figure.add_subplot(next(places))
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        return axes

    def draw(axes: Axes, values: Sequence[float], **style: Any) -> None:
        dots = {"marker": ".", "markersize": 4} if len(steps) <= 20 else {}
        axes.plot(steps, values, linewidth=1.3, **dots, **style)

    def by_layer(name: str, values: Callable[[Record], Sequence[float]]) -> Axes:
        axes = panel(name)
        curves = np.asarray([values(record) for record in records]).T
        # Those with experts are the last.
        for shade, curve in zip(shades[layers - len(curves) :], curves, strict=True):
            draw(axes, curve, color=shade)
        return axes

    def by_group(name: str, values: Callable[[Record], Mapping[str, float]]) -> Axes:
        axes = panel(name)
        for group in values(records[0]):
            color, line = _STYLES[group]
            curve = [values(record)[group] for record in records]
            draw(axes, curve, label=group, color=color, linestyle=line)
        return axes

    axes = by_layer("largest attention logit", lambda r: np.max(r["max_logit"], axis=1))
    _mark_limits(axes, threshold)
    axes = by_layer(
        f"share of logits above {HOT_LOGIT:g}", lambda r: np.max(r["hot_share"], axis=1)
    )
    axes.set_ylim(bottom=0)
    draw(
        panel("gradient norm before clipping"), [r["grad_norm"] for r in records], color=colours.INK
    )
    by_layer("output RMS of attention", lambda r: r["attention_rms"])
    by_layer("output RMS of the MLP or experts", lambda r: r["mlp_rms"])
    by_group("SVD entropy", lambda r: r["svd_entropy"])
    by_group("weight RMS", lambda r: _rms_by_group(r["weight_rms"]))
    axes = by_group("update RMS / learning rate", lambda r: _rms_by_group(r["update_rms"]))
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(_STYLES),
        fontsize=8,
        handlelength=2.4,
    )
    if has_experts:
        axes = by_layer("max violation of the load", lambda r: r["max_violation"])
        axes.set_ylim(bottom=0)
        _draw_loads(figure.add_subplot(grid[3, :]), records[-1], first=layers)
    for axes in figure.axes[6:9]:
        axes.set_xlabel("optimizer step", fontsize=9)
    if layers > 1:
        bounds = BoundaryNorm(np.arange(layers + 1) - 0.5, layers)
        bar = figure.colorbar(
            ScalarMappable(bounds, ListedColormap(shades)),
            ax=figure.axes[:9],
            shrink=0.3,
            pad=0.01,
            ticks=np.unique(np.linspace(0, layers - 1, 7).astype(int)),
        )
        bar.set_label("layer", fontsize=9)
        bar.ax.tick_params(labelsize=8, length=0)
    return figure


def _of_one_step(record: Record, threshold: float | None) -> Figure:
    """By layer, points for attention and MLP; by group, a bar each; and the experts' load."""
    layers, has_experts = len(record["max_logit"]), "load" in record
    figure = plt.figure(figsize=(12, 10 if has_experts else 7), layout="constrained")
    grid = figure.add_gridspec(3 if has_experts else 2, 3)
    columns = iter([grid[row, column] for row in range(2) for column in range(3)])

    def panel(name: str, axis: Literal["x", "y"]) -> Axes:
        axes = figure.add_subplot(next(columns))
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3, axis=axis)
        axes.tick_params(labelsize=8)
        return axes

    def by_layer(name: str, **values: Sequence[float]) -> Axes:
        axes = panel(name, "y")
        for (label, numbers), marker in zip(values.items(), "os", strict=False):
            color = colours.ATTENTION if label == "attention" else colours.INK
            first = layers - len(numbers)
            axes.plot(
                range(first, layers), numbers, marker, color=color, label=label, clip_on=False
            )
        axes.set_xlim(-0.5, layers - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel("layer", fontsize=9)
        axes.set_ylim(0, 1.1 * max(map(max, values.values())) or 1)
        return axes

    def by_group(name: str, values: Mapping[str, float]) -> None:
        axes = panel(name, "x")
        for place, (group, value) in enumerate(values.items()):
            color, line = _STYLES[group]
            face = color if line == "-" else "white"
            axes.barh(place, value, edgecolor=color, facecolor=face, linestyle=line)
            axes.annotate(
                f"{value:.3g}",
                (value, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(range(len(values)), [*values])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(values.values()))

    _mark_limits(
        by_layer("largest attention logit", attention=np.max(record["max_logit"], axis=1)),
        threshold,
    )
    by_layer(f"share of logits above {HOT_LOGIT:g}", attention=np.max(record["hot_share"], axis=1))
    axes = by_layer(
        "output RMS", attention=record["attention_rms"], **{"MLP or experts": record["mlp_rms"]}
    )
    axes.legend(fontsize=8)
    by_group("SVD entropy", record["svd_entropy"])
    by_group("weight RMS", _rms_by_group(record["weight_rms"]))
    by_group("update RMS / learning rate", _rms_by_group(record["update_rms"]))
    if has_experts:
        _draw_loads(figure.add_subplot(grid[2, :]), record, first=layers)
    words = f"the only record, step {record['step']}: gradient norm {record['grad_norm']:.3g}"
    figure.supxlabel(words + " before clipping", fontsize=9)
    return figure


def _mark_limits(axes: Axes, threshold: float | None) -> None:
    """Scales the panel of the largest logits, and draws the limits that they have."""
    axes.axhline(HOT_LOGIT, color=colours.INK, linestyle="--", linewidth=1)
    if threshold is not None:
        line = axes.axhline(threshold, color=colours.INK, linestyle=":", linewidth=1.3)
        axes.legend([line], ["QK-Clip"], fontsize=8)
    # Logits of a young model are near 0, and those of one that diverges in the thousands.
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(auto=True)
    axes.autoscale_view()
    axes.set_ylim(bottom=min(0, axes.dataLim.y0))


def _rms_by_group(kinds: Mapping[str, Any]) -> dict[str, float]:
    """RMS over the layers and matrices of a group; of embedding and head besides."""
    groups: dict[str, list[float]] = {}
    for kind, values in kinds.items():
        group = kind if kind in _STYLES else group_of(kind)
        if group is not None:
            groups.setdefault(group, []).append(rms_over_layers(values))
    found = {group: rms_over_layers([*values]) for group, values in groups.items()}
    return {group: found[group] for group in _STYLES if group in found}


def _draw_loads(axes: Axes, record: Record, first: int) -> None:
    """The load of every expert at one step, as a multiple of an even share."""
    loads = np.asarray(record["load"], float)
    loads /= loads.mean(axis=1, keepdims=True)
    rows, columns = loads.shape
    image = axes.imshow(loads, cmap="Greys", vmin=0, vmax=max(2, loads.max()), aspect="auto")
    if columns <= _MOST_LABELLED[0] and rows <= _MOST_LABELLED[1]:
        for (row, column), load in np.ndenumerate(loads):
            color = "white" if load > 0.6 * image.get_clim()[1] else colours.INK
            axes.text(column, row, f"{load:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_title(
        f"experts' load at step {record['step']}, in multiples of an even share", fontsize=10
    )
    axes.set_xlabel("expert", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_yticks(range(rows), [str(first - rows + row) for row in range(rows)])
    axes.tick_params(labelsize=8)
    axes.figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=8)
