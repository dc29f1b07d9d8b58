"""Rules for primitives that move, repeat, cut or join the entries of a value."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from muon_jax._use.atoms import (
    Atom,
    Axis,
    CannotFollow,
    Digit,
    Gap,
    Part,
    groups,
    leaves,
    regroup,
    same_axis,
    take,
)
from muon_jax._use.elementwise import join_activations
from muon_jax._use.labels import Label
from muon_jax._use.reader import Reader, ints, restructure, rule, shape_of
from muon_jax._use.values import Kind, Taken, Value, View, derived, labels_in, merge


@rule("reshape")
def reshape(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Cuts and joins axes, row-major."""
    (value,), shape = values, shape_of(eqn)
    if eqn.params.get("dimensions") is not None:
        raise CannotFollow
    pairs = groups(value.shape, shape)
    moved = {old[0]: new[0] for old, new in pairs if len(old) == len(new) == 1}
    return restructure(
        reader, value, shape, lambda axes: regroup(axes, value.shape, shape), moved, "a reshape"
    )


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

    def spread(axes: tuple[Axis, ...]) -> list[Axis]:
        out: list[Axis] = [(Gap(size),) for size in shape]
        for old, new in enumerate(where):
            if value.shape[old] == shape[new]:
                out[new] = axes[old]
        return out

    moved = {old: new for old, new in enumerate(where) if value.shape[old] == shape[new]}
    return restructure(reader, value, shape, spread, moved)


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


# --- Slices ---------------------------------------------------------------------------------------


@rule("slice")
def slice_(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Every so manieth entry of each axis, from static starts."""
    steps = ints(eqn.params["strides"] or [1] * len(values[0].shape))
    starts, shape = ints(eqn.params["start_indices"]), shape_of(eqn)
    return static_slice(reader, values[0], starts, shape, steps)


def static_slice(
    reader: Reader,
    value: Value,
    starts: Sequence[int],
    shape: Sequence[int],
    steps: Sequence[int],
) -> Value:
    """The slice of `shape` from `starts`."""

    def cut(axes: tuple[Axis, ...]) -> list[Axis]:
        return [
            take(axis, int(start), size, step)
            for axis, start, size, step in zip(axes, starts, shape, steps, strict=True)
        ]

    moved = {i: i for i, size in enumerate(shape) if size == value.shape[i]}
    # Labels that cannot be cut in one axis are cut in the others all the same.
    labels = tuple(
        _label_slice(axis, int(start), size, step)
        for axis, start, size, step in zip(value.axes, starts, shape, steps, strict=True)
    )
    out = restructure(reader, value, shape, cut, moved, "a slice")
    return dataclasses.replace(out, axes=labels)


def _label_slice(axis: Axis, start: int, size: int, step: int = 1) -> Axis:
    try:
        return take(axis, start, size, step)
    except (CannotFollow, LookupError):
        return derived(size, axis)


@rule("split")
def split(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Several slices along one axis."""
    (value,), axis = values, eqn.params["axis"]
    out, start = [], 0
    for size in ints(eqn.params["sizes"]):
        starts = [start if i == axis else 0 for i in range(len(value.shape))]
        shape = [size if i == axis else n for i, n in enumerate(value.shape)]
        out.append(static_slice(reader, value, starts, shape, [1] * len(shape)))
        start += size
    return out


@rule("unstack")
def unstack(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Each entry along one axis."""
    (value,), axis = values, eqn.params["axis"]
    kept = [i for i in range(len(value.shape)) if i != axis]
    shape = [1 if i == axis else n for i, n in enumerate(value.shape)]
    return [
        keep_axes(
            reader,
            static_slice(
                reader,
                value,
                [n if i == axis else 0 for i in range(len(shape))],
                shape,
                [1] * len(shape),
            ),
            kept,
        )
        for n in range(value.shape[axis])
    ]


@rule("rev")
def rev(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Reverses axes: each digit counts down."""
    (value,), which = values, {*eqn.params["dimensions"]}

    def turn(atom: Atom) -> Atom:
        if isinstance(atom, Part):
            return Part(atom.hi, tuple(map(turn, atom.atoms)), atom.lo)
        if not isinstance(atom, Digit) or atom.stride is None:
            return atom
        base = None if atom.base is None else atom.base + atom.stride * (atom.size - 1)
        return Digit(atom.axis, atom.size, -atom.stride, base)

    def turned(axes: tuple[Axis, ...]) -> list[Axis]:
        return [tuple(map(turn, axis)) if i in which else axis for i, axis in enumerate(axes)]

    moved = {i: i for i in range(len(value.shape)) if i not in which}
    return restructure(reader, value, value.shape, turned, moved)


# --- Slices from places that the program computes -------------------------------------------------


@rule("dynamic_slice")
def dynamic_slice(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """A slice whose starts are computed."""
    value, shape, indices = values[0], shape_of(eqn), values[1:]
    out = window(reader, value, shape, indices)
    by_data = {
        i
        for i, index in enumerate(indices)
        if index.kind is Kind.DATA and shape[i] == 1 < value.shape[i]
    }
    return dataclasses.replace(out, views=tuple(_chosen_at(view, by_data) for view in out.views))


def _chosen_at(view: View, axes: set[int]) -> View:
    """A view of which the batch chose a single place along some axes, as a token its expert.

    A loop over heads or layers does not look so: there the program itself counts the places.
    """
    chosen = [x for i in axes for x in leaves(view.axes[i]) if isinstance(x, Digit)]
    taken = {Taken(digit.axis, "rows") for digit in chosen if view.lengths[digit.axis] > 1}
    kept = tuple(() if i in axes else axis for i, axis in enumerate(view.axes))
    return dataclasses.replace(view, axes=kept, taken=view.taken | taken)


def window(reader: Reader, value: Value, shape: Sequence[int], indices: Sequence[Value]) -> Value:
    """A slice of `shape` from a place that is not known."""

    def somewhere(axes: tuple[Axis, ...]) -> list[Axis]:
        return [_anywhere(axis, size) for axis, size in zip(axes, shape, strict=True)]

    moved = {i: i for i, size in enumerate(shape) if size == value.shape[i]}
    out = restructure(reader, value, shape, somewhere, moved, "a slice of computed place")
    return chosen(reader, out, indices)


def _anywhere(axis: Axis, size: int) -> Axis:
    if not axis or size == math.prod(atom.size for atom in axis):
        return axis
    if size == 1:
        digits = [atom for atom in axis if isinstance(atom, Digit)]
        if len(digits) < len(axis) and any(isinstance(atom, Part) for atom in axis):
            raise CannotFollow
        return tuple(digit.anywhere(1) for digit in digits) or derived(1, axis)
    if len(axis) > 1:
        block = math.prod(atom.size for atom in axis[1:])
        if size % block:
            raise CannotFollow
        return (*_anywhere(axis[:1], size // block), *axis[1:])
    atom: Atom = next(iter(axis))
    if isinstance(atom, Part):
        raise CannotFollow
    if isinstance(atom, Digit):
        return (atom.anywhere(size),)
    return (Gap(size),) if isinstance(atom, Gap) else (Label(size, [atom]),)


def chosen(reader: Reader, value: Value, indices: Sequence[Value]) -> Value:
    """A value taken by indices: what these depend on decides with what it depends on.

    Entries of a parameter taken by the batch are still that parameter's matrices, as with the
    experts that a token chose; a single row of them is not, and is an activation from there on.
    """
    if value.kind is not Kind.PARAMETER or all(x.kind is not Kind.DATA for x in indices):
        return value
    if any(len(view.live) > 1 for view in value.views):
        return value
    for view in value.views:
        reader.note(view.leaf, "rows", "rows by index")
    return dataclasses.replace(value, kind=Kind.DATA, views=(), parameters=frozenset(), rows=True)


@rule("dynamic_update_slice")
def dynamic_update_slice(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Writes a slice at a computed place, as a cache of keys does."""
    operand, update = values[:2]
    axes = []
    for old, new, size, written in zip(
        operand.axes, update.axes, operand.shape, update.shape, strict=True
    ):
        whole = size == written
        # A cache that comes with the batch does not make its axes ones of the batch.
        both = same_axis(old, new) if whole and operand.behind else new
        axes.append(both if whole else (Label(size, labels_in(old, new)),))
    return written_into(reader, eqn, values, tuple(axes))


def written_into(reader: Reader, eqn: Any, values: list[Value], axes: tuple[Axis, ...]) -> Value:
    """The outcome of a write, which shows no parameter's matrices any more."""
    for value in values:
        for view in value.views:
            reader.doubt(view, f"is written into another array by {eqn.primitive.name}")
    return merge(shape_of(eqn), values, axes)


# --- Joining --------------------------------------------------------------------------------------


@rule("concatenate")
def concatenate(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Joins values along an axis: each keeps its part of it."""
    return joined(reader, values, eqn.params["dimension"])


@rule("stack")
def stack(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Joins values along a new axis."""
    axis = eqn.params["axis"]
    shape = list(values[0].shape)
    shape.insert(axis, 1)
    where = [i for i in range(len(shape)) if i != axis]
    return joined(reader, [broadcast(reader, value, shape, where) for value in values], axis)


def joined(reader: Reader, values: Sequence[Value], axis: int) -> Value:
    """The values one behind the other along `axis`."""
    total = sum(value.shape[axis] for value in values)
    shape = [total if i == axis else n for i, n in enumerate(values[0].shape)]
    axes: list[Axis] = []
    varying = [x for x in values if x.kind is not Kind.CONSTANT] or values
    for i in range(len(shape)):
        if i == axis:
            axes.append(_concatenated([value.axes[i] for value in values], total))
            continue
        one = varying[0].axes[i]
        for value in varying[1:]:
            one = same_axis(one, value.axes[i])
        axes.append(one)
    placed, start = [], 0
    for value in values:
        stop = start + value.shape[axis]
        views = tuple(_placed(view, axis, start, total - stop) for view in value.views)
        placed.append(dataclasses.replace(value, views=views))
        start = stop
    out = merge(shape, values, tuple(axes))
    out = dataclasses.replace(out, indicator=all(value.indicator for value in values))
    return join_activations(reader, out, placed)


def _placed(view: View, axis: int, lo: int, hi: int) -> View:
    part: Axis = (Part(lo, view.axes[axis], hi),) if lo or hi else view.axes[axis]
    axes = [part if i == axis else one for i, one in enumerate(view.axes)]
    return dataclasses.replace(view, axes=tuple(axes))


def _concatenated(parts: Sequence[Axis], total: int) -> Axis:
    if len(parts) == 1:
        return parts[0]
    singles = [part[0] for part in parts if len(part) == 1 and isinstance(part[0], Label)]
    whole = _parent(singles, total) if len(singles) == len(parts) else None
    if whole is not None:
        return (whole,)
    label = Label(total)
    start = 0
    for part in parts:
        size = math.prod(atom.size for atom in part)
        named = [atom for atom in part if isinstance(atom, Label)]
        if len(part) == 1 and named:
            label.name_piece(start, named[0])
        elif named:
            label.name_piece(start, Label(size, named))
        start += size
    return (label,)


def _parent(parts: Sequence[Label], total: int) -> Label | None:
    """The label whose slices these are, one behind the other."""
    for candidate in parts[0].parents:
        start = 0
        for part in parts:
            if candidate.size != total or not candidate.has_piece(start, part):
                break
            start += part.size
        else:
            if start == total:
                return candidate
    return None


@rule("pad")
def pad(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Puts constants around or between the entries of a value."""
    value, filler = values
    config = [tuple(ints(entry)) for entry in eqn.params["padding_config"]]
    shape = shape_of(eqn)
    if any(between for _, _, between in config):
        for view in value.views:
            reader.doubt(view, "its entries are spread by pad")
        axes = tuple(derived(size, axis) for size, axis in zip(shape, value.axes, strict=True))
        return merge(shape, values, axes)
    starts = [max(-lo, 0) for lo, _, _ in config]
    inner = [
        n + min(lo, 0) + min(hi, 0) for n, (lo, hi, _) in zip(value.shape, config, strict=True)
    ]
    value = static_slice(reader, value, starts, inner, [1] * len(inner))
    axes, views = list(value.axes), list(value.views)
    for i, (lo, hi, _) in enumerate(config):
        lo, hi = max(lo, 0), max(hi, 0)
        if lo or hi:
            label = Label(shape[i])
            for named in labels_in(axes[i])[:1]:
                exact = len(axes[i]) == 1
                label.name_piece(lo, named if exact else Label(inner[i], labels_in(axes[i])))
            axes[i] = (label,)
            views = [_placed(view, i, lo, hi) for view in views]
    out = merge(shape, (value, filler), tuple(axes))
    return dataclasses.replace(out, views=tuple(views), indicator=value.indicator)
