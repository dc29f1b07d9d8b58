"""Rules for primitives that put values together along an axis."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.atoms import (
    Axis,
    Part,
    same_axis,
)
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.operands import join_activations
from muon_jax._routing.use.reader import Reader, ints, rule, shape_of
from muon_jax._routing.use.slices import static_slice
from muon_jax._routing.use.structure import broadcast
from muon_jax._routing.use.values import Kind, Value, View, derived, labels_in, merge


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
