"""A product of activations with a parameter: what it says of the parameter's axes."""

import dataclasses
from collections.abc import Sequence

from muon_jax._routing.use.atoms import (
    Axis,
    CannotFollow,
    Digit,
    Part,
    align,
    leaves,
    length,
    take,
)
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.operands import is_flat
from muon_jax._routing.use.reader import Reader, Use
from muon_jax._routing.use.values import Value, View, is_whole, labels_in

Pairs = tuple[Sequence[int], Sequence[int]]


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
