"""Run a plan on a mesh: ZeRO-1 Muon as a `shard_map` with written collectives.

Liu et al. 2025, Algorithm 1 (Distributed Muon), for one step:

    1  reduce-scatter the gradients                  by XLA, at the border of the shard_map
    2  momentum on the local shard                   each device, its shard of the state
    3  gather to full matrices, in bfloat16          all_to_all: each matrix to one owner
    4  Newton-Schulz                                 on the owner, or between the sharers
    5  keep the local part                           (not needed: the whole result is sent on)
    6  update, and gather the parameters             all_gather of the bfloat16 result

Step 3 differs from the paper's: there every device gathers the matrices it has a part of, here each
matrix goes to one owner, which costs 2/N bytes per parameter instead of 2. In step 6 the result of
Newton-Schulz travels, not the parameters: it is bfloat16 already, so nothing is lost. Scale, weight
decay and learning rate follow on each device.

What lies where is the plan's word (`_plan`): which device owns which matrix, which slots are empty
(zeros travel there, and nothing is computed), which route each part takes. A bfloat16 collective
moves two bytes per element on every backend.

What is promised of numbers: owned, exchanged and replicated matrices are orthogonalized whole, by
the code that runs on one device. From the same gradients their momenta and, in bfloat16, their
orthogonalized matrices have the same bits where ``mu M + G`` is rounded alike: always for a ``mu``
that is a power of two (tested on CPUs, for jax 0.10 and 0.12). Otherwise a compiler may contract
the product and the sum into one multiply-add in one program and not in the other, a last bit of
float32. The same holds of scale, weight decay and learning rate, ``s O + wd W``. Matrices that are
split sum their products in another order.

The contract: gradients and momenta arrive in the layout of the state, updates leave in that of the
parameters. On Auto axes the border makes it so, whatever XLA would have done; on Explicit axes
`_specs.place` does. If the `param_specs` are wrong, XLA moves the data to where they say and back:
the result is right, and slow, which is why concrete arrays are checked against them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Inexact

from muon_jax._layout import Layout, Sizes, local_view
from muon_jax._matrices import LeafViews, MatrixView
from muon_jax._matrix_update import MatrixUpdate
from muon_jax._momentum import heavy_ball
from muon_jax._parts import PartRunner
from muon_jax._plan import Group, Member, Plan, PlannedLeaf, Shape, runs_of_equal_parts
from muon_jax._specs import partition_spec
from muon_jax._zero1 import Zero1, on_shards


def distributed_update(
    zero1: Zero1,
    plan: Plan,
    leaves: Sequence[PlannedLeaf],
    given: MatrixUpdate,
    gradients: Sequence[Inexact[Array, "..."]],
    momenta: Sequence[Inexact[Array, "..."]],
) -> tuple[list[Inexact[Array, "..."]], list[Inexact[Array, "..."]]]:
    """One step of momentum, orthogonalization and scale, of all leaves.

    Args:
      zero1: the mesh.
      plan: made for `leaves` on this mesh.
      leaves: the matrices of each leaf, and where it lies.
      given: what is done to each matrix.
      gradients: one for each leaf, of any layout; unreduced sums become reduce-scatters.
      momenta: one for each leaf, in the layout of the state.

    Returns:
      The updates, in the parameters' layout and the gradients' dtypes, and the momenta.
    """
    sizes = zero1.sizes

    def body(
        gradients: list[Any], momenta: list[Any], numbers: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        # Not by closure, which JAX refuses for arrays on Explicit axes.
        update = given.with_numbers(numbers)
        sources: dict[tuple[int, int], jax.Array] = {}
        new_momenta = []
        for index, (leaf, g, m) in enumerate(zip(leaves, gradients, momenta, strict=True)):
            new, nudged = heavy_ball(m, g, update.beta, update.nesterov)
            new_momenta.append(new.astype(m.dtype))
            narrow = update.iteration.cast(nudged)
            if leaf.layout.split is not None:
                narrow = leaf.layout.split.gather(narrow)
            local = _local_views(leaf.views, leaf.layout, sizes, state=True)
            for number, (view, stack) in enumerate(
                zip(leaf.views.views, local.take(narrow), strict=True)
            ):
                sources[index, number] = stack.mT if _is_tall(view) else stack

        scaled: dict[tuple[int, int], jax.Array] = {}
        for group in plan.groups:
            stack = [sources[member.leaf, member.view] for member in group.members]
            for member, result, measured in _run_group(group, leaves, sizes, update, stack):
                _, *matrix = leaves[member.leaf].views.views[member.view].matrices
                done = update.finish(result, measured, (matrix[0], matrix[1]))
                scaled[member.leaf, member.view] = done

        updates = []
        for index, (leaf, g) in enumerate(zip(leaves, gradients, strict=True)):
            local = _local_views(leaf.views, leaf.layout, sizes, state=False)
            # Views without matrices are in no group: nothing is there to update.
            parts = [
                scaled.get((index, number), jnp.zeros(view.matrices, g.dtype))
                for number, view in enumerate(local.views)
            ]
            done = local.put(parts)
            if leaf.layout.split is not None:
                done = leaf.layout.split.own(done)
            updates.append(done.astype(g.dtype))
        return updates, new_momenta

    state = [partition_spec(leaf.layout.state, zero1.mesh) for leaf in leaves]
    param = [partition_spec(leaf.layout.param, zero1.mesh) for leaf in leaves]
    gradients = zero1.arrive(gradients, [leaf.layout for leaf in leaves])
    numbers = given.numbers()
    args = (gradients, list(momenta), numbers)
    in_specs = (state, state, [PartitionSpec()] * len(numbers))
    return on_shards(body, zero1.mesh, args, in_specs, (param, state))


def _local_views(views: LeafViews, layout: Layout, sizes: Sizes, *, state: bool) -> LeafViews:
    spec = layout.of_views.state if state else layout.of_views.param
    return LeafViews(tuple(local_view(view, spec, sizes) for view in views.views), views.split)


def _is_tall(view: MatrixView) -> bool:
    _, fan_in, fan_out = view.matrices
    return fan_in > fan_out


def _run_group(
    group: Group,
    leaves: Sequence[PlannedLeaf],
    sizes: Sizes,
    update: MatrixUpdate,
    sources: Sequence[Inexact[Array, "_ _ _"]],
) -> list[tuple[Member, Inexact[Array, "_ _ _"], Float[Array, "_"] | None]]:
    """Orthogonalize a group; return each member's results as the parameter's shard holds them."""
    runner = PartRunner(group, sizes, update)
    stack = jnp.concatenate(
        [source.reshape(len(source), *runner.source_piece) for source in sources]
    )
    runs = [*runs_of_equal_parts(group.parts)]
    outcomes = [runner.run(run, stack[run[0].start : run[-1].stop]) for run in runs]
    bounds = [(run[0].start, run[-1].stop) for run in runs]

    out, start = [], 0
    for member in group.members:
        stop = start + member.matrices
        leaf = leaves[member.leaf]
        view = leaf.views.views[member.view]
        _, fan_in, fan_out = local_view(view, leaf.layout.of_views.param, sizes).matrices
        piece = (fan_out, fan_in) if _is_tall(view) else (fan_in, fan_out)
        results = _cut_out([result for result, _ in outcomes], bounds, start, stop)
        results = results.reshape(-1, member.matrices, *piece)
        unstack = _Unstack(view, leaf.layout.of_views, group.shape, sizes)
        factor = None
        if update.is_measured:
            factors = [factor for _, factor in outcomes if factor is not None]
            factor = unstack(_cut_out(factors, bounds, start, stop))
        out.append((member, unstack(results.mT if _is_tall(view) else results), factor))
        start = stop
    return out


def _cut_out(
    outcomes: Sequence[jax.Array], bounds: Sequence[tuple[int, int]], start: int, stop: int
) -> jax.Array:
    """Matrices `start` to `stop` of a group, out of the runs that hold them."""
    held = [
        outcome[:, max(start - first, 0) : stop - first]
        for outcome, (first, end) in zip(outcomes, bounds, strict=True)
        if first < stop and start < end
    ]
    return jnp.concatenate(held, axis=1) if len(held) > 1 else held[0]


class _Unstack:
    """Put the parts of a stack that was gathered over several axes in their order."""

    def __init__(self, view: MatrixView, layout: Layout, shape: Shape, sizes: Sizes):
        stacked = shape.stacked
        local = local_view(view, layout.state, sizes).block_shape
        self.lengths = [sizes[a] for a in stacked] + [local[d] for d in view.batch_axes]
        self.order: list[int] = []
        for number, dim in enumerate(view.batch_axes):
            self.order += [stacked.index(a) for a in layout.state[dim] if a in stacked]
            self.order.append(len(stacked) + number)

    def __call__(self, x: Inexact[Array, "coordinates count *rest"]) -> Inexact[Array, "_ *rest"]:
        rest = x.shape[2:]
        x = x.reshape(*self.lengths, *rest)
        kept = range(len(self.lengths), x.ndim)
        return x.transpose(*self.order, *kept).reshape(-1, *rest)
