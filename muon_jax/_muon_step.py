"""One step of Muon, once it is known which matrices each leaf holds and where it lies.

    M_t = mu M_{t-1} + G_t                                  heavy ball, Eq. 1
    O_t = NewtonSchulz(mu M_t + G_t)                        Nesterov, footnote 1
    update = 0.2 sqrt(max(A, B)) O_t                        Eq. 4

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Section 2.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from muon_jax._batching import DEFAULT_MAX_GROUP_BYTES, batched_update
from muon_jax._common.checks import Scalar, check_bool, check_group_bytes, check_scalar
from muon_jax._common.paths import show
from muon_jax._common.trees import PyTree
from muon_jax._leaves import Leaf
from muon_jax._mesh.distributed import distributed_update
from muon_jax._mesh.plan import Plan, PlannedLeaf
from muon_jax._mesh.planner import make_plan
from muon_jax._mesh.zero1 import Zero1
from muon_jax._momentum import check_mu_dtype, momentum_dtype
from muon_jax._orthogonalize import Iteration
from muon_jax._scaling import check_update_scale, resolve_update_scale
from muon_jax._step import Arrays, Step
from muon_jax._update_rule import UpdateRule


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      count: the number of updates so far, int32.
      mu: the momentum, shaped like the parameters.

    Examples:
      >>> state = scale_by_muon().init({"kernel": jnp.ones((8, 4))})
      >>> state.mu["kernel"].shape
      (8, 4)
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree


@dataclasses.dataclass(frozen=True)
class MuonStep(Step):
    """The settings of a step of Muon, besides those of any step.

    Attributes:
      rule: what is done to each matrix.
      group_bytes: the largest batch of matrices that is orthogonalized at once.
    """

    rule: UpdateRule
    group_bytes: int
    state = MuonState
    kept = 1

    def moments(self, param: jnp.dtype) -> tuple[jnp.dtype, ...]:
        """The dtype of the momentum of a parameter of this dtype."""
        return (momentum_dtype(self.mu_dtype, param),)

    def check(self, leaves: Sequence[Leaf]) -> None:
        """Raise where a scale that is a function has no factor for the matrices of a leaf.

        Asked before a step: there the function's own error would be far from the leaf.
        """
        for leaf in leaves:
            for _, fan_in, fan_out in (view.matrices for view in leaf.holds):
                check_update_scale(self.rule.scale, fan_in, fan_out, show(leaf.route.path))

    def run(
        self, count: Any, leaves: list[Leaf], dtypes: list[Any], gradients: Arrays, *kept: Arrays
    ) -> tuple[Arrays, Arrays]:
        """The updates and the momenta; see `Step`."""
        del count, dtypes
        (momenta,) = kept
        if self.zero1 is None:
            views = [leaf.holds for leaf in leaves]
            return batched_update(views, self.rule, gradients, momenta, self.group_bytes)
        plan, planned = self.plan(leaves, gradients, momenta)
        return distributed_update(self.zero1, plan, planned, self.rule, gradients, momenta)

    def plan(
        self, leaves: Sequence[Leaf], gradients: Sequence[Any], momenta: Sequence[Any]
    ) -> tuple[Plan, list[PlannedLeaf]]:
        """Who orthogonalizes what on the mesh: a function of shapes and dtypes alone.

        Args:
          leaves: what each leaf holds, and where it lies.
          gradients: one for each leaf, an array or a `jax.ShapeDtypeStruct`.
          momenta: one momentum for each leaf, likewise.
        """
        assert self.zero1 is not None
        iteration = self.rule.iteration
        planned = [
            PlannedLeaf(leaf.holds, leaf.lies, iteration.storage_dtype(g, m), m.dtype)
            for leaf, g, m in zip(leaves, gradients, momenta, strict=True)
        ]
        plan = make_plan(
            planned,
            self.zero1.sizes,
            self.zero1.axes,
            schedule=iteration.schedule,
            max_group_bytes=self.group_bytes,
            whole_result=self.rule.is_measured,
            costs=self.zero1.costs,
        )
        return plan, planned


def resolve_step(
    zero1: Zero1 | None,
    iteration: Iteration,
    *,
    consistent_rms: Any,
    update_scale: Any,
    beta: Scalar,
    nesterov: bool,
    adaptive: bool,
    mu_dtype: Any,
    max_group_bytes: int | None,
) -> MuonStep:
    """The step that the arguments of `scale_by_muon` ask for; raise as it says."""
    check_scalar("beta", beta, below=1.0)
    scale = resolve_update_scale(consistent_rms, update_scale)
    adaptive, nesterov = check_bool("adaptive", adaptive), check_bool("nesterov", nesterov)
    rule = UpdateRule(iteration, scale, adaptive, beta, nesterov)
    group_bytes = check_group_bytes(max_group_bytes, DEFAULT_MAX_GROUP_BYTES)
    return MuonStep(zero1, check_mu_dtype(mu_dtype), rule, group_bytes)
