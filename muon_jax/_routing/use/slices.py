"""Rules for primitives that cut a value, at places that are written or computed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.atoms import (
    Atom,
    Axis,
    CannotFollow,
    Digit,
    Gap,
    Part,
    leaves,
    same_axis,
    take,
)
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Reader, ints, restructure, rule, shape_of
from muon_jax._routing.use.structure import keep_axes
from muon_jax._routing.use.values import Kind, Taken, Value, View, derived, labels_in, merge


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
    places = [*zip(map(int, starts), shape, steps, strict=True)]
    moved = {i: i for i, size in enumerate(shape) if size == value.shape[i]}
    # Labels that cannot be cut in one axis are cut in the others all the same.
    labels = tuple(
        _label_slice(axis, *place) for axis, place in zip(value.axes, places, strict=True)
    )
    out = restructure(
        reader,
        value,
        shape,
        lambda axes: [take(axis, *place) for axis, place in zip(axes, places, strict=True)],
        moved,
        "a slice",
    )
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
    moved = {i: i for i, size in enumerate(shape) if size == value.shape[i]}
    out = restructure(
        reader,
        value,
        shape,
        lambda axes: [_anywhere(axis, size) for axis, size in zip(axes, shape, strict=True)],
        moved,
        "a slice of computed place",
    )
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
