"""The routes that are open to a group, and the parts that a choice among them makes.

Matrices that fill whole rounds, one for each device of the team, are exchanged: nothing is idle. A
choice is about the rest, or about all matrices where a group is too small to be sent at all.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from muon_jax._common.loops import even
from muon_jax._mesh.plan import Everywhere, Exchange, GroupKey, Part, RouteName, Split, length
from muon_jax._mesh.pricing import Pricing


class Sharers(NamedTuple):
    """Sets of `ways` neighbours along a mesh axis."""

    axis: str
    ways: int


class Choice(NamedTuple):
    """A route for the matrices that are left after whole rounds of `exchange`.

    Attributes:
      route: the route.
      sharers: the number of devices that divide a matrix, for `split`; None for the other routes.
      everything: whether there are no rounds, and all matrices take this route.
    """

    route: RouteName
    sharers: Sharers | None = None
    everything: bool = False


class Choices(NamedTuple):
    """Finds choices and makes parts of them, on one mesh.

    Attributes:
      pricing: what parts cost there.
      max_group_bytes: the largest transient of a part, in bytes.
      whole_result: whether the scale of the update needs the whole result on one device.
    """

    pricing: Pricing
    max_group_bytes: int
    whole_result: bool

    def open_to(self, key: GroupKey, count: int) -> list[Choice]:
        """The choices of a group of `count` matrices; the first is the one to start from."""
        sizes = self.pricing.sizes
        team = length(key.team, sizes)
        if team == 1:
            return [Choice("local", everything=True)]
        everywhere = Choice("replicated", everything=True)
        if count % team == 0:
            return [Choice("exchange"), everywhere]
        splits = [
            Choice("split", Sharers(axis, ways))
            for axis in key.team
            for ways in range(2, sizes[axis] + 1)
            if sizes[axis] % ways == 0 and key.rows % ways == 0
        ]
        return [Choice("exchange"), everywhere, Choice("replicated"), *splits]

    def parts(self, key: GroupKey, count: int, choice: Choice, load: np.ndarray) -> list[Part]:
        """Cut a group into parts; what is left goes to the devices with the least `load`."""
        if choice.everything:
            return self._everywhere(key, choice, 0, count)
        team = length(key.team, self.pricing.sizes)
        rounds, left = divmod(count, team)
        parts, start = [], 0
        for slots in even(rounds, self._capacity(key)):
            owners = np.arange(team * slots).reshape(team, slots)
            parts.append(Exchange(start=start, stop=start + team * slots, owners=owners))
            start += team * slots
        if not left:
            return parts
        if choice.route == "replicated":
            return parts + self._everywhere(key, choice, start, count)
        if choice.sharers is not None:
            last = self._split(key, start, count, choice.sharers)
        else:
            owners = np.full((team, 1), -1)
            owners[self._least_loaded(key, load, left), 0] = np.arange(left)
            last = Exchange(start=start, stop=count, owners=owners)
        return [*parts, self._with_way_back(key, last)]

    def _everywhere(self, key: GroupKey, choice: Choice, start: int, stop: int) -> list[Part]:
        parts: list[Part] = []
        route = "local" if choice.route == "local" else "replicated"
        for count in even(stop - start, self._capacity(key)):
            parts.append(Everywhere(start=start, stop=start + count, route=route))
            start += count
        return parts

    def _capacity(self, key: GroupKey) -> int:
        """Matrices per device in a part whose gathered result fits `max_group_bytes`."""
        spread = length(key.gathered_axes, self.pricing.sizes)
        return max(1, self.max_group_bytes // (key.bytes * spread))

    def _split(self, key: GroupKey, start: int, stop: int, sharers: Sharers) -> Split:
        """Consecutive matrices for each set of sharers, every one of whom has them in its slots."""
        sizes = self.pricing.sizes
        lengths = [sizes[axis] for axis in key.team]
        where = key.team.index(sharers.axis)
        index = list(np.indices(lengths))
        index[where] = index[where] // sharers.ways
        lengths[where] //= sharers.ways
        set_of = np.ravel_multi_index(index, lengths).ravel()  # of each device of the team
        count = stop - start
        slots = -(-count // (len(set_of) // sharers.ways))
        owners = set_of[:, None] * slots + np.arange(slots)
        return Split(
            start=start,
            stop=stop,
            owners=np.where(owners < count, owners, -1),
            ways=sharers.ways,
            axis=sharers.axis,
            # Rows cannot be cut once more into the pieces of a parameter that is cut.
            returns_rows=not (key.kept_axes or self.whole_result),
        )

    def _with_way_back(self, key: GroupKey, part: Exchange) -> Exchange:
        """The cheaper of both ways in which results return, where there are two."""
        # Pieces return to one copy only, so a team with copies has to gather anyway.
        can = set(key.team) == set(key.cut_axes) != set(key.kept_axes)
        if not can or not part.padding:
            return part
        through = dataclasses.replace(part, through_state=True)
        if isinstance(through, Split):
            through = dataclasses.replace(through, returns_rows=False)

        def cost(part: Exchange) -> float:
            return self.pricing.cost(self.pricing.traffic(key, part))

        return min(part, through, key=cost)

    def _least_loaded(self, key: GroupKey, load: np.ndarray, count: int) -> np.ndarray:
        axes = self.pricing.sizes
        elsewhere = tuple(i for i, axis in enumerate(axes) if axis not in key.team)
        busiest = load.max(axis=elsewhere).ravel()
        return np.sort(np.argsort(busiest, kind="stable")[:count])
