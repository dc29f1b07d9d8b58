"""Several values taken together entry by entry: what becomes of their axes and views."""

import dataclasses
from collections.abc import Sequence

from muon_jax._routing.use.atoms import Axis, Gap, leaves, same_axis
from muon_jax._routing.use.reader import Meeting, Reader
from muon_jax._routing.use.values import Kind, Value, View, gaps, labels_in, merge


def check_by_hand(reader: Reader, view: View) -> None:
    """Doubt a parameter that was multiplied entry by entry, and then summed as in a product."""
    if view.mixed and any(x != y for x in view.contracted for y in view.free):
        summed, free = sorted(view.contracted), sorted(view.free)
        reader.note(
            view.leaf,
            "doubt",
            f"multiplied or added by hand, then summed over its axis {summed[0]} while axis "
            f"{free[0]} stays: maybe a product",
        )


def scaled(reader: Reader, out: Value, values: Sequence[Value]) -> None:
    """Note axes along which a matrix's outcome is multiplied by what is neither mask nor label.

    Summed over, such an axis is the input of a product by hand, as of a head that is a vector.
    """
    values = [x if x.shape == out.shape else spread(x, out.shape) for x in values]
    for value, other in (values, values[::-1]):
        if not value.pending or other.pending:
            continue
        flat = [is_flat(axis) for axis in value.axes], [is_flat(axis) for axis in other.axes]
        alike = flat[0] == flat[1]
        if alike and other.kind is not Kind.PARAMETER and not other.rows:
            continue
        for i, axis in enumerate(value.axes):
            if not flat[1][i] and out.shape[i] > 1:
                for label in labels_in(axis):
                    if label.is_made:
                        label.add(("scaled", value.pending))


def met_by_hand(reader: Reader, out: Value, values: Sequence[Value]) -> Value:
    """`out` as a product of activations, if each operand is spread along an axis of the other.

    Attention without a product primitive looks so, and what meets its outcome is part of it.
    """
    values = [x if x.shape == out.shape else spread(x, out.shape) for x in values]
    if len(values) != 2 or not all(x.kind is Kind.DATA and x.pending for x in values):
        return out
    flat = [[is_flat(axis) for axis in value.axes] for value in values]
    outer = [
        {i for i, size in enumerate(out.shape) if size > 1 and a[i] and not b[i]}
        for a, b in (flat, flat[::-1])
    ]
    if not all(outer) and not out.fresh:
        return out
    reader.meetings[reader.place] = Meeting((), ((), ()), out.pending)
    if all(outer):
        for i, axis in enumerate(out.axes):
            for label in labels_in(axis):
                if not flat[0][i] and not flat[1][i]:
                    label.add(("outer",))
    return dataclasses.replace(out, fresh=out.fresh | {reader.place})


def _codes(values: Sequence[Value], rank: int) -> frozenset[int]:
    """The axes along which only what was made of one-hot codes varies."""
    return frozenset(
        i
        for i in range(rank)
        if any(i in x.onehot | x.codes for x in values)
        and all(i in x.onehot | x.codes or is_flat(x.axes[i]) for x in values)
    )


def combine(
    reader: Reader,
    values: Sequence[Value],
    shape: Sequence[int],
    *,
    is_sum: bool,
    quietly: bool = False,
) -> Value:
    """What several values of one shape, or scalars, make entry by entry.

    Args:
      reader: the reader.
      values: the operands.
      shape: the shape of the outcome.
      is_sum: whether it is linear in the operands together.
      quietly: whether no gradient passes, so that nothing is to be noted.
    """
    shape = tuple(shape)
    values = [x if x.shape == shape else spread(x, shape) for x in values]
    varying = [x for x in values if x.kind is not Kind.CONSTANT]
    axes = gaps(shape)
    for value in varying:
        axes = tuple(same_axis(a, b) for a, b in zip(axes, value.axes, strict=True))
    # A constant's own labels would unite whatever it is used with.
    for value in values:
        if value.kind is Kind.CONSTANT:
            axes = tuple(
                b if all(isinstance(atom, Gap) for atom in a) else a
                for a, b in zip(axes, value.axes, strict=True)
            )
    out = merge(shape, values, axes)
    out = dataclasses.replace(out, codes=_codes(values, len(shape)))
    if quietly:
        return dataclasses.replace(out, parameters=frozenset())
    if not is_sum:
        _doubt_products(reader, values)
        out = dataclasses.replace(out, by_rows=_spread_rows(values))
    else:
        for leaf in {leaf for value in values for leaf in value.by_rows}:
            text = "activations multiply it row by row, which adds up: maybe a product"
            reader.note(leaf, "doubt", text)
    return join_activations(reader, out, values)


def _spread_rows(values: Sequence[Value]) -> frozenset[int]:
    """The parameters of which a row is multiplied by activations that do not vary along it."""
    out = set()
    for value in values:
        others = [x for x in values if x.kind is Kind.DATA and x is not value]
        for view in value.views if value.kind is Kind.PARAMETER and others else ():
            along = [i for i, axis in enumerate(view.axes) if view.digits(axis)]
            if any(taken.how != "rows" for taken in view.taken) and all(
                is_flat(other.axes[i]) for i in along for other in others
            ):
                out.add(view.leaf)
    return frozenset(out)


def spread(value: Value, shape: tuple[int, ...]) -> Value:
    """A scalar, or a value with axes of length 1, as one of `shape`, along which it is the same."""
    kept = {i for i, size in enumerate(value.shape) if size == shape[i]}
    return dataclasses.replace(
        value,
        shape=shape,
        axes=_widened(value.axes, value.shape, shape),
        views=tuple(
            view.replace_axes(_widened(view.axes, value.shape, shape)) for view in value.views
        ),
        onehot=value.onehot & kept,
        single=value.single & kept,
        counts=value.counts & kept,
        codes=value.codes & kept,
    )


def _widened(
    axes: tuple[Axis, ...], before: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Axis, ...]:
    if not axes:
        return gaps(shape)
    return tuple(
        axis if old == new else (Gap(new),)
        for axis, old, new in zip(axes, before, shape, strict=True)
    )


def _doubt_products(reader: Reader, values: Sequence[Value]) -> None:
    """Doubt different parameters whose matrices are multiplied entry by entry."""
    views = [
        view
        for value in values
        if value.kind is Kind.PARAMETER
        for view in value.views
        if len(view.live) > 1 and not view.contracted
    ]
    if len({view.leaf for view in views}) > 1:
        for view in views:
            reader.doubt(view, "multiplied entry by entry with another parameter")


def join_activations(reader: Reader, out: Value, values: Sequence[Value]) -> Value:
    """`out` with the views of its operands, which mix where one operand is an activation."""
    if out.kind is not Kind.DATA:
        views = [view for value in values for view in value.views]
        whole = {view.leaf for view in views if not view.contracted}
        # A norm or a mean of a parameter does not hide the parameter itself beside it.
        views = [view for view in views if not view.contracted or view.leaf not in whole]
        return dataclasses.replace(out, views=tuple(dict.fromkeys(views)))
    views = []
    for number, value in enumerate(values):
        others = [x for i, x in enumerate(values) if i != number and x.kind is Kind.DATA]
        for view in value.views:
            if view.mixed:
                views.append(view)
                continue
            if not view.contracted:
                reader.note(view.leaf, "elementwise", "added or multiplied entry by entry")
            free = {
                digit.axis
                for i, axis in enumerate(view.axes)
                for digit in view.digits(axis)
                if others and all(is_flat(other.axes[i]) for other in others)
            }
            views.append(dataclasses.replace(view, mixed=True, free=view.free | free))
    return dataclasses.replace(out, views=tuple(dict.fromkeys(views)))


def is_flat(axis: Axis) -> bool:
    """Whether nothing varies along an axis."""
    return bool(axis) and all(isinstance(atom, Gap) for atom in leaves(axis))
