"""Rules for products that are no plain ones: with ragged groups, and convolutions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.atoms import (
    Axis,
    CannotFollow,
    same_axis,
)
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.products import _free
from muon_jax._routing.use.reader import Reader, rule, shape_of
from muon_jax._routing.use.uses import used
from muon_jax._routing.use.values import Kind, Value, labels_in, merge

Pairs = tuple[Sequence[int], Sequence[int]]


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """A product whose rows choose among groups of matrices: the groups are a stack."""
    lhs, rhs = values[:2]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    groups = [*numbers.rhs_group_dimensions]
    ragged = [*numbers.lhs_ragged_dimensions]
    if lhs.kind is not Kind.DATA or not groups or {*ragged} & {*contract[0]}:
        raise CannotFollow
    shape = shape_of(eqn)
    free = [i for i in _free(rhs, 1, contract, batch) if i not in groups]
    axes = (
        *(same_axis(lhs.axes[i], rhs.axes[j]) for i, j in zip(*batch, strict=True)),
        *(lhs.axes[i] for i in _free(lhs, 0, contract, batch)),
        *(rhs.axes[i] for i in free),
    )
    out = merge(shape, (lhs, rhs, *values[2:]), axes)
    if rhs.kind is not Kind.PARAMETER:
        if any(len(view.live) > 1 for value in (lhs, rhs) for view in value.views):
            raise CannotFollow
        return out
    along = {j: i for i, j in zip(*batch, strict=True)}
    # The groups run along with the rows, in pieces of computed lengths: no label says which.
    act = dataclasses.replace(lhs, axes=(*lhs.axes, (Label(1),)))
    pairs = [*((i, j) for j, i in along.items()), *((len(lhs.axes), j) for j in groups)]
    contracted = [*zip(*contract, strict=True)]
    return used(reader, out, act, rhs, contracted, pairs, kind="ragged product")


@rule("conv_general_dilated")
def convolution(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """A convolution: its window and its input channels are fan-in."""
    lhs, rhs = values
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn)
    (l_batch, l_in, *l_window), (r_out, r_in, *r_window) = numbers.lhs_spec, numbers.rhs_spec
    if lhs.kind is not Kind.DATA or eqn.params["batch_group_count"] != 1:
        raise CannotFollow
    groups = eqn.params["feature_group_count"]
    axes: list[Axis] = [()] * len(shape)
    o_batch, o_out, *o_window = numbers.out_spec
    axes[o_batch], axes[o_out] = lhs.axes[l_batch], rhs.axes[r_out]
    for out_axis, in_axis in zip(o_window, l_window, strict=True):
        axes[out_axis] = (Label(shape[out_axis], labels_in(lhs.axes[in_axis])),)
    out = merge(shape, values, tuple(axes))
    if rhs.kind is Kind.PARAMETER:
        act = dataclasses.replace(lhs, axes=(*lhs.axes, *((Label(1),) for _ in r_window)))
        pairs = [(l_in, r_in), *((len(lhs.axes) + i, j) for i, j in enumerate(r_window))]
        return used(
            reader, out, act, rhs, pairs, [], "convolution", groups,
            depthwise=groups > 1 and rhs.shape[r_in] == 1,
        )  # fmt: skip
    if any(view for value in values for view in value.views):
        raise CannotFollow
    return out
