"""Evidence that decides nothing: how many heads an output becomes, and where it is cut."""

from collections.abc import Collection, Sequence
from typing import Any

from muon_jax._routing.use.events import roles_in
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Use


def hints_of(label: Label, axis: int, uses: Sequence[Use], attention: Collection[Any]) -> list[str]:
    """What an output axis shows besides: heads that it becomes, or pieces that it is cut into.

    Args:
      label: the label of the axis.
      axis: its number.
      uses: the uses of the parameter.
      attention: the equations that are attention.
    """
    hints = []
    if (held := heads_of(label, attention)) is not None:
        hints.append(f"{held[0]} heads of {held[1]}")
    blocks = _blocks(label)
    if blocks:
        hints.append(f"cut along axis {axis}: maybe FusedBlocks({blocks}, axis={axis})")
    elif any(axis in use.partly for use in uses):
        hints.append(f"used in pieces of axis {axis}: maybe fused blocks")
    return hints


def heads_of(label: Label, attention: Collection[Any]) -> tuple[int, int] | None:
    """The number and the width of the heads that an output axis becomes."""
    for factors in label.factors:
        if len(factors) == 2 and _are_heads(*factors, attention):
            return factors[0].size, factors[1].size
    return None


def _are_heads(many: Label, width: Label, attention: Collection[Any]) -> bool:
    return any(
        roles_in(many, place, side) & {"batch", "free"}
        and roles_in(width, place, side) & {"contracted", "free"}
        for place in attention
        for side in (0, 1)
    )


def _blocks(label: Label) -> tuple[int, ...]:
    """The sizes of the pieces into which an axis was cut, if they fill it."""
    sizes = _filling(label.slices, label.size)
    if sizes:
        return sizes
    for factors in label.factors:
        of_major = _blocks(factors[0])
        if of_major:
            return tuple(size * (label.size // factors[0].size) for size in of_major)
    return ()


def _filling(slices: list[tuple[int, int]], size: int) -> tuple[int, ...]:
    at, sizes = 0, []
    for start, width in slices:
        if start != at:
            return ()
        at, sizes = at + width, [*sizes, width]
    return tuple(sizes) if at == size and len(sizes) > 1 else ()
