"""Run a group: its members' directions as one stack, part after part, and each member's results."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from muon_jax._common.loops import map_chunks
from muon_jax._common.pieces import cut
from muon_jax._matrices import MatrixView
from muon_jax._mesh.layout import Layout, local_view
from muon_jax._mesh.owner_runners import ExchangeRunner, SplitRunner
from muon_jax._mesh.part_runner import EverywhereRunner, Outcome, PartRunner, Pieces
from muon_jax._mesh.plan import (
    Everywhere,
    Exchange,
    Group,
    GroupKey,
    Member,
    Part,
    PlannedLeaf,
    Split,
    runs_of_equal_parts,
)
from muon_jax._mesh.specs import Sizes
from muon_jax._update_rule import UpdateRule

RUNNERS: dict[type[Part], type[PartRunner[Any]]] = {
    Everywhere: EverywhereRunner,
    Exchange: ExchangeRunner,
    Split: SplitRunner,
}


def run_group(
    group: Group,
    leaves: Sequence[PlannedLeaf],
    sizes: Sizes,
    rule: UpdateRule,
    directions: Sequence[Inexact[Array, "_ _ _"]],
) -> list[tuple[Member, Inexact[Array, "_ _ _"], Float[Array, "_"] | None]]:
    """Orthogonalize a group, inside a `shard_map`.

    Args:
      group: the group.
      leaves: the leaves that the plan was made for.
      sizes: the mesh.
      rule: what is done to each matrix.
      directions: each member's pieces on this device, turned wide.

    Returns:
      Each member with its results as the parameter's shard holds them, and their measured factors.
    """
    piece = group.state_piece
    stack = jnp.concatenate([pieces.reshape(len(pieces), *piece) for pieces in directions])
    runs = [*runs_of_equal_parts(group.parts)]
    bounds = [(run[0].start, run[-1].stop) for run in runs]
    outcomes = [
        _run_alike(group, run, sizes, rule, stack[start:stop])
        for run, (start, stop) in zip(runs, bounds, strict=True)
    ]

    ends = itertools.accumulate((member.matrices for member in group.members), initial=0)
    members = [*itertools.pairwise(ends)]
    results = _cut_out([result for result, _ in outcomes], bounds, members)
    factors: Sequence[Any] = [None] * len(members)
    if rule.is_measured:
        measured = [factors for _, factors in outcomes if factors is not None]
        factors = _cut_out(measured, bounds, members)

    out = []
    for member, result, factor in zip(group.members, results, factors, strict=True):
        leaf = leaves[member.leaf]
        view = leaf.views[member.view]
        _, fan_in, fan_out = local_view(view, leaf.layout.of_views.param, sizes).matrices
        shape = (fan_out, fan_in) if view.is_tall else (fan_in, fan_out)
        result = result.reshape(-1, member.matrices, *shape)
        where = (view, leaf.layout.of_views, group.key, sizes)
        result = _unstacked(result.mT if view.is_tall else result, *where)
        out.append((member, result, None if factor is None else _unstacked(factor, *where)))
    return out


def _run_alike(
    group: Group,
    alike: Sequence[Part],
    sizes: Sizes,
    rule: UpdateRule,
    pieces: Pieces,
) -> tuple[Outcome, Float[Array, "stacks count"] | None]:
    """Run parts that are alike and follow each other, with the outcome of one large part.

    They run in a loop: the program holds one of them, and what one needs is free before the next.
    """
    part, chunks = alike[0], len(alike)

    def one(chunk: jax.Array | int, pieces: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return RUNNERS[type(part)](group, alike, chunk, sizes, rule).run(pieces)

    if chunks == 1:
        return one(0, pieces)
    outcome = map_chunks(one, pieces.reshape(chunks, part.matrices, *pieces.shape[1:]))

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(len(x), chunks * part.matrices, *x.shape[3:])

    return jax.tree.map(joined, outcome)


def _cut_out(
    outcomes: Sequence[jax.Array],
    runs: Sequence[tuple[int, int]],
    members: Sequence[tuple[int, int]],
) -> list[jax.Array]:
    """Each member's matrices, out of the runs that hold them."""
    held: list[list[jax.Array]] = [[] for _ in members]
    for outcome, (first, end) in zip(outcomes, runs, strict=True):
        here = [
            (pieces, (max(start, first) - first, min(stop, end) - first))
            for pieces, (start, stop) in zip(held, members, strict=True)
            if first < stop and start < end
        ]
        found = cut(outcome, [inside for _, inside in here], axis=1, is_local=True)
        for (pieces, _), piece in zip(here, found, strict=True):
            pieces.append(piece)
    return [jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0] for pieces in held]


def _unstacked(
    x: Inexact[Array, "coordinates count *rest"],
    view: MatrixView,
    layout: Layout,
    key: GroupKey,
    sizes: Sizes,
) -> Inexact[Array, "_ *rest"]:
    """Put the parts of a stack that was gathered over several axes in their order."""
    gathered, rest = key.gathered_stack_axes, x.shape[2:]
    local = local_view(view, layout.state, sizes).block_shape
    order: list[int] = []
    for number, dim in enumerate(view.batch_axes):
        order += [gathered.index(axis) for axis in layout.state[dim] if axis in gathered]
        order.append(len(gathered) + number)
    x = x.reshape(*(sizes[a] for a in gathered), *(local[d] for d in view.batch_axes), *rest)
    return x.transpose(*order, *range(len(order), x.ndim)).reshape(-1, *rest)
