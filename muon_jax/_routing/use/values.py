"""What is known of a value in the traced program."""

import dataclasses
import enum
import math
from collections.abc import Iterable, Sequence

from muon_jax._routing.use.atoms import Axis, Digit, Gap, leaves, same_axis
from muon_jax._routing.use.labels import Label


class Kind(enum.IntEnum):
    """What a value depends on: the highest that holds."""

    CONSTANT = 0
    PARAMETER = 1
    DATA = 2


@dataclasses.dataclass(frozen=True)
class Taken:
    """An axis of a parameter, or a digit of one, at a single place.

    Attributes:
      axis: the parameter's axis.
      how: ``"scan"``, ``"index"`` (a static place), ``"loop"`` (a scalar that the program
        computes) or ``"rows"`` (an array of indices).
      base: the place, where it is static.
      digit: what is put back where a scan stacks its results.
      scan: the scan that took it.
    """

    axis: int
    how: str
    base: int | None = None
    digit: Digit | None = None
    scan: tuple | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """Which entries of a parameter lie where in a value.

    Attributes:
      leaf: the parameter's number.
      lengths: the length of each of its axes, as this part of the program sees it.
      axes: the atoms of each axis of the value: `Digit`s, `Gap`s and `Part`s.
      taken: the axes that are not there any more.
      mixed: whether activations were multiplied with it or added to it.
      free: the parameter's axes along which those activations did not vary.
      contracted: the parameter's axes that were summed over since.
    """

    leaf: int
    lengths: tuple[int, ...]
    axes: tuple[Axis, ...]
    taken: frozenset[Taken] = frozenset()
    mixed: bool = False
    free: frozenset[int] = frozenset()
    contracted: frozenset[int] = frozenset()

    def digits(self, axis: Axis) -> list[Digit]:
        """The digits in one axis that say something: those longer than 1."""
        return [x for x in leaves(axis) if isinstance(x, Digit) and x.size > 1]

    @property
    def live(self) -> frozenset[int]:
        """The parameter's axes that are still there, longer than 1."""
        return frozenset(digit.axis for axis in self.axes for digit in self.digits(axis))

    def replace_axes(self, axes: Iterable[Axis]) -> "View":
        """The same parameter with axes of a moved or reshaped value.

        Digits of length 1 that are gone stay known as places.
        """
        axes = tuple(axes)
        before = {x for axis in self.axes for x in leaves(axis) if isinstance(x, Digit)}
        after = {x for axis in axes for x in leaves(axis) if isinstance(x, Digit)}
        gone = {
            Taken(x.axis, "index" if x.base is not None else "loop", x.base)
            for x in before - after
            if x.size == 1 and self.lengths[x.axis] > 1
        }
        return dataclasses.replace(self, axes=axes, taken=self.taken | gone)


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of one value.

    Attributes:
      shape: its shape.
      kind: what it depends on.
      axes: the labels of each axis.
      views: the parameters whose entries lie in it.
      parameters: the numbers of the parameters it is made of, if it depends on nothing else.
      pending: the products whose outcome reaches it without another product, as bits.
      behind: all the products whose outcome reaches it, as bits.
      fresh: the products of activations since the last one with a parameter.
      onehot: the axes along which one entry is 1 and the others 0.
      single: the axes along which one entry at most is not 0, as of a one-hot code's multiples.
      decided: whether whole numbers or truth values that activations made are in it.
      counts: the axes along which a constant counts 0, 1, 2, ...
      indicator: whether it is 0 or 1 everywhere, from a comparison.
      codes: the axes along which it was made of one-hot codes, by sums, masks or scales.
      rows: whether rows of a parameter are in it that no product has used yet.
      by_rows: the parameters a row of which activations spread here, as in a product row by row.
      exponential: whether it is an exponential, entry by entry.
    """

    shape: tuple[int, ...]
    kind: Kind
    axes: tuple[Axis, ...]
    views: tuple[View, ...] = ()
    parameters: frozenset[int] = frozenset()
    pending: int = 0
    behind: int = 0
    fresh: frozenset[tuple] = frozenset()
    onehot: frozenset[int] = frozenset()
    single: frozenset[int] = frozenset()
    decided: bool = False
    counts: frozenset[int] = frozenset()
    indicator: bool = False
    codes: frozenset[int] = frozenset()
    rows: bool = False
    exponential: bool = False
    by_rows: frozenset[int] = frozenset()

    def touches(self) -> frozenset[int]:
        """The parameters whose entries are in it, in whatever form."""
        return self.parameters | {view.leaf for view in self.views}

    def tidy(self, is_inexact: bool) -> "Value":
        """Without what no gradient passes, and without views that show no matrix any more."""
        if not is_inexact:
            decided = self.decided or bool(self.behind)
            return dataclasses.replace(
                self, views=(), pending=0, behind=0, fresh=frozenset(), decided=decided
            )
        views = tuple(
            dict.fromkeys(
                view
                for view in self.views
                if len(view.live) > 1 or (self.kind is not Kind.DATA and view.live)
            )
        )
        return self if views == self.views else dataclasses.replace(self, views=views)


def fresh_axes(shape: Sequence[int], data: bool = False) -> tuple[Axis, ...]:
    """Labels of which nothing is known yet, or that they are axes of the batch."""
    return tuple((Label(size, (), data),) for size in shape)


def derived(size: int, *axes: Axis) -> Axis:
    """An axis made of others in a way that cannot be followed entry by entry."""
    return (Label(size, labels_in(*axes)),)


def labels_in(*axes: Axis) -> list[Label]:
    """The labels of some axes."""
    return [x for axis in axes for x in leaves(axis) if isinstance(x, Label)]


def gaps(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Axes along which nothing varies."""
    return tuple((Gap(size),) for size in shape)


def constant(shape: Sequence[int]) -> Value:
    """A constant that may vary along all its axes."""
    return Value(tuple(shape), Kind.CONSTANT, fresh_axes(shape))


def parameter(leaf: int, shape: tuple[int, ...], axes: tuple[Axis, ...]) -> Value:
    """A parameter as the program receives it."""
    view = View(leaf, shape, tuple((Digit(i, size),) for i, size in enumerate(shape)))
    return Value(shape, Kind.PARAMETER, axes, (view,), frozenset({leaf}))


def merge(shape: Sequence[int], values: Sequence[Value], axes: tuple[Axis, ...]) -> Value:
    """A value that depends on all of `values`, with nothing known of its entries."""
    kind = max((value.kind for value in values), default=Kind.CONSTANT)
    pending = behind = 0
    fresh: frozenset[tuple] = frozenset()
    parameters: frozenset[int] = frozenset()
    for value in values:
        pending |= value.pending
        behind |= value.behind
        fresh |= value.fresh
        parameters |= value.parameters
    rows, decided = (any(getattr(x, name) for x in values) for name in ("rows", "decided"))
    if kind is Kind.DATA:
        parameters = frozenset()
    return Value(
        tuple(shape), kind, axes, (), parameters, pending, behind, fresh, rows=rows, decided=decided
    )


def join(a: Value, b: Value) -> Value:
    """What holds of both: for the carry of a loop and the branches of a condition."""
    axes = tuple(same_axis(x, y) for x, y in zip(a.axes, b.axes, strict=True))
    kind = max(a.kind, b.kind)
    views = dict.fromkeys((*a.views, *b.views))
    if kind is Kind.DATA:
        views = dict.fromkeys(dataclasses.replace(view, mixed=True) for view in views)
    out = merge(a.shape, (a, b), axes)
    return dataclasses.replace(
        out,
        views=tuple(views),
        onehot=a.onehot & b.onehot,
        counts=a.counts & b.counts if a.kind is b.kind else frozenset(),
        indicator=a.indicator and b.indicator,
        codes=a.codes | b.codes,
    )


def is_as(a: Value, b: Value) -> bool:
    """Whether nothing is new in `a` against `b`, but for labels."""
    return dataclasses.replace(a, axes=b.axes) == b


def is_whole(view: View, axis: int) -> bool:
    """Whether all entries along a parameter's axis are there."""
    sizes = [d.size for one in view.axes for d in view.digits(one) if d.axis == axis]
    return math.prod(sizes) == view.lengths[axis]
