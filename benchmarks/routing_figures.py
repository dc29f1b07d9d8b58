"""The pictures of docs/routing.md: `python -m benchmarks.routing_figures`.

What a picture says of a leaf is what the library says: each asks `route_leaves`.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # No display is needed, and none is looked for.

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from examples import colours
from muon_jax._common.paths import show
from muon_jax._routing.route_leaves import route_leaves

DOCS = Path(__file__).parents[1] / "docs"

_WORDS = {
    "in": "reduced (fan-in)",
    "out": "output (fan-out)",
    "batch": "stack",
    "adam": "no matrix",
    "asks": "not known",
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Some leaves of one module, and what they show."""

    title: str
    leaves: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]


EVIDENCE = (
    Scene(
        "attention: the projections agree",
        {"query": (512, 8, 64), "key": (512, 2, 64), "value": (512, 2, 64), "out": (8, 64, 512)},
        (
            "query[0] == out[2], the model's width",
            "query[1:] == out[:2], the heads",
            "key and value: 2 heads, each read by 4 queries",
        ),
    ),
    Scene(
        "the same names, twelve layers along axis 0",
        {"wq": (12, 512, 512), "wk": (12, 512, 512), "wo": (12, 512, 512), "b1": (12, 2048)},
        (
            "wq[0] is 12 and wo[2] is 512: no attention",
            "all share axis 0, so it is asked, and",
            "b1 beside them is a stacked vector",
        ),
    ),
    Scene(
        "the same names, twelve layers along axis 1",
        {"query": (512, 12, 512), "out": (512, 12, 512), "scale": (512, 12)},
        (
            "query[1:] is (12, 512), out[:2] is (512, 12)",
            "all share axis 1, so it is asked with",
            "MuonDimensionNumbers(0, 2)",
        ),
    ),
    Scene(
        "eight experts whose output is called wo",
        {"wi_0/kernel": (8, 512, 2048), "wi_1/kernel": (8, 512, 2048), "wo/kernel": (8, 2048, 512)},
        (
            "wo has no input projection beside it",
            "8 is shared by all: experts, it seems,",
            "asked with MuonDimensionNumbers(-2, -1)",
        ),
    ),
)

KINDS = (
    Scene(
        "a window, whatever its module is called",
        {"features/kernel": (3, 3, 128, 32), "patches/kernel": (16, 16, 3, 768)},
        (
            "four axes in a kernel, the first two short",
            "and square: one matrix [window and in, out]",
        ),
    ),
    Scene(
        "a stack that its name and its leaves agree on",
        {
            "layers/mlp/up/kernel": (12, 512, 2048),
            "layers/norm/scale": (12, 512),
            "layers/mlp/up/bias": (12, 2048),
        },
        (
            "all below layers share axis 0, and one of them",
            "is then still a matrix: twelve of 512 x 2048",
        ),
    ),
    Scene(
        "a head, by the embedding's rows",
        {"table/embedding": (32000, 512), "to_words/kernel": (512, 32000)},
        ("as wide as the embedding has rows:", "AdamW's, whatever its name"),
    ),
    Scene(
        "a head, by its place in its module",
        {"classifier/dense/kernel": (768, 768), "classifier/out_proj/kernel": (768, 2)},
        ("out_proj is the last layer of the classifier,", "and dense a hidden one"),
    ),
)


def draw(path: Path, scenes: tuple[Scene, ...], columns: int) -> None:
    """Draws scenes side by side: every leaf as its axes, coloured by their parts in the matrix."""
    rows = -(-len(scenes) // columns)
    height = max(len(scene.leaves) + 0.75 * len(scene.notes) for scene in scenes) + 1.2
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 0.48 * height * rows), layout="constrained"
    )
    for axis, scene in zip(axes.flat, scenes, strict=False):
        _scene(axis, scene, height)
    for axis in axes.flat[len(scenes) :]:
        axis.axis("off")
    handles = [
        Rectangle(
            (0, 0),
            1,
            1,
            facecolor=colours.AXES[kind],
            edgecolor=colours.INK,
            label=_WORDS[kind],
            linestyle="--" if kind == "asks" else "-",
        )
        for kind in colours.AXES
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _scene(axis: Axes, scene: Scene, height: float) -> None:
    axis.set(xlim=(0, 12.4), ylim=(-height, 0))
    axis.axis("off")
    axis.set_title(scene.title, loc="left", fontsize=12, fontweight="bold")
    parts = parts_of(scene.leaves)
    for row, (name, shape) in enumerate(scene.leaves.items()):
        group, kinds = parts[name]
        y = -row - 0.5
        axis.text(0, y, name, va="center", fontsize=10, family="monospace")
        for index, (length, kind) in enumerate(zip(shape, kinds, strict=True)):
            axis.add_patch(
                FancyBboxPatch(
                    (4.6 + 1.45 * index, y - 0.36),
                    1.3,
                    0.72,
                    boxstyle="round,pad=0.02",
                    facecolor=colours.AXES[kind],
                    edgecolor=colours.INK,
                    linewidth=1,
                    linestyle="--" if kind == "asks" else "-",
                )
            )
            letter = {"in": "in ", "out": "out "}.get(kind, "")
            axis.text(
                5.25 + 1.45 * index, y, f"{letter}{length}", ha="center", va="center", fontsize=9
            )
        axis.text(10.6, y, group, va="center", fontsize=10)
    for row, note in enumerate(scene.notes):
        axis.text(
            0.2,
            -len(scene.leaves) - 0.75 * row - 0.55,
            note,
            va="center",
            fontsize=10,
            color=colours.INK,
        )


def parts_of(leaves: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each leaf where it goes, and the part of each of its axes."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}
    asked = ""
    try:
        routes, _ = route_leaves(params)
    except ValueError as error:
        asked = str(error)
        known = {}
    else:
        known = {show(route.path): route for route in routes}
    parts = {}
    for name, shape in leaves.items():
        views = known[name].views if name in known else None
        if views is not None:
            view = views[0]
            kinds = tuple(
                "in" if n in view.reduction else "out" if n in view.output else "batch"
                for n in range(len(shape))
            )
            parts[name] = ("Muon", kinds)
        elif asked and len(shape) > 2:
            parts[name] = ("asks", ("asks",) * len(shape))
        else:
            parts[name] = ("AdamW", ("adam",) * len(shape))
    return parts


def draw_order(path: Path) -> None:
    """Draws the order in which the library looks for a leaf's role."""
    steps = (
        ("your word", "MuonDimensionNumbers, FusedBlocks, by_path, None", "declared"),
        ("the program", "by_use: what a product contracts, what a scan cuts", "as it is used"),
        (
            "name and shapes beside it",
            "attention that agrees, a window, a stack, a bias, a vocabulary",
            "as they say",
        ),
        ("rank", "one axis: a vector; two: a matrix, marked assumed", "vector, matrix"),
    )
    figure, axis = plt.subplots(figsize=(11, 5.2), layout="constrained")
    axis.set(xlim=(0, 11), ylim=(-5.6, 0.3))
    axis.axis("off")
    for row, (title, what, result) in enumerate(steps):
        y = -row * 1.12
        _box(axis, 0.2, y, 7.0, colours.STEP, f"{row + 1}. {title}", what)
        axis.annotate("", (8.15, y - 0.42), (7.25, y - 0.42), arrowprops={"arrowstyle": "->"})
        axis.text(7.7, y - 0.2, "known", ha="center", fontsize=9)
        axis.text(8.25, y - 0.42, result, va="center", fontsize=11)
        axis.annotate("", (3.7, y - 1.12), (3.7, y - 0.86), arrowprops={"arrowstyle": "->"})
        axis.text(3.85, y - 1.0, "says nothing", fontsize=9, va="center")
    _box(
        axis,
        0.2,
        -4.48,
        7.0,
        colours.RAISES,
        "ValueError",
        "every leaf that is not known, and the code that declares all of them",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _box(axis: Axes, x: float, y: float, width: float, fill: str, title: str, what: str) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (x, y - 0.82),
            width,
            0.8,
            boxstyle="round,pad=0.02",
            facecolor=fill,
            edgecolor=colours.INK,
        )
    )
    axis.text(x + 0.2, y - 0.28, title, fontsize=11, fontweight="bold", va="center")
    axis.text(x + 0.2, y - 0.58, what, fontsize=10, va="center")


def main() -> None:
    """Draws all pictures."""
    draw_order(DOCS / "routing_order.png")
    draw(DOCS / "routing_evidence.png", EVIDENCE, columns=2)
    draw(DOCS / "routing_kinds.png", KINDS, columns=2)


if __name__ == "__main__":
    main()
