"""Rules for what is taken and written by arrays of indices."""

import dataclasses
from typing import Any

from muon_jax._routing.use.atoms import Axis, CannotFollow, Digit, Gap
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Reader, ints, rule, shape_of
from muon_jax._routing.use.slices import chosen, window, written_into
from muon_jax._routing.use.values import Kind, Taken, Value, derived, fresh_axes, merge


@rule("gather")
def gather(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Entries, rows or windows, taken by an array of indices."""
    operand, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], ints(eqn.params["slice_sizes"])
    shape = shape_of(eqn)
    collapsed, batching = {*numbers.collapsed_slice_dims}, [*numbers.operand_batching_dims]
    index_batching = [*numbers.start_indices_batching_dims]
    started = {*numbers.start_index_map}
    passed = [i for i in range(len(operand.shape)) if i not in collapsed and i not in batching]
    # The axes of the outcome: those of slices, and those of the indices, in their order.
    of_slices = [*numbers.offset_dims]
    of_indices = [i for i in range(len(shape)) if i not in of_slices]
    index_axes = [i for i in range(len(indices.shape)) if i != len(indices.shape) - 1]
    if len(of_indices) != len(index_axes) or len(of_slices) != len(passed):
        raise CannotFollow
    sliced = [sizes[i] for i in range(len(operand.shape))]
    windowed = [i for i in passed if sizes[i] != operand.shape[i]]
    if windowed and batching:
        raise CannotFollow
    if windowed:
        inner = [operand.shape[i] if i not in windowed else sliced[i] for i in range(len(sliced))]
        operand = window(reader, operand, inner, [])
    places = dict(zip(of_slices, passed, strict=True))
    order = dict(zip(of_indices, index_axes, strict=True))
    axes: list[Axis] = []
    for new in range(len(shape)):
        if new in places:
            axes.append(operand.axes[places[new]])
        elif order[new] in index_batching:
            axes.append(operand.axes[batching[index_batching.index(order[new])]])
        else:
            axes.append(
                indices.axes[order[new]]
                if indices.kind is not Kind.CONSTANT
                else (Label(shape[new]),)
            )
    is_scalar = not of_indices
    views = []
    for view in operand.views:
        view_axes: list[Axis] = [(Gap(size),) for size in shape]
        for new, old in places.items():
            view_axes[new] = view.axes[old]
        for new, old in order.items():
            if old in index_batching:
                view_axes[new] = view.axes[batching[index_batching.index(old)]]
        taken = set()
        for old in sorted(collapsed & started):
            for digit in view.digits(view.axes[old]):
                if is_scalar and indices.kind is not Kind.DATA:
                    taken.add(Taken(digit.axis, "loop"))
                elif indices.kind is Kind.CONSTANT and not batching:
                    # A fixed permutation or choice of entries: the axis is still there.
                    for new in of_indices:
                        mixed = Digit(digit.axis, shape[new], None, None)
                        view_axes[new] = _scrambled(view_axes[new], mixed)
                else:
                    taken.add(Taken(digit.axis, "rows"))
        views.append(dataclasses.replace(view, axes=tuple(view_axes), taken=view.taken | taken))
    merged = merge(shape, (operand, indices), tuple(axes))
    hot = {new for new, old in places.items() if old in operand.onehot}
    out = dataclasses.replace(
        merged,
        kind=max(operand.kind, Kind.CONSTANT)
        if operand.kind is Kind.PARAMETER
        else max(operand.kind, indices.kind),
        views=tuple(views),
        parameters=operand.parameters,
        pending=operand.pending,
        behind=operand.behind,
        fresh=operand.fresh,
        onehot=frozenset(hot) if operand.kind is Kind.CONSTANT else frozenset(),
        indicator=operand.indicator,
    )
    return chosen(reader, out, [indices])


def _scrambled(axis: Axis, digit: Digit) -> Axis:
    return (digit,) if all(isinstance(atom, Gap) for atom in axis) else (*axis[:-1], digit)


@rule("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max")
def scatter(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Entries written or added by an array of indices."""
    operand, _, updates = values
    numbers = eqn.params["dimension_numbers"]
    hidden = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(operand.shape)) if i not in hidden]
    axes: list[Axis] = list(operand.axes)
    for i in range(len(axes)):
        if operand.kind is Kind.CONSTANT:
            axes[i] = (Label(operand.shape[i]),)
    for old, new in zip(kept, numbers.update_window_dims, strict=True):
        same = operand.shape[old] == updates.shape[new]
        axes[old] = (
            updates.axes[new]
            if same and operand.kind is Kind.CONSTANT
            else derived(operand.shape[old], axes[old], updates.axes[new])
        )
    return written_into(reader, eqn, values, tuple(axes))


@rule("top_k")
def top_k(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """The largest entries along the last axis, and where they lie."""
    (value,) = values
    for view in value.views:
        reader.doubt(view, "only its largest entries are used")
    shape = shape_of(eqn)
    axes = tuple(
        old if size == before else fresh_axes((size,))[0]
        for old, size, before in zip(value.axes, shape, value.shape, strict=True)
    )
    return [merge(shape, values, axes) for _ in eqn.outvars]
