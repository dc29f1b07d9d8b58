"""Rules for products: what they sum over is fan-in, what stays is fan-out, a batch is a stack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from muon_jax._use.atoms import (
    Axis,
    CannotFollow,
    Digit,
    Gap,
    Part,
    align,
    leaves,
    length,
    same_axis,
    take,
)
from muon_jax._use.elementwise import check_by_hand, combine, is_flat
from muon_jax._use.labels import Label
from muon_jax._use.reader import Meeting, Reader, Use, restructure, rule, shape_of
from muon_jax._use.structure import broadcast, chosen
from muon_jax._use.values import Kind, Taken, Value, View, is_whole, labels_in, merge

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
        if hot and one.kind is Kind.DATA and len(contract[0]) == 1:
            if other.kind is Kind.PARAMETER:
                return _rows(reader, one, other, contract, batch, shape, sides)
            break
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
        labels = labels_in(*(value.axes[i] for i in contract[side]))
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
    """Rows of a parameter, taken by a one-hot code."""
    axis = contract[1 - side][0]
    rest = dataclasses.replace(hot, onehot=frozenset(), indicator=False)
    lhs, rhs = (rest, table) if side == 0 else (table, rest)
    out = merge(shape, (lhs, rhs), _axes(lhs, rhs, contract, batch))
    order = [*batch[1 - side], *_free(table, 1 - side, contract, batch)]
    views = []
    for view in table.views:
        taken = {Taken(digit.axis, "rows") for digit in view.digits(view.axes[axis])}
        start = len(batch[0])
        if side == 0:
            start += len(_free(hot, 0, contract, batch))
        places = [*range(len(batch[0])), *range(start, start + len(order) - len(batch[0]))]
        axes: list[Axis] = [(Gap(size),) for size in shape]
        for old, new in zip(order, places, strict=True):
            axes[new] = view.axes[old]
        views.append(dataclasses.replace(view, axes=tuple(axes), taken=view.taken | taken))
    out = dataclasses.replace(
        out, kind=Kind.PARAMETER, views=tuple(views), parameters=table.parameters
    )
    return chosen(reader, out, [hot])


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


# --- Activations with activations -----------------------------------------------------------------


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
    views = _moved(reader, lhs, rhs, contract, batch, met=True)
    return dataclasses.replace(out, views=tuple(views), fresh=out.fresh | {place})


# --- Activations with parameters ------------------------------------------------------------------


def used(
    reader: Reader,
    out: Value,
    act: Value,
    weight: Value,
    contract: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    kind: str = "product",
    groups: int = 1,
    depthwise: bool = False,
) -> Value:
    """A product of activations with a parameter: the outcome, `out`, as such.

    Args:
      reader: the reader.
      out: the outcome, as of any product.
      act: the activations.
      weight: the parameter, or what was made of parameters.
      contract: the pairs of axes that are summed over; the activations' first.
      batch: the pairs of axes that run along.
      kind: see `Use`.
      groups: see `Use`.
      depthwise: see `Use`.
    """
    number = reader.product(out.pending)
    first = reader.first.setdefault(reader.place, out.behind)
    summed, along = {j: i for i, j in contract}, {j: i for i, j in batch}
    uses = []
    for view in weight.views:
        twins = [x for x in weight.views if x.leaf == view.leaf]
        if any(x.taken != view.taken for x in twins):
            reader.note(view.leaf, "doubt", "several pieces of it are joined for one product")
        if act.indicator and kind == "product":
            reader.doubt(view, "product with zeros and ones from a comparison: maybe rows by index")
        elif kind == "product" and any(i in act.onehot | act.codes for i, _ in contract):
            reader.doubt(view, "product with what was made of one-hot codes: maybe rows by index")
        if view.contracted:
            reader.note(view.leaf, "doubt", "is summed over before it is used")
            continue
        use = Use(
            view.leaf,
            number,
            kind,
            {},
            frozenset(),
            {},
            view.taken,
            frozenset(
                axis for axis in view.live if not is_whole(view, axis) and not _is_taken(view, axis)
            ),
            out.behind,
            first,
            tuple(tuple(labels_in(axis)) for axis in act.axes),
            act.fresh,
            groups,
            depthwise,
        )
        free: set[int] = set()
        shape = reader.shapes[view.leaf]
        for axis, atoms in enumerate(view.axes):
            for place, digit in enumerate(x for x in leaves(atoms) if isinstance(x, Digit)):
                # On a device's piece, an axis may be a single entry long and still be an axis.
                if digit.size == 1 and not view.lengths[digit.axis] < shape[digit.axis]:
                    continue
                if axis in summed:
                    labels = _labels_at(act.axes[summed[axis]], atoms, place)
                    _extend(use.contracted, digit.axis, labels)
                elif axis in along:
                    met = act.axes[along[axis]]
                    if _is_flat_at(met, atoms, place):
                        free.add(digit.axis)
                    else:
                        labels = _labels_at(met, atoms, place)
                        use.batch.setdefault(digit.axis, []).extend(labels or [])
                else:
                    free.add(digit.axis)
        uses.append(dataclasses.replace(use, free=frozenset(free)))
        if {*use.contracted} & free:
            reader.cut.add(view.leaf)
    reader.uses[reader.place] = uses
    for axis, atoms in enumerate(weight.axes):
        if axis not in summed and axis not in along:
            for label in labels_in(atoms):
                label.add(("free",))
    for role, axes in (("contracted", summed.values()), ("batch", along.values())):
        for label in labels_in(*(act.axes[i] for i in axes)):
            label.add(("weight", reader.place, role))
    return dataclasses.replace(
        out,
        views=(),
        pending=1 << number,
        behind=out.behind | 1 << number,
        fresh=frozenset(),
        rows=False,
    )


def _is_taken(view: View, axis: int) -> bool:
    return any(taken.axis == axis for taken in view.taken)


def _extend(
    contracted: dict[int, list[Label] | None], axis: int, labels: list[Label] | None
) -> None:
    known = contracted.get(axis, [])
    contracted[axis] = None if labels is None or known is None else [*known, *labels]


def _at(met: Axis, atoms: Axis, place: int) -> Axis:
    """The atoms of the activations' axis where the `place`-th digit of a parameter's lies."""
    if len(atoms) == 1 and isinstance(atoms[0], Part):
        part = atoms[0]
        met, atoms = take(met, part.lo, length(part.atoms)), part.atoms
    digits = [i for i, atom in enumerate(atoms) if isinstance(atom, Digit)]
    if any(isinstance(atom, Part) for atom in atoms):
        raise CannotFollow
    return align(met, [atom.size for atom in atoms])[digits[place]]


def _labels_at(met: Axis, atoms: Axis, place: int) -> list[Label] | None:
    try:
        return labels_in(_at(met, atoms, place))
    except (CannotFollow, LookupError):
        return None


def _is_flat_at(met: Axis, atoms: Axis, place: int) -> bool:
    try:
        return is_flat(_at(met, atoms, place))
    except (CannotFollow, LookupError):
        return False


# --- Other products -------------------------------------------------------------------------------


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
