"""Rules for products: what they sum over is fan-in, what stays is fan-out, a batch is a stack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.atoms import (
    Axis,
    Digit,
    Gap,
    same_axis,
)
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.operands import check_by_hand, combine
from muon_jax._routing.use.reader import Meeting, Reader, restructure, rule, shape_of
from muon_jax._routing.use.slices import chosen
from muon_jax._routing.use.structure import broadcast
from muon_jax._routing.use.uses import used
from muon_jax._routing.use.values import Kind, Taken, Value, View, labels_in, merge

Pairs = tuple[Sequence[int], Sequence[int]]


@rule("dot_general")
def dot_general(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """A product over some axes, along others."""
    contract, batch = eqn.params["dimension_numbers"]
    return _dot(reader, eqn, values[0], values[1], contract, batch)


def _dot(reader: Reader, eqn: Any, lhs: Value, rhs: Value, contract: Pairs, batch: Pairs) -> Value:
    shape = shape_of(eqn)
    if not contract[0]:
        return _outer(reader, lhs, rhs, batch, shape)
    for one, other, sides in ((lhs, rhs, 0), (rhs, lhs, 1)):
        hot = [i for i, axis in enumerate(contract[sides]) if axis in one.onehot]
        if hot and len(contract[0]) == 1 and other.kind is Kind.PARAMETER:
            return _rows(reader, one, other, contract, batch, shape, sides)
    axes = _axes(lhs, rhs, contract, batch)
    out = merge(shape, (lhs, rhs), axes)
    kinds = {lhs.kind, rhs.kind}
    reader.first.setdefault(reader.place, out.behind)
    _close(reader, lhs, rhs, contract, batch)
    if kinds == {Kind.DATA, Kind.PARAMETER}:
        sides = 1 if rhs.kind is Kind.PARAMETER else 0
        act, weight = (lhs, rhs) if sides else (rhs, lhs)
        pairs = [*zip(contract[1 - sides], contract[sides], strict=True)]
        batches = [*zip(batch[1 - sides], batch[sides], strict=True)]
        return used(reader, out, act, weight, pairs, batches)
    if kinds == {Kind.DATA}:
        return _meet(reader, out, lhs, rhs, contract, batch)
    if Kind.PARAMETER in kinds:
        _doubt_products(reader, lhs, rhs)
        number = reader.product(out.pending)
        return dataclasses.replace(out, pending=1 << number, behind=out.behind | 1 << number)
    if Kind.DATA in kinds:
        return dataclasses.replace(out, views=tuple(_moved(reader, lhs, rhs, contract, batch)))
    return out


def _close(reader: Reader, lhs: Value, rhs: Value, contract: Pairs, batch: Pairs) -> None:
    """Write down a matrix's outcome that is summed against what may be a frozen matrix."""
    for value, other, side in ((lhs, rhs, 0), (rhs, lhs, 1)):
        if not value.pending or other.pending or other.kind is Kind.PARAMETER:
            continue
        free = [
            any(x.shape[i] > 1 for i in _free(x, s, contract, batch))
            for x, s in ((value, side), (other, 1 - side))
        ]
        labels = labels_in(*(value.axes[i] for i in contract[side] if i not in value.single))
        if (any(free) or other.rows) and any(label.is_made for label in labels):
            reader.close(value.pending)


def _axes(lhs: Value, rhs: Value, contract: Pairs, batch: Pairs) -> tuple[Axis, ...]:
    both = [
        same_axis(lhs.axes[i], rhs.axes[j])
        if lhs.kind is not Kind.CONSTANT and rhs.kind is not Kind.CONSTANT
        else (rhs if lhs.kind is Kind.CONSTANT else lhs).axes[j if lhs.kind is Kind.CONSTANT else i]
        for i, j in zip(*batch, strict=True)
    ]
    free = [
        value.axes[i]
        for value, side in ((lhs, 0), (rhs, 1))
        for i in _free(value, side, contract, batch)
    ]
    return (*both, *free)


def _free(value: Value, side: int, contract: Pairs, batch: Pairs) -> list[int]:
    """The axes that stay, in the order of the outcome."""
    return [i for i in range(len(value.shape)) if i not in contract[side] and i not in batch[side]]


def _outer(reader: Reader, lhs: Value, rhs: Value, batch: Pairs, shape: tuple[int, ...]) -> Value:
    """A product that sums over nothing: entry by entry, each spread along the other's axes."""
    spread = []
    for side, value in enumerate((lhs, rhs)):
        free = _free(value, side, ((), ()), batch)
        start = len(batch[0]) + (side and len(_free(lhs, 0, ((), ()), batch)))
        places = {old: new for new, old in enumerate(batch[side])}
        places |= {old: start + i for i, old in enumerate(free)}
        order = sorted(places, key=places.__getitem__)
        moved = {old: new for new, old in enumerate(order)}
        value = restructure(
            reader,
            value,
            [value.shape[i] for i in order],
            lambda axes, order=order: [axes[i] for i in order],
            moved,
        )
        spread.append(broadcast(reader, value, shape, [places[i] for i in order]))
    return combine(reader, spread, shape, is_sum=False)


def _rows(
    reader: Reader,
    hot: Value,
    table: Value,
    contract: Pairs,
    batch: Pairs,
    shape: tuple[int, ...],
    side: int,
) -> Value:
    """Rows of a parameter, taken by a one-hot code.

    A constant code is a fixed choice of rows, as of positions: the axis is still there, mixed.
    """
    axis = contract[1 - side][0]
    is_fixed = hot.kind is Kind.CONSTANT
    rest = dataclasses.replace(hot, onehot=frozenset(), indicator=False)
    lhs, rhs = (rest, table) if side == 0 else (table, rest)
    out = merge(shape, (lhs, rhs), _axes(lhs, rhs, contract, batch))
    order = [*batch[1 - side], *_free(table, 1 - side, contract, batch)]
    views = []
    for view in table.views:
        digits = view.digits(view.axes[axis])
        taken = set() if is_fixed else {Taken(digit.axis, "rows") for digit in digits}
        start = len(batch[0])
        if side == 0:
            start += len(_free(hot, 0, contract, batch))
        places = [*range(len(batch[0])), *range(start, start + len(order) - len(batch[0]))]
        axes: list[Axis] = [(Gap(size),) for size in shape]
        for old, new in zip(order, places, strict=True):
            axes[new] = view.axes[old]
        if is_fixed:
            for new in {*range(len(batch[0]), len(shape))} - {*places}:
                axes[new] = tuple(Digit(d.axis, shape[new], None, None) for d in digits[:1])
        views.append(dataclasses.replace(view, axes=tuple(axes), taken=view.taken | taken))
    out = dataclasses.replace(
        out, kind=Kind.PARAMETER, views=tuple(views), parameters=table.parameters
    )
    return out if is_fixed else chosen(reader, out, [hot])


def _doubt_products(reader: Reader, lhs: Value, rhs: Value) -> None:
    """Doubt parameters whose matrices meet parameters or constants, and no activation."""
    for value, other in ((lhs, rhs), (rhs, lhs)):
        for view in value.views:
            if other.kind is Kind.CONSTANT:
                text = "product with a constant: pass the batch as an argument of by_use"
                reader.doubt(view, text)
            elif any(len(x.live) > 1 for x in other.views):
                reader.doubt(view, "product with another parameter")
            elif len(view.live) > 1:
                reader.note(view.leaf, "vector", "product with a vector of parameters")


def _moved(
    reader: Reader, lhs: Value, rhs: Value, contract: Pairs, batch: Pairs, met: bool = False
) -> list[View]:
    """The mixed views of the operands of a product, after it."""
    out = []
    free = (_free(lhs, 0, contract, batch), _free(rhs, 1, contract, batch))
    rank = len(batch[0]) + len(free[0]) + len(free[1])
    for side, value in enumerate((lhs, rhs)):
        for view in value.views:
            axes: list[Axis] = [()] * rank
            start = len(batch[0]) + (side and len(free[0]))
            for new, old in enumerate(batch[side]):
                axes[new] = view.axes[old]
            for i, old in enumerate(free[side]):
                axes[start + i] = view.axes[old]
            others = free[1 - side]
            start = len(batch[0]) + (len(free[0]) if side == 0 else 0)
            other = (rhs, lhs)[side]
            for i, old in enumerate(others):
                axes[start + i] = (Gap(other.shape[old]),)
            summed = {d.axis for i in contract[side] for d in view.digits(view.axes[i])}
            stays = {d.axis for i in free[side] for d in view.digits(view.axes[i])}
            view = dataclasses.replace(
                view,
                contracted=view.contracted | summed,
                free=view.free | stays if met and summed else view.free,
            )
            if met:
                check_by_hand(reader, view)
            out.append(view.replace_axes(axes))
    return out


def _meet(
    reader: Reader, out: Value, lhs: Value, rhs: Value, contract: Pairs, batch: Pairs
) -> Value:
    place = reader.place
    summed = labels_in(*(lhs.axes[i] for i in contract[0]), *(rhs.axes[i] for i in contract[1]))
    free = tuple(
        tuple(labels_in(*(value.axes[i] for i in _free(value, side, contract, batch))))
        for side, value in enumerate((lhs, rhs))
    )
    reader.meetings[place] = Meeting(tuple(summed), free, out.pending)  # type: ignore[arg-type]
    for side, value in enumerate((lhs, rhs)):
        for role, axes in (
            ("batch", batch[side]),
            ("contracted", contract[side]),
            ("free", _free(value, side, contract, batch)),
        ):
            for label in labels_in(*(value.axes[i] for i in axes)):
                label.add(("meeting", place, side, role))
        Label.join(labels_in(*(value.axes[i] for i in contract[side])), ("joint meeting", place))
    views = _moved(reader, lhs, rhs, contract, batch, met=True)
    return dataclasses.replace(out, views=tuple(views), fresh=out.fresh | {place})
