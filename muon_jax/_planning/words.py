"""The words of the command line: ``data=8,fsdp=4``, ``experts=expert,-,-``, ``mixer=1,2>0``."""

import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from optax.contrib import MuonDimensionNumbers

Read = TypeVar("Read")


class Rule(NamedTuple):
    """Which optimizer has the parameters that a pattern finds.

    Attributes:
      pattern: a regular expression, searched in their names.
      optimizer: ``"muon"`` or ``"adam"``.
      axes: the fan-in and the fan-out axes of the matrices; None means the last two.
    """

    pattern: str
    optimizer: str
    axes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


class SpecRule(NamedTuple):
    """Where the parameters that a pattern finds lie: the mesh axes of each dimension."""

    pattern: str
    spec: PartitionSpec


def read_mesh(text: str) -> AbstractMesh:
    """A mesh without devices, from the lengths of its axes: ``data=8,fsdp=4``."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(\d+)\s*", part)
        if match is None or int(match[2]) < 1:
            raise ValueError(
                f"cannot read {part!r}: write each axis with its length, such as data=8,fsdp=4."
            )
        if match[1] in axes:
            raise ValueError(f"the axis {match[1]} comes twice.")
        axes[match[1]] = int(match[2])
    return AbstractMesh((*axes.values(),), (*axes,), axis_types=(AxisType.Auto,) * len(axes))


def read_pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}.") from error
    return text


def read_adam(text: str) -> Rule:
    """A pattern of parameters for AdamW."""
    return Rule(read_pattern(text), "adam")


def read_muon(text: str) -> Rule:
    """A pattern of parameters for Muon: ``mixer/kernel``, with its axes ``mixer/kernel=0>1,2``."""
    match = re.fullmatch(r"(.*)=(-?\d+(?:,-?\d+)*)>(-?\d+(?:,-?\d+)*)", text)
    if match is None:
        if ">" in text:
            raise ValueError(
                f"cannot read {text!r}: write the fan-in axes, '>' and the fan-out axes behind the "
                "pattern, such as 'mixer/kernel=0>1,2'."
            )
        return Rule(read_pattern(text), "muon")
    axes = tuple(tuple(map(int, side.split(","))) for side in match.groups()[1:])
    return Rule(read_pattern(match[1]), "muon", (axes[0], axes[1]))


def read_spec(text: str) -> SpecRule:
    """A pattern, and the mesh axes of each dimension: ``experts=expert,-,fsdp+tensor``."""
    pattern, equals, spec = text.rpartition("=")
    entries = [entry.strip() for entry in spec.split(",")]
    if not equals or not all(re.fullmatch(r"-|\w+(\+\w+)*", entry) for entry in entries):
        raise ValueError(
            f"cannot read {text!r}: write a pattern and, for each dimension, a mesh axis or '-', "
            "such as 'experts=expert,-,fsdp' (several axes: data+fsdp)."
        )
    axes = [None if entry == "-" else (*entry.split("+"),) for entry in entries]
    return SpecRule(read_pattern(pattern), PartitionSpec(*axes))


def in_words(flag: str, read: Callable[[str], Read], text: str) -> Read:
    """What was read; an error begins with its flag."""
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{flag} {text}: {error}") from error


def dimension_numbers(rule: Rule, orientation: str) -> MuonDimensionNumbers | None:
    """The axes that a rule declares; None for AdamW."""
    if rule.optimizer == "adam":
        return None
    if rule.axes is None:
        return MuonDimensionNumbers(*((-1, -2) if orientation == "out_in" else (-2, -1)))
    return MuonDimensionNumbers(*rule.axes)
