"""The drawings of docs/architecture.md: `python -m benchmarks.architecture_figures`.

What is drawn of folders is data here, and a test holds it against the folders.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from examples.colours import INK, ROOMS

DOCS = Path(__file__).parents[1] / "docs"


class Room(NamedTuple):
    """A folder, or files that lie flat in one, with what they are for.

    Attributes:
      paths: from the repository's root.
      does: what they are for.
    """

    paths: tuple[str, ...]
    does: str


LIBRARY: tuple[tuple[Room, ...], ...] = (
    (Room(("muon_jax/_planning",), "the command line: a model on disk, without a device"),),
    (
        Room(("muon_jax/_muon.py", "muon_jax/_scale_by_muon.py"), "the transformations"),
        Room(("muon_jax/_optimizer.py", "muon_jax/_step.py"), "what is decided once; one step"),
        Room(("muon_jax/_map_matrices.py", "muon_jax/_diagnostics.py"), "what to watch"),
    ),
    (Room(("muon_jax/_mesh",), "where things lie, who orthogonalizes what, how it is sent"),),
    (
        Room(("muon_jax/_routing",), "which leaf is a matrix: names and shapes"),
        Room(("muon_jax/_routing/use",), "the same, read from the loss"),
    ),
    (Room(("muon_jax/_attention",), "how kernels hold heads: QK-Clip, heads="),),
    (
        Room(
            ("muon_jax/_newton_schulz.py", "muon_jax/_orthogonalize.py"),
            "one matrix",
        ),
        Room(
            ("muon_jax/_matrices.py", "muon_jax/_batching.py"),
            "a leaf as matrices; one shape, one batch",
        ),
        Room(
            ("muon_jax/_momentum.py", "muon_jax/_scaling.py", "muon_jax/_update_rule.py"),
            "before and behind it",
        ),
    ),
    (Room(("muon_jax/_common",), "names of leaves, checks, dtypes, loops: know nothing else"),),
)
"""The library's rooms, those above import from those below."""

EXAMPLES: tuple[tuple[Room, ...], ...] = (
    (
        Room(("examples/minimal.py",), "a page"),
        Room(("examples/colab",), "notebooks"),
        Room(("examples/finetune",), "full and LoRA"),
        Room(("examples/scaling_law",), "Muon to AdamW"),
    ),
    (
        Room(
            ("examples/moonlight/train.py", "examples/moonlight/stages.py"),
            "programs that train",
        ),
        Room(
            ("examples/moonlight/generate.py", "examples/moonlight/hf_export.py"),
            "programs that use what was trained",
        ),
    ),
    (Room(("examples/moonlight/training",), "optimizers, steps, monitors, the loop"),),
    (Room(("examples/moonlight/generation",), "cache, sampling, chat"),),
    (
        Room(("examples/moonlight/huggingface",), "weights, both ways"),
        Room(("examples/moonlight/run_folder",), "checkpoints, lock, metrics"),
    ),
    (
        Room(("examples/moonlight/model",), "the Mixture-of-Experts"),
        Room(("examples/moonlight/data",), "texts, tokens, batches"),
    ),
    (Room(("examples/moonlight/schedule",), "rates, stages, plans"),),
    (Room(("examples/moonlight/common",), "files, terminals, errors"),),
)

STEP: tuple[tuple[str, str, str], ...] = (
    ("gradients", "shaped like the parameters, clipped in front", ""),
    (
        "route",
        "while tracing: Muon's matrices, AdamW's rest",
        "muon_jax/_routing/route_leaves.py",
    ),
    ("momentum", "M = mu M + G;  U = mu M + G", "muon_jax/_momentum.py"),
    ("take apart", "each leaf: [batch, fan_in, fan_out], bfloat16", "muon_jax/_matrices.py"),
    ("group", "all matrices of one shape: one batch", "muon_jax/_batching.py"),
    ("orthogonalize", "five Newton-Schulz steps", "muon_jax/_newton_schulz.py"),
    ("scale", "0.2 sqrt(max(A, B)), in float32", "muon_jax/_update_rule.py"),
    ("put back", "into leaves", "muon_jax/_matrices.py"),
    ("decay, rate", "-lr (update + wd W)", "muon_jax/_muon.py"),
)
"""One step on one device: a title, what happens, and where."""

ON_A_MESH: dict[str, tuple[str, str]] = {
    "route": ("plan: who owns which matrix", "muon_jax/_mesh/planner.py"),
    "momentum": (
        "reduce-scatter: each device its shard of the state",
        "muon_jax/_mesh/shards.py",
    ),
    "group": ("all_to_all: each matrix to one owner", "muon_jax/_mesh/owner_runners.py"),
    "orthogonalize": ("owners, or devices that share a matrix", "muon_jax/_mesh/part_runner.py"),
    "scale": ("all_gather of the bfloat16 result, then scale", "muon_jax/_mesh/collectives.py"),
}
"""What a mesh adds beside a step."""


def draw_rooms(path: Path, rows: tuple[tuple[Room, ...], ...]) -> None:
    """Draws rooms as floors of a house: whoever is above imports from those below."""
    figure, axis = plt.subplots(figsize=(11, 0.95 * len(rows)), layout="constrained")
    axis.set(xlim=(0, 11), ylim=(-len(rows), 0.05))
    axis.axis("off")
    for level, rooms in enumerate(rows):
        width = 10.6 / len(rooms)
        for place, room in enumerate(rooms):
            names = "  ".join(_short(name) for name in room.paths)
            fill = ROOMS[level % len(ROOMS)]
            _box(axis, 0.4 + place * width, -level, width - 0.12, fill, names, room.does)
    axis.annotate(
        "", (0.15, -len(rows) + 0.2), (0.15, -0.15), arrowprops={"arrowstyle": "->", "color": INK}
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _short(name: str) -> str:
    inner = name.removeprefix("muon_jax/").removeprefix("examples/")
    return inner if inner.endswith(".py") else f"{inner}/"


def draw_step(path: Path) -> None:
    """Draws a step's way from gradients to updates, and beside it what a mesh adds."""
    figure, axis = plt.subplots(figsize=(11, 0.95 * len(STEP) + 0.3), layout="constrained")
    axis.set(xlim=(0, 11), ylim=(-len(STEP), 0.4))
    axis.axis("off")
    axis.text(2.6, 0.22, "on one device", ha="center", fontsize=12, fontweight="bold")
    axis.text(8.2, 0.22, "what a mesh adds", ha="center", fontsize=12, fontweight="bold")
    for row, (title, what, where) in enumerate(STEP):
        name = f"{title}   ({_short(where)})" if where else title
        _box(axis, 0.1, -row, 5.2, ROOMS[0], name, what)
        if row:
            axis.annotate("", (2.6, -row), (2.6, -row + 0.2), arrowprops={"arrowstyle": "->"})
        if title in ON_A_MESH:
            adds, there = ON_A_MESH[title]
            _box(axis, 5.7, -row, 5.2, ROOMS[1], _short(there), adds)
            axis.plot([5.3, 5.7], [-row - 0.4] * 2, color=INK, linewidth=1, linestyle=":")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _box(axis: Axes, x: float, y: float, width: float, fill: str, title: str, what: str) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (x, y - 0.78), width, 0.76, boxstyle="round,pad=0.02", facecolor=fill, edgecolor=INK
        )
    )
    middle = x + width / 2
    axis.text(middle, y - 0.27, title, ha="center", va="center", fontsize=9, family="monospace")
    axis.text(middle, y - 0.56, what, ha="center", va="center", fontsize=10)


def main() -> None:
    """Draws all pictures."""
    draw_rooms(DOCS / "architecture_library.png", LIBRARY)
    draw_rooms(DOCS / "architecture_examples.png", EXAMPLES)
    draw_step(DOCS / "architecture_step.png")


if __name__ == "__main__":
    main()
