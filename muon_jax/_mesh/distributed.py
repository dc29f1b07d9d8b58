"""Run a plan on a mesh: ZeRO-1 Muon as a `shard_map` with written collectives.

The phases of a step are those of Liu et al. 2025, Algorithm 1 (Distributed Muon):

    1  reduce-scatter the gradients                  by XLA, at the border of the shard_map
    2  momentum on the local shard                   each device, its shard of the state
    3  gather to full matrices, in bfloat16          all_to_all: each matrix to one owner
    4  Newton-Schulz                                 on the owner, or between the sharers
    5  keep the local part                           all_to_all: pieces of the result, where the
                                                     parameter is cut too; else nothing
    6  update, and gather the parameters             all_gather of the bfloat16 result

Phase 3 differs from the paper's: there every device gathers the matrices it has a part of, here
each matrix goes to one owner, which costs 2/N bytes per parameter instead of 2. In phase 6 the
result of Newton-Schulz travels, not the parameters: it is bfloat16 already, so nothing is lost.
Scale, weight decay and learning rate follow on each device.

What lies where is the plan's word: `plan` has its terms, and an example in numbers. Phases 3 to 6
are run by `run_group` for one group after the other, by `part_runner` for one part. A bfloat16
collective moves two bytes per element on every backend.

What is promised of numbers: local, exchanged and replicated matrices are orthogonalized whole, by
the code that runs on one device. From the same gradients their momenta and, in bfloat16, their
orthogonalized matrices have the same bits where ``mu M + G`` is rounded alike, as for a ``mu`` that
is a power of two (tested on CPUs, for jax 0.10 and 0.12). Otherwise a compiler may contract
the product and the sum into one multiply-add in one program and not in the other, a last bit of
float32. The same holds of scale, weight decay and learning rate, ``s O + wd W``. Matrices that are
split sum their products in another order; and so do tall ones on TPUs and GPUs, since here they are
turned wide to share an iteration, which one device has no need of (`_batching`).

The contract: gradients and momenta arrive in the layout of the state, updates leave in that of the
parameters. On Auto axes the border makes it so, whatever XLA would have done; on Explicit axes
`specs.place` does. If the `param_specs` are wrong, XLA moves the data to where they say and back:
the result is right, and slow, which is why concrete arrays are checked against them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from muon_jax._matrices import LeafViews
from muon_jax._mesh.layout import Layout, local_view
from muon_jax._mesh.plan import Plan, PlannedLeaf
from muon_jax._mesh.run_group import run_group
from muon_jax._mesh.shards import on_shards
from muon_jax._mesh.specs import Sizes
from muon_jax._mesh.zero1 import Zero1
from muon_jax._momentum import heavy_ball
from muon_jax._update_rule import UpdateRule

Stacks = dict[tuple[int, int], Inexact[Array, "_ _ _"]]
"""A stack of matrices for each view: by the index of its leaf, and its own in the leaf."""


def distributed_update(
    zero1: Zero1,
    plan: Plan,
    leaves: Sequence[PlannedLeaf],
    rule: UpdateRule,
    gradients: Sequence[Inexact[Array, "..."]],
    momenta: Sequence[Inexact[Array, "..."]],
) -> tuple[list[Inexact[Array, "..."]], list[Inexact[Array, "..."]]]:
    """One step of momentum, orthogonalization and scale, of all leaves.

    Args:
      zero1: the mesh.
      plan: the plan, made for `leaves` on this mesh.
      leaves: the matrices of each leaf, and where it lies.
      rule: what is done to each matrix.
      gradients: one gradient for each leaf, of any layout; unreduced sums become reduce-scatters.
      momenta: one momentum for each leaf, in the layout of the state.

    Returns:
      The updates, in the parameters' layout and the gradients' dtypes, and the momenta.
    """
    layouts = [leaf.layout for leaf in leaves]

    def on_device(rule: UpdateRule, gradients: list[Any], momenta: list[Any]) -> Any:
        return _Step(plan, leaves, rule, zero1.sizes).on_device(gradients, momenta)

    # Phase 1 is its border: unreduced sums of gradients arrive in the state's layout.
    return on_shards(zero1.mesh, on_device, rule, layouts, gradients, momenta)


class _Step(NamedTuple):
    """What one device does with its shards, inside the `shard_map`."""

    plan: Plan
    leaves: Sequence[PlannedLeaf]
    rule: UpdateRule
    sizes: Sizes

    def on_device(self, gradients: list[Any], momenta: list[Any]) -> tuple[list[Any], list[Any]]:
        """Phases 2 to 6: the updates of the parameters' shards, and the momenta."""
        directions: Stacks = {}
        new_momenta = []
        for index, (leaf, g, m) in enumerate(zip(self.leaves, gradients, momenta, strict=True)):
            new, direction = heavy_ball(m, g, self.rule.beta, self.rule.nesterov)  # phase 2
            new_momenta.append(new.astype(m.dtype))
            directions |= self.pieces(index, leaf, direction)
        scaled = self.orthogonalized(directions)
        updates = [
            self.joined(index, leaf, scaled, g.dtype)
            for index, (leaf, g) in enumerate(zip(self.leaves, gradients, strict=True))
        ]
        return updates, new_momenta

    def pieces(self, index: int, leaf: PlannedLeaf, direction: Inexact[Array, "..."]) -> Stacks:
        """The pieces of a leaf's directions that this device holds, narrow and turned wide."""
        # Cast before anything travels, and before the norm: every device sees what one would.
        narrow = self.rule.iteration.cast(direction)
        if leaf.layout.split is not None:
            narrow = leaf.layout.split.gather(narrow)
        stacks = _local_views(leaf.views, leaf.layout, self.sizes, state=True).take(narrow)
        return {
            (index, number): stack.mT if view.is_tall else stack
            for number, (view, stack) in enumerate(zip(leaf.views, stacks, strict=True))
        }

    def orthogonalized(self, directions: Stacks) -> Stacks:
        """Phases 3 to 6, group by group: the scaled results that the parameters' shards hold."""
        scaled: Stacks = {}
        for group in self.plan.groups:
            stacks = [directions[member.leaf, member.view] for member in group.members]
            outcome = run_group(group, self.leaves, self.sizes, self.rule, stacks)
            for member, result, measured in outcome:
                view = self.leaves[member.leaf].views[member.view]
                _, fan_in, fan_out = view.matrices
                # Scaled where it arrives, in float32: what travels is the bfloat16 result.
                done = self.rule.finish(result, measured, (fan_in, fan_out))
                scaled[member.leaf, member.view] = done
        return scaled

    def joined(
        self, index: int, leaf: PlannedLeaf, scaled: Stacks, dtype: jnp.dtype
    ) -> Inexact[Array, "..."]:
        """A leaf's update, made of the scaled results of its views."""
        local = _local_views(leaf.views, leaf.layout, self.sizes, state=False)
        # Views without matrices are in no group: nothing is there to update.
        update = local.put(
            [
                scaled.get((index, number), jnp.zeros(view.matrices, dtype))
                for number, view in enumerate(local)
            ]
        )
        if leaf.layout.split is not None:
            update = leaf.layout.split.own(update)
        return update.astype(dtype)


def _local_views(views: LeafViews, layout: Layout, sizes: Sizes, *, state: bool) -> LeafViews:
    spec = layout.of_views.state if state else layout.of_views.param
    return LeafViews(tuple(local_view(view, spec, sizes) for view in views), views.split)
