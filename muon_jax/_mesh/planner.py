"""Make a plan: a pure function of shapes, specs and mesh.

Where the team does not divide the number of matrices, whole rounds of `exchange` take all but a
remainder, whose route is searched for: the cost model (`cost`) is minimised over all groups
together, so that one group's remainder fills the devices that another's leaves idle.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muon_jax._mesh.choices import Choice, Choices
from muon_jax._mesh.cost import MeshCosts, Traffic
from muon_jax._mesh.grouping import group_matrices
from muon_jax._mesh.plan import Group, GroupKey, Member, Part, Plan, PlannedLeaf, length
from muon_jax._mesh.pricing import Pricing
from muon_jax._mesh.specs import Sizes
from muon_jax._polynomials import Schedule


def make_plan(
    leaves: Sequence[PlannedLeaf],
    sizes: Sizes,
    zero1_axes: Sequence[str],
    *,
    schedule: Schedule,
    max_group_bytes: int,
    whole_result: bool = False,
    costs: MeshCosts = MeshCosts(),  # noqa: B008 -- it is frozen
) -> Plan:
    """Plan one step.

    Args:
      leaves: the matrix leaves that have a gradient.
      sizes: the mesh: the length of each axis, in its order.
      zero1_axes: the mesh axes that the state may be sharded over; others repeat the work.
      schedule: the steps of Newton-Schulz.
      max_group_bytes: the largest transient of a part, in bytes.
      whole_result: whether the scale of the update needs the whole result on one device.
      costs: how fast the mesh's network is.
    """
    pricing = Pricing(sizes, schedule, costs)
    members = group_matrices(leaves, sizes, zero1_axes)
    counts = {key: sum(m.matrices for m in group) for key, group in members.items()}
    _, parts, flops = Search(Choices(pricing, max_group_bytes, whole_result), counts).best()
    groups = [
        Group(
            key,
            tuple(group),
            tuple(parts[key]),
            tuple(pricing.traffic(key, part) for part in parts[key]),
            _gathered_heads(leaves, group, sizes),
            pricing.flops(key, parts[key]),
            pricing.flops_of_one(key),
        )
        for key, group in members.items()
    ]
    return Plan(tuple(groups), flops)


def _gathered_heads(
    leaves: Sequence[PlannedLeaf], members: Sequence[Member], sizes: Sizes
) -> Traffic:
    """What is sent before a group's matrices are whole heads, which no choice changes."""
    sent = Traffic()
    for leaf in (leaves[member.leaf] for member in members):
        split = leaf.layout.split
        if split is not None and split.gathered:
            exchange = split.sent(leaf.dtype.itemsize, sizes)
            sent += Traffic(exchange=exchange, collectives=len(split.gathered))
    return sent


class Priced(NamedTuple):
    """A set of choices and what it costs.

    Attributes:
      total: the cost of the busiest device.
      parts: the parts of each group.
      flops: FLOPs on each device.
    """

    total: float
    parts: dict[GroupKey, list[Part]]
    flops: np.ndarray


class Search:
    """Looks for the cheapest choices of all groups together.

    It improves one group's choice at a time, until no change makes the whole cheaper. Such a
    descent can get stuck: while two groups keep the busiest device equally busy, a change of either
    one alone gains nothing. So there are two, from different starts. Less was measured not to do
    (EXPERIMENTS.md): one greedy pass over the groups costs up to 1.23x as much, and one descent
    alone, in a test each, 1.72x or 1.08x.
    """

    def __init__(self, choices: Choices, counts: dict[GroupKey, int]):
        self.choices = choices
        self.pricing = choices.pricing
        self.counts = counts
        # The heaviest first, as whoever balances loads does.
        self.order = sorted(counts, key=lambda key: -key.rows * key.rows * key.cols)
        self.options = {key: choices.open_to(key, counts[key]) for key in self.order}
        self._known: dict[tuple[GroupKey, Choice], tuple[list[Part], Traffic, np.ndarray]] = {}

    def best(self) -> Priced:
        """The cheaper outcome of two descents."""
        return min(map(self.descend, self.starts()), key=lambda priced: priced.total)

    def starts(self) -> tuple[dict[GroupKey, Choice], dict[GroupKey, Choice]]:
        """The first option of each group, and what each would choose if it were alone."""

        def alone(key: GroupKey) -> Choice:
            return min(self.options[key], key=lambda option: self.price({key: option}).total)

        first = {key: self.options[key][0] for key in self.order}
        return first, {key: alone(key) for key in self.order}

    def descend(self, chosen: dict[GroupKey, Choice]) -> Priced:
        """Change one choice at a time while that makes the whole cheaper."""
        best, improved = self.price(chosen), True
        while improved:
            improved = False
            for key, choice in chosen.items():
                for option in self.options[key]:
                    if option == choice:
                        continue
                    trial = {**chosen, key: option}
                    priced = self.price(trial)
                    if priced.total < best.total:
                        best, chosen, choice, improved = priced, trial, option, True
        return best

    def price(self, chosen: dict[GroupKey, Choice]) -> Priced:
        """Cut the groups as chosen, one after the other: each sees the load of those before it."""
        load = self.pricing.no_flops()
        parts: dict[GroupKey, list[Part]] = {}
        traffic = Traffic()
        for key, choice in chosen.items():
            parts[key], sent, flops = self._cut(key, choice, load)
            load = load + flops
            traffic += sent
        return Priced(self.pricing.cost(traffic, float(load.max())), parts, load)

    def _cut(
        self, key: GroupKey, choice: Choice, load: np.ndarray
    ) -> tuple[list[Part], Traffic, np.ndarray]:
        """A group's parts, traffic and FLOPs, computed anew only where they depend on the load."""
        count = self.counts[key]
        depends = choice == Choice("exchange") and count % length(key.team, self.pricing.sizes)
        known = None if depends else self._known.get((key, choice))
        if known is None:
            parts = self.choices.parts(key, count, choice, load)
            sent = sum((self.pricing.traffic(key, part) for part in parts), Traffic())
            known = self._known[key, choice] = parts, sent, self.pricing.flops(key, parts)
        return known
