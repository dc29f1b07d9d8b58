"""The zoo's entries: names, shapes and the right verdict of every leaf of published models.

One file in `families/` is one model. Its head says where names and shapes are from; each line below
is a leaf, or many that differ in numbers only::

    title: GPT-2 small
    kind: language
    library: Hugging Face Flax (Linen)
    source: huggingface/transformers v4.48.3, models/gpt2/modeling_flax_gpt2.py

    transformer/wte/embedding                    50257x768   adam
    transformer/h/{0..11}/attn/c_attn/kernel     768x2304    muon 0>1

``muon 0>1,2`` reduces axis 0 and gives axes 1 and 2; all others are a batch. ``asks`` before a
verdict: names and shapes leave it open, so the library must raise, and must propose what follows.
``exchanged`` behind it: the library takes fan-in for fan-out, as it says of ``[out, in]`` weights.
"""

import dataclasses
import functools
import itertools
import pathlib
import re

FAMILIES = pathlib.Path(__file__).parent / "families"
_HEAD = ("title", "kind", "library", "source")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is right for a leaf.

    Attributes:
      axes: the reduced and the output axes of its matrices; None is AdamW.
      asks: whether the library must ask.
      exchanged: whether the library takes the two for each other.
    """

    axes: tuple[tuple[int, ...], tuple[int, ...]] | None
    asks: bool = False
    exchanged: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A published model."""

    name: str
    title: str
    kind: str
    library: str
    source: str
    leaves: dict[str, tuple[tuple[int, ...], Verdict]]


def families() -> list[Family]:
    """All entries, by name."""
    return [family(path.stem) for path in sorted(FAMILIES.glob("*.txt"))]


@functools.cache
def family(name: str) -> Family:
    """One entry."""
    return read_family(name, (FAMILIES / f"{name}.txt").read_text())


def read_family(name: str, text: str) -> Family:
    """An entry from its text."""
    head, _, body = text.partition("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    if set(fields) != {*_HEAD}:
        raise ValueError(f"{name}: its head has {sorted(fields)}; expected {sorted(_HEAD)}.")
    leaves = {}
    for line in body.splitlines():
        if line.strip():
            pattern, shape, *verdict = line.split()
            axes = () if shape == "()" else tuple(map(int, shape.split("x")))
            for path in expand(pattern):
                if path in leaves:
                    raise ValueError(f"{name}: {path} is there twice.")
                leaves[path] = (axes, read_verdict(verdict, f"{name}: {line}"))
    return Family(name, leaves=leaves, **fields)


def expand(pattern: str) -> list[str]:
    """The paths of a line: ``{0..11}`` is twelve of them, ``{wi_0,wi_1}`` two."""
    pieces = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if not piece.startswith("{"):
            pieces.append([piece])
            continue
        choices = []
        for choice in piece[1:-1].split(","):
            ends = re.fullmatch(r"(\d+)\.\.(\d+)", choice)
            choices += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [choice]
        pieces.append(choices)
    return ["".join(parts) for parts in itertools.product(*pieces)]


def read_verdict(words: list[str], where: str) -> Verdict:
    """A verdict from the words behind a shape."""
    asks = words[:1] == ["asks"]
    exchanged = words[-1:] == ["exchanged"]
    words = words[asks : len(words) - exchanged]
    if words == ["adam"]:
        return Verdict(None, asks, exchanged)
    if len(words) != 2 or words[0] != "muon" or words[1].count(">") != 1:
        raise ValueError(f"{where}: expected a verdict such as 'muon 0>1', 'adam', 'asks adam'.")
    reduction, output = (tuple(map(int, axes.split(","))) for axes in words[1].split(">"))
    return Verdict((reduction, output), asks, exchanged)
