"""What an axis of an array consists of: the digits of a mixed-radix number, major first.

An axis of a value in a traced program is a tuple of atoms, whose sizes multiply to its length. A
reshape cuts and joins atoms, a transposition moves them, and a slice shortens them:

    kernel [8, 32]           (in 8), (out 32)
    reshape [8, 4, 8]        (in 8), (out 4, stride 8), (out 8, stride 1)
    [:, 1:3]                 (in 8), (out 2, stride 8, from 8), (out 8, stride 1)

Two kinds of atoms share these rules. A `Digit` says which entries of a parameter lie there, for
`View`s. A `Label` says which axes of activations are one and the same, for evidence such as "this
axis became the heads of attention". A `Gap` is an axis along which nothing varies, and a `Part`
lies in a longer axis that a concatenation made.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.labels import Label

Atom = Any
"""A `Digit`, a `Label`, a `Gap` or a `Part`."""

Axis = tuple[Atom, ...]
"""The atoms of one axis, major first; none for an axis of length 1 of which nothing is known."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """An atom along which the value does not vary, such as a broadcast one."""

    size: int

    def split(self, sizes: Sequence[int]) -> Axis:
        """As several atoms, major first."""
        return tuple(Gap(size) for size in sizes)

    def take(self, start: int, size: int, step: int = 1) -> Atom | None:
        """Every `step`-th of the entries from `start`."""
        return Gap(size)


@dataclasses.dataclass(frozen=True)
class Digit:
    """Entries of one axis of a parameter: entry i lies at ``base + stride * i`` along it.

    Attributes:
      axis: the parameter's axis.
      size: how many entries.
      stride: the distance between them; None where their order is lost.
      base: the place of the first, as far as this digit says; None where that is not known.
    """

    axis: int
    size: int
    stride: int | None = 1
    base: int | None = 0

    def split(self, sizes: Sequence[int]) -> Axis:
        """As several digits, major first."""
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        return tuple(
            Digit(
                self.axis,
                size,
                None if self.stride is None else self.stride * stride,
                self.base if i == 0 else 0,
            )
            for i, (size, stride) in enumerate(zip(sizes, strides, strict=True))
        )

    def take(self, start: int, size: int, step: int = 1) -> Atom | None:
        """Every `step`-th of the entries from `start`."""
        if self.stride is None or self.base is None:
            return Digit(self.axis, size, self.stride and self.stride * step, None)
        return Digit(self.axis, size, self.stride * step, self.base + self.stride * start)

    def anywhere(self, size: int) -> "Digit":
        """`size` entries next to each other, from a place that is not known."""
        return Digit(self.axis, size, self.stride, None)


@dataclasses.dataclass(frozen=True)
class Part:
    """Atoms that fill a part of a longer axis, of which other values or zeros fill the rest."""

    lo: int
    atoms: Axis
    hi: int

    @property
    def size(self) -> int:
        """The length of the whole axis."""
        return self.lo + length(self.atoms) + self.hi

    def split(self, sizes: Sequence[int]) -> Axis | None:
        """Nothing: a part does not lie on the grid of a reshape in general."""
        return None

    def take(self, start: int, size: int, step: int = 1) -> Atom | None:
        """Every `step`-th of the entries from `start`; None if the atoms are not there."""
        inner, stop = length(self.atoms), start + (size - 1) * step + 1
        lo, hi = max(start, self.lo), min(stop, self.lo + inner)
        if lo >= hi:
            return None
        if step != 1:
            raise CannotFollow
        atoms = take(self.atoms, lo - self.lo, hi - lo)
        if lo == start and hi == stop:
            return atoms[0] if len(atoms) == 1 else Part(0, atoms, 0)
        return Part(lo - start, atoms, stop - hi)


class CannotFollow(Exception):
    """The atoms do not lie on the grid that an operation asks for."""


def length(axis: Axis) -> int:
    """The length of an axis."""
    return math.prod(atom.size for atom in axis)


def leaves(axis: Axis) -> list[Atom]:
    """All atoms of an axis, those inside parts too."""
    return [
        inner
        for atom in axis
        for inner in (leaves(atom.atoms) if isinstance(atom, Part) else [atom])
    ]


def take(axis: Axis, start: int, size: int, step: int = 1) -> Axis:
    """The atoms of a slice.

    Raises:
      CannotFollow: where the slice cuts across atoms.
      LookupError: where the slice holds nothing of a `Part`.
    """
    if start == 0 and step == 1 and size == length(axis):
        return axis
    if not axis:
        return ()
    if len(axis) == 1:
        atom = axis[0].take(start, size, step)
        if atom is None:
            raise LookupError
        return (atom,)
    major, minor = axis[0], axis[1:]
    block = length(minor)
    if step == 1 and start % block == 0 and size % block == 0:
        return (*take((major,), start // block, size // block), *minor)
    last = start + (size - 1) * step
    if start // block == last // block:
        return (*take((major,), start // block, 1), *take(minor, start % block, size, step))
    if step % block == 0 and block > 1:
        majors = take((major,), start // block, size, step // block)
        return (*majors, *take(minor, start % block, 1))
    raise CannotFollow


def regroup(axes: Sequence[Axis], before: Sequence[int], after: Sequence[int]) -> list[Axis]:
    """The axes of a reshaped value.

    Args:
      axes: the atoms of each axis.
      before: the length of each axis.
      after: the lengths of the axes to come.

    Raises:
      CannotFollow: where an atom would have to be cut at a place that is no divisor of its size.
    """
    out: list[Axis] = [()] * len(after)
    for old, new in groups(before, after):
        if len(old) == 1 and len(new) == 1:
            out[new[0]] = axes[old[0]]
            continue
        atoms = [atom for i in old for atom in axes[i] if atom.size != 1]
        for i, axis in zip(new, _deal(atoms, [after[i] for i in new]), strict=True):
            out[i] = axis
    return out


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes, old and new, that hold the same entries; none of length 1 only."""
    pairs, i, j = [], 0, 0
    if 0 in before or 0 in after:
        raise CannotFollow
    while i < len(before) or j < len(after):
        # Axes of length 1 pair up where both sides have one, so that they keep their names.
        if i < len(before) and j < len(after) and before[i] == after[j]:
            pairs.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        if i < len(before) and before[i] == 1:
            i += 1
            continue
        if j < len(after) and after[j] == 1:
            j += 1
            continue
        old, new = [i], [j]
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
                old.append(i - 1)
            else:
                b, j = b * after[j], j + 1
                new.append(j - 1)
        pairs.append((old, new))
    return pairs


def _deal(atoms: list[Atom], sizes: Sequence[int]) -> list[Axis]:
    """Deal atoms to axes of given lengths, cutting them where needed."""
    rest, dealt = list(atoms), []
    for size in reversed(sizes):
        axis: list[Atom] = []
        missing = size
        while missing > 1:
            atom = rest.pop()
            if missing % atom.size == 0:
                axis.insert(0, atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                halves = atom.split((atom.size // missing, missing))
                if halves is None:
                    raise CannotFollow
                rest.append(halves[0])
                axis.insert(0, halves[1])
                missing = 1
            else:
                raise CannotFollow
        dealt.insert(0, _joined(axis))
    return dealt


def _joined(axis: Sequence[Atom]) -> Axis:
    """With neighbouring digits that count on joined to one."""
    out: list[Atom] = []
    for atom in axis:
        last = out[-1] if out else None
        if (
            isinstance(last, Digit)
            and isinstance(atom, Digit)
            and last.axis == atom.axis
            and last.stride is not None
            and atom.stride is not None
            and last.stride == atom.stride * atom.size
        ):
            known = last.base is not None and atom.base is not None
            base = last.base + atom.base if known else None  # type: ignore[operator]
            out[-1] = Digit(atom.axis, last.size * atom.size, atom.stride, base)
        elif isinstance(last, Gap) and isinstance(atom, Gap):
            out[-1] = Gap(last.size * atom.size)
        else:
            out.append(atom)
    return tuple(out)


def align(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The atoms of an axis, dealt to consecutive factors of its length.

    Raises:
      CannotFollow: as `regroup`.
    """
    return _deal([atom for atom in axis if atom.size != 1], sizes)


def same_axis(a: Axis, b: Axis) -> Axis:
    """Unite the labels of two axes that an operation shows to be one, and return the result.

    An axis along which a value does not vary takes on the other's labels. Where the two are cut in
    ways that have no common grid, the result is one label that stands for all.
    """
    if a == b:
        return a
    if all(isinstance(atom, Gap) for atom in a):
        return b
    if all(isinstance(atom, Gap) for atom in b):
        return a
    if len(a) == len(b) == 1 and a[0].size == b[0].size:
        return (_same(a[0], b[0]),)
    try:
        cuts = _common_cuts([x.size for x in a], [x.size for x in b])
        pieces = zip(
            itertools.chain(*align(a, cuts)), itertools.chain(*align(b, cuts)), strict=True
        )
        return tuple(_same(x, y) for x, y in pieces)
    except (CannotFollow, ValueError):
        sources = [x for x in (*leaves(a), *leaves(b)) if isinstance(x, Label)]
        return (Label(length(a), sources),)


def _same(a: Atom, b: Atom) -> Atom:
    if isinstance(a, Gap):
        return b
    if not isinstance(b, Gap):
        a.unite(b)
    return a


def _strides(sizes: list[int]) -> set[int]:
    return {math.prod(sizes[i:]) for i in range(len(sizes) + 1)}


def _common_cuts(a: list[int], b: list[int]) -> list[int]:
    """The sizes of the coarsest grid that has the cuts of both, major first."""
    cuts = sorted(_strides(a) | _strides(b), reverse=True)
    for big, small in itertools.pairwise(cuts):
        if big % small:
            raise CannotFollow
    return [big // small for big, small in itertools.pairwise(cuts)]
