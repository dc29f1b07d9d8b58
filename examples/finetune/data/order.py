"""An endless shuffled series: every run through it has an order of its own."""

from collections.abc import Callable

import grain


def shuffled(size: int, *, seed: int) -> Callable[[int], int]:
    """The n-th index of a series that shuffles `range(size)` anew each time, for any n from 0 up.

    It is grain's, a function of n, the size and the seed: nothing is kept and nothing is drawn
    before, so that a place in it is a number.
    """
    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()

    def at(place: int) -> int:
        index = order[place]
        assert index is not None  # only a filtered dataset has holes
        return int(index)

    return at
