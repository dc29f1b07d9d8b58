"""Rules for primitives that move or repeat the entries of a value."""

from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.atoms import (
    Axis,
    CannotFollow,
    Gap,
    groups,
    regroup,
)
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Reader, ints, restructure, rule, shape_of
from muon_jax._routing.use.values import Value, labels_in


@rule("reshape")
def reshape(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Cuts and joins axes, row-major."""
    (value,), shape = values, shape_of(eqn)
    if eqn.params.get("dimensions") is not None:
        raise CannotFollow
    pairs = groups(value.shape, shape)
    moved = {old[0]: new[0] for old, new in pairs if len(old) == len(new) == 1}
    out = restructure(
        reader, value, shape, lambda axes: regroup(axes, value.shape, shape), moved, "a reshape"
    )
    for axis in out.axes if out.pending else ():
        Label.join(labels_in(axis), ("joint",))
    return out


@rule("transpose")
def transpose(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Reorders axes."""
    order = ints(eqn.params["permutation"])
    moved = {old: new for new, old in enumerate(order)}
    shape = shape_of(eqn)
    return restructure(reader, values[0], shape, lambda axes: [axes[i] for i in order], moved)


@rule("squeeze")
def squeeze(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Drops axes of length 1."""
    gone = {axis % len(values[0].shape) for axis in eqn.params["dimensions"]}
    kept = [i for i in range(len(values[0].shape)) if i not in gone]
    return keep_axes(reader, values[0], kept)


def keep_axes(reader: Reader, value: Value, kept: Sequence[int]) -> Value:
    """A value without the other axes, which are of length 1."""
    moved = {old: new for new, old in enumerate(kept)}
    shape = [value.shape[i] for i in kept]
    return restructure(reader, value, shape, lambda axes: [axes[i] for i in kept], moved)


@rule("broadcast_in_dim")
def broadcast_in_dim(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Adds axes along which nothing varies."""
    where = ints(eqn.params["broadcast_dimensions"])
    return broadcast(reader, values[0], shape_of(eqn), where)


def broadcast(reader: Reader, value: Value, shape: Sequence[int], where: Sequence[int]) -> Value:
    """A value of `shape`, whose axes go `where`."""
    moved = {old: new for old, new in enumerate(where) if value.shape[old] == shape[new]}
    return restructure(reader, value, shape, lambda axes: _spread(axes, shape, moved), moved)


def _spread(axes: Sequence[Axis], shape: Sequence[int], moved: dict[int, int]) -> list[Axis]:
    out: list[Axis] = [(Gap(size),) for size in shape]
    for old, new in moved.items():
        out[new] = axes[old]
    return out


@rule("tile")
def tile(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Repeats the whole along its axes."""
    (value,), reps = values, ints(eqn.params["reps"])
    shape = shape_of(eqn)
    if len(reps) != len(value.shape):
        raise CannotFollow

    def repeat(axes: tuple[Axis, ...]) -> list[Axis]:
        return [axis if n == 1 else (Gap(n), *axis) for axis, n in zip(axes, reps, strict=True)]

    moved = {i: i for i, n in enumerate(reps) if n == 1}
    return restructure(reader, value, shape, repeat, moved)
