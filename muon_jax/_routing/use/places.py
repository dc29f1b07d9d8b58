"""Axes taken place by place: layers, experts, or heads and tiles, which look the same.

The places of a stack follow each other, as layers do, or stay apart from attention, as experts do.
Where a layer repeats all places follow each other: only the first round counts, and in a loop what
its own rounds leave to the next.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from muon_jax._routing.use.doubts import Doubt
from muon_jax._routing.use.reader import Reader, Use, bits


class Places:
    """The places at which the parameters of a program are taken.

    Args:
      reader: the reader of the program, which it has read.
    """

    def __init__(self, reader: Reader):
        self._reader = reader
        self._equations = {use.product: at for at, uses in reader.uses.items() for use in uses}
        self._by_product = {uses[0].product: uses for uses in reader.uses.values() if uses}

    def check(self, leaf: int, uses: list[Use]) -> None:
        """Doubt an axis taken place by place whose places meet as heads do in attention.

        Any product of activations may be attention here, and so may what can't be followed.
        """
        if not any(taken.how in ("index", "scan", "loop") for use in uses for taken in use.taken):
            return
        met = functools.reduce(
            int.__or__, (meeting.pending for meeting in self._reader.meetings.values()), 0
        )
        if any(use.fresh or self._reach(use) & met for use in uses):
            self.check_chain(
                leaf, uses, "taken place by place, and the places meet in attention: heads?"
            )
        self._check_tiles(leaf, uses)

    def _reach(self, use: Use) -> int:
        """A product and those after it that belong to the same place, as bits.

        A short convolution or a norm's matrix of the same head stands between it and attention.
        """
        mine = {(t.base, t.scan, self._reader.shapes[use.leaf][t.axis]) for t in use.taken}
        reach, todo = 0, [use.product]
        while todo:
            number = todo.pop()
            if reach >> number & 1:
                continue
            reach |= 1 << number
            for other in bits(self._reader.followers[number]):
                for after in self._by_product.get(other, []):
                    shape = self._reader.shapes[after.leaf]
                    places = {(t.base, t.scan, shape[t.axis]) for t in after.taken}
                    if after.depthwise or places & mine:
                        todo.append(other)
        return reach

    def _check_tiles(self, leaf: int, uses: list[Use]) -> None:
        """Doubt places whose activations are pieces of one and the same axis."""
        shape = self._reader.shapes[leaf]
        text = "is taken place by place, and the activations too, in pieces of an axis: one matrix?"
        for use in uses:
            summed = {id(x.root) for labels in use.contracted.values() for x in labels or []}
            for taken in use.taken:
                for labels in use.contracted.values():
                    for label in labels or []:
                        for parent in label.parents:
                            for factors in parent.factors:
                                others = [x for x in factors if id(x.root) not in summed]
                                size = math.prod(x.size for x in others)
                                if label in factors and size == shape[taken.axis] > 1:
                                    raise Doubt(f"axis {taken.axis} {text}")
        for axis, groups in self._rounds(uses):
            for one, other in itertools.combinations([group[0] for group in groups], 2):
                for a, b in zip(one.acts, other.acts, strict=False):
                    # A sum unites the pieces: what they were called before tells them apart.
                    apart = len(a) == len(b) == 1 and a[0] is not b[0]
                    chained = other.first >> one.product & 1
                    if apart and not chained and {*a[0].parents} & {*b[0].parents}:
                        raise Doubt(f"axis {axis} {text}")

    def _rounds(self, uses: list[Use]) -> Iterator[tuple[int, list[list[Use]]]]:
        """For each axis taken at static places the uses that differ in it alone, by place."""
        for axis in sorted({t.axis for use in uses for t in use.taken if t.how == "index"}):
            rounds: dict[Any, dict[Any, list[Use]]] = {}
            for use in uses:
                mine = tuple(sorted(str(t.base) for t in use.taken if t.axis == axis))
                rest = frozenset(t for t in use.taken if t.axis != axis)
                rounds.setdefault(rest, {}).setdefault(mine, []).append(use)
            for places in rounds.values():
                groups = [sorted(group, key=lambda use: use.product) for group in places.values()]
                yield axis, sorted(groups, key=lambda group: group[0].product)

    def check_chain(self, leaf: int, uses: list[Use], text: str) -> None:
        """Doubt unless what is taken at one place comes before what is taken at the next.

        Where a layer repeats, all comes before all: only the first round counts, and in a loop only
        what one round of that very loop leaves to the next.
        """
        for axis, groups in self._rounds(uses):
            for before, after in itertools.pairwise(groups):
                if not after[0].first >> before[0].product & 1:
                    raise Doubt(f"axis {axis} is {text}")
        for use in uses:
            for taken in use.taken:
                if taken.how not in ("scan", "loop"):
                    continue
                bit = (
                    self._reader.loop_bit(taken.scan)
                    if taken.scan is not None
                    else self._reader.innermost(self._equations[use.product])
                )
                if not use.behind & bit:
                    raise Doubt(f"axis {taken.axis} is {text}")
