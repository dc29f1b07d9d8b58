"""Make a plan: a pure function of shapes, specs and mesh.

Where the team does not divide the number of matrices, whole rounds of `exchange` take all but a
remainder, whose route is searched for: the cost model (`_cost`) is minimised over all groups
together, so that one group's remainder fills the devices that another's leaves idle.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from muon_jax._cost import Traffic, cost, newton_schulz_flops, others
from muon_jax._layout import Sizes, cut_of, local_view
from muon_jax._loops import even
from muon_jax._plan import (
    Group,
    Member,
    Part,
    Plan,
    PlannedLeaf,
    RouteName,
    Shape,
    returns_rows,
)


def make_plan(
    leaves: Sequence[PlannedLeaf],
    sizes: Sizes,
    zero1_axes: Sequence[str],
    *,
    steps: int,
    max_group_bytes: int,
    whole_result: bool = False,
) -> Plan:
    """Plan one step.

    Args:
      leaves: the matrix leaves that have a gradient.
      sizes: the mesh: the length of each axis, in its order.
      zero1_axes: the mesh axes that the state may be sharded over; others repeat the work.
      steps: of Newton-Schulz.
      max_group_bytes: the largest transient of a part, in bytes.
      whole_result: whether the scale of the update needs the whole result on one device.
    """
    planner = _Planner(sizes, steps, max_group_bytes, whole_result)
    members = _group(leaves, sizes, zero1_axes)
    counts = {shape: sum(m.matrices for m in group) for shape, group in members.items()}
    _, parts, flops = planner.search(counts)
    groups = [
        Group(
            shape,
            tuple(group),
            tuple(parts[shape]),
            (
                *(planner.traffic(shape, part) for part in parts[shape]),
                *_gathers(leaves, group, sizes),
            ),
            planner.flops(shape, parts[shape]),
            planner.flops_of_one(shape),
        )
        for shape, group in members.items()
    ]
    return Plan(tuple(groups), flops)


def _group(
    leaves: Sequence[PlannedLeaf], sizes: Sizes, zero1_axes: Sequence[str]
) -> dict[Shape, list[Member]]:
    groups = defaultdict(list)
    for index, (views, where, dtype, _) in enumerate(leaves):
        layout = where.of_views
        for number, view in enumerate(views.views):
            batch, fan_in, fan_out = view.matrices
            if not batch * fan_in * fan_out:
                continue

            def on(spec: tuple[tuple[str, ...], ...], dims: Sequence[int]) -> list[str]:
                named = {axis for dim in dims for axis in spec[dim]}
                return [axis for axis in sizes if axis in named and sizes[axis] > 1]

            matrix_dims = (*view.reduction, *view.output)
            pieces, kept = on(layout.state, matrix_dims), on(layout.param, matrix_dims)
            stack = on(layout.state, view.batch_axes)
            stacked = [a for a in stack if a not in on(layout.param, view.batch_axes)]
            team = [
                axis
                for axis in sizes
                if axis in pieces or (axis in zero1_axes and axis not in stack and sizes[axis] > 1)
            ]
            rows, cols = sorted((fan_in, fan_out))
            axes = (tuple(team), tuple(pieces), tuple(kept), tuple(stack), tuple(stacked))
            groups[Shape(rows, cols, dtype, *axes)].append(
                Member(
                    index,
                    number,
                    local_view(view, layout.state, sizes).matrices[0],
                    cut_of(view, layout.state, sizes),
                    cut_of(view, layout.param, sizes),
                )
            )
    return groups


def _gathers(
    leaves: Sequence[PlannedLeaf], members: Sequence[Member], sizes: Sizes
) -> Iterator[Traffic]:
    """What is sent before a group's matrices are whole heads, which no choice changes."""
    for leaf in (leaves[member.leaf] for member in members):
        split = leaf.layout.split
        if split is not None and split.gathered:
            sent = split.sent(leaf.dtype.itemsize, sizes)
            yield Traffic(exchange=sent, collectives=len(split.gathered))


class _Choice(NamedTuple):
    """A route for the matrices that are left after whole rounds of `exchange`."""

    route: RouteName
    ways: int = 1
    axis: str | None = None
    everything: bool = False  # no whole rounds: all matrices take this route


class _Priced(NamedTuple):
    """The cost of a set of choices, the parts of each group, and each device's FLOPs."""

    total: float
    parts: dict[Shape, list[Part]]
    flops: np.ndarray


class _Planner:
    """Prices choices on one mesh."""

    def __init__(self, sizes: Sizes, steps: int, max_group_bytes: int, whole_result: bool):
        self.sizes = sizes
        self.steps = steps
        self.max_group_bytes = max_group_bytes
        self.whole_result = whole_result
        self._known: dict[tuple[Shape, _Choice], tuple[list[Part], Traffic, np.ndarray]] = {}

    def length(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def candidates(self, shape: Shape, count: int) -> list[_Choice]:
        """The routes open to a group; the first is the one to start from."""
        team = self.length(shape.team)
        if team == 1:
            return [_Choice("owned", everything=True)]
        everywhere = _Choice("replicated", everything=True)
        if count % team == 0:
            return [_Choice("exchange"), everywhere]
        splits = [
            _Choice("split", ways, axis)
            for axis in shape.team
            for ways in range(2, self.sizes[axis] + 1)
            if self.sizes[axis] % ways == 0 and shape.rows % ways == 0
        ]
        return [_Choice("exchange"), everywhere, _Choice("replicated"), *splits]

    def search(self, counts: dict[Shape, int]) -> _Priced:
        """Improve one group's choice at a time, until no change makes the whole cheaper.

        From two starts, since such a descent can get stuck: while two groups keep the busiest
        device equally busy, a change of either one alone gains nothing.
        """
        # The heaviest first, as whoever balances loads does.
        order = sorted(counts, key=lambda shape: -shape.rows * shape.rows * shape.cols)
        options = {shape: self.candidates(shape, counts[shape]) for shape in order}

        def alone(shape: Shape) -> _Choice:
            one = {shape: counts[shape]}
            return min(options[shape], key=lambda option: self.price({shape: option}, one).total)

        starts = [{shape: options[shape][0] for shape in order}]
        starts.append({shape: alone(shape) for shape in order})
        descents = [self._descend(start, options, counts) for start in starts]
        return min(descents, key=lambda priced: priced.total)

    def _descend(
        self,
        choices: dict[Shape, _Choice],
        options: dict[Shape, list[_Choice]],
        counts: dict[Shape, int],
    ) -> _Priced:
        best, improved = self.price(choices, counts), True
        while improved:
            improved = False
            for shape, choice in choices.items():
                for option in options[shape]:
                    if option == choice:
                        continue
                    trial = {**choices, shape: option}
                    priced = self.price(trial, counts)
                    if priced.total < best.total:
                        best, choices, choice, improved = priced, trial, option, True
        return best

    def price(self, choices: dict[Shape, _Choice], counts: dict[Shape, int]) -> _Priced:
        """Cut all groups as chosen."""
        load = self.no_flops()
        parts: dict[Shape, list[Part]] = {}
        traffic = Traffic()
        for shape, choice in choices.items():
            parts[shape], sent, flops = self._cut(shape, counts[shape], choice, load)
            load = load + flops
            traffic += sent
        return _Priced(cost(traffic, float(load.max())), parts, load)

    def _cut(
        self, shape: Shape, count: int, choice: _Choice, load: np.ndarray
    ) -> tuple[list[Part], Traffic, np.ndarray]:
        """A group's parts, traffic and FLOPs, computed anew only where they depend on the load."""
        whole_remainder = choice == _Choice("exchange") and count % self.length(shape.team)
        key = (shape, choice)
        if whole_remainder or key not in self._known:
            parts = self.parts(shape, count, choice, load)
            if key not in self._known:
                sent = sum((self.traffic(shape, part) for part in parts), Traffic())
                self._known[key] = parts, sent, self.flops(shape, parts)
            if whole_remainder:
                return parts, self._known[key][1], self.flops(shape, parts)
        return self._known[key]

    def parts(self, shape: Shape, count: int, choice: _Choice, load: np.ndarray) -> list[Part]:
        """Cut a group into parts; remainders go to the devices with the least `load`."""
        if choice.everything:
            return self._everywhere(shape, choice.route, 0, count)
        team = self.length(shape.team)
        rounds, left = divmod(count, team)
        parts, start = [], 0
        for slots in even(rounds, self._capacity(shape)):
            owners = np.arange(team * slots).reshape(team, slots)
            parts.append(Part("exchange", start, start + team * slots, slots, owners))
            start += team * slots
        if not left:
            return parts
        if choice.route == "replicated":
            return parts + self._everywhere(shape, "replicated", start, count)
        if choice.route == "exchange":
            owners = np.full((team, 1), -1)
            owners[self._least_loaded(shape, load, left), 0] = np.arange(left)
            last = Part("exchange", start, count, 1, owners)
        else:
            assert choice.axis is not None
            group_of = self._split_groups(shape, choice.ways, choice.axis)
            slots = -(-left // (team // choice.ways))
            owners = group_of[:, None] * slots + np.arange(slots)
            owners = np.where(owners < left, owners, -1)
            last = Part("split", start, count, slots, owners, choice.ways, choice.axis)
        return [*parts, min(self._returns(shape, last), key=lambda p: self._cost(shape, p))]

    def _everywhere(self, shape: Shape, route: RouteName, start: int, stop: int) -> list[Part]:
        capacity = self._capacity(shape)
        parts = []
        for slots in even(stop - start, capacity):
            parts.append(Part(route, start, start + slots, slots))
            start += slots
        return parts

    def _capacity(self, shape: Shape) -> int:
        """Matrices per device in a part whose gathered update fits `max_group_bytes`."""
        spread = self.length(shape.gathered)
        return max(1, self.max_group_bytes // (shape.bytes * spread))

    def _returns(self, shape: Shape, part: Part) -> list[Part]:
        # Pieces return to one copy only, so a team with copies has to gather anyway.
        can = set(shape.team) == set(shape.pieces) != set(shape.kept)
        return [part, part._replace(through_state=True)] if can and not part.is_full else [part]

    def _cost(self, shape: Shape, part: Part) -> float:
        return cost(self.traffic(shape, part), 0)

    def _split_groups(self, shape: Shape, ways: int, axis: str) -> np.ndarray:
        """For each device of the team, the number of the group that it shares matrices with."""
        lengths = [self.sizes[a] for a in shape.team]
        where = shape.team.index(axis)
        index = list(np.indices(lengths))
        index[where] = index[where] // ways
        lengths[where] //= ways
        return np.ravel_multi_index(index, lengths).ravel()

    def _least_loaded(self, shape: Shape, load: np.ndarray, count: int) -> np.ndarray:
        elsewhere = tuple(i for i, axis in enumerate(self.sizes) if axis not in shape.team)
        busiest = load.max(axis=elsewhere).ravel()
        return np.sort(np.argsort(busiest, kind="stable")[:count])

    def flops_of_one(self, shape: Shape) -> int:
        is_complex = jnp.issubdtype(shape.dtype, jnp.complexfloating)
        return newton_schulz_flops(shape.rows, shape.cols, self.steps, is_complex=is_complex)

    def no_flops(self) -> np.ndarray:
        return np.zeros(tuple(self.sizes.values()), np.int64)

    def flops(self, shape: Shape, parts: Sequence[Part]) -> np.ndarray:
        """FLOPs on each device, an array shaped like the mesh."""
        one = self.flops_of_one(shape)
        lengths = [size if axis in shape.team else 1 for axis, size in self.sizes.items()]
        load = self.no_flops()
        for part in parts:
            if part.owners is None:
                load += part.matrices * one
                continue
            # Idle slots are skipped where a device works alone; sharers stay in step.
            busy = (part.owners >= 0).any(axis=1) | (part.ways > 1)
            load += busy.reshape(lengths) * (part.slots * one // part.ways)
        return load

    def traffic(self, shape: Shape, part: Part) -> Traffic:
        """Bytes that one device sends."""
        size = self.length
        stacked, pieces, kept = size(shape.stacked), size(shape.pieces), size(shape.kept)
        held = part.slots * shape.bytes  # whole matrices on one device
        if part.owners is None:
            update = part.matrices * shape.bytes / kept * stacked
            return Traffic(
                exchange=held * others(pieces),
                gather=update * others(stacked),
                collectives=(pieces > 1) + (stacked > 1),
            )
        split, rounds = 0.0, 0
        as_rows = returns_rows(shape, part, whole_result=self.whole_result)
        if part.ways > 1:
            gram = part.slots * shape.rows**2 * shape.dtype.itemsize
            rounds = 2 * self.steps - (1 if as_rows else 0)
            split = (gram * self.steps + held * (rounds - self.steps)) * others(part.ways)
        if part.through_state:
            back = pieces
            gathered = pieces // kept * stacked
            update = part.matrices * shape.bytes / kept * stacked
        else:
            back = kept
            gathered = size(shape.gathered)
            update = held * gathered / (part.ways if as_rows else 1)
        return Traffic(
            exchange=held * others(pieces),
            split=split,
            returned=held * others(back),
            gather=update * others(gathered),
            collectives=(pieces > 1) + rounds + (back > 1) + (gathered > 1),
        )
