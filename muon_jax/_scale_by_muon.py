"""Momentum, orthogonalized and scaled: Muon without learning rate and weight decay.

    M_t = mu M_{t-1} + G_t                                  heavy ball, Eq. 1
    O_t = NewtonSchulz(mu M_t + G_t)                        Nesterov, footnote 1
    update = 0.2 sqrt(max(A, B)) O_t                        Eq. 4

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Section 2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from muon_jax._batching import DEFAULT_MAX_GROUP_BYTES, batched_update
from muon_jax._checks import Scalar, check_bool, check_group_bytes, check_scalar
from muon_jax._cost import MeshCosts
from muon_jax._distributed import distributed_update
from muon_jax._gradients import gradient_leaves
from muon_jax._injectable import Held, injectable, unheld
from muon_jax._matrix_update import MatrixUpdate
from muon_jax._momentum import check_mu_dtype, momentum_dtype
from muon_jax._orthogonalize import Iteration, check_ns_dtype
from muon_jax._paths import is_absent, show
from muon_jax._plan import PlannedLeaf
from muon_jax._planner import make_plan
from muon_jax._polynomials import resolve_schedule
from muon_jax._preconditioning import Preconditioning, check_preconditioning
from muon_jax._record import note_plan, note_state
from muon_jax._routes import Route
from muon_jax._routing import DimensionNumbers, route_leaves
from muon_jax._scaling import (
    DEFAULT_RMS,
    DefaultRMS,
    ShapeFunction,
    UpdateScale,
    check_update_scale,
    resolve_update_scale,
)
from muon_jax._specs import AnyMesh
from muon_jax._split_heads import Heads, resolve_heads
from muon_jax._zero1 import resolve_zero1


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      count: the number of updates so far, int32.
      mu: the momentum, shaped like the parameters.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree


@injectable
def scale_by_muon(
    ns_coeffs: Any = "standard",
    ns_steps: int | None = None,
    beta: Scalar = 0.95,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    ns_dtype: jax.typing.DTypeLike = "bfloat16",
    consistent_rms: Scalar | DefaultRMS | None = DEFAULT_RMS,
    update_scale: UpdateScale | ShapeFunction | Held | None = None,
    weight_dimension_numbers: DimensionNumbers = None,
    heads: Heads = "joint",
    max_group_bytes: int | None = None,
    mesh: AnyMesh | Held | None = None,
    zero1_axes: Sequence[str] | str | None = None,
    param_specs: Any = None,
    mesh_costs: MeshCosts | None = None,
) -> optax.GradientTransformation:
    """Momentum, orthogonalized and scaled: Muon without learning rate and weight decay.

    Every leaf must be a matrix or a stack of matrices; `muon` sends the others to AdamW. Chain it
    with `optax.add_decayed_weights` and `optax.scale_by_learning_rate`, in this order.

    Args:
      ns_coeffs: the Newton-Schulz schedule, by name (`muon_jax.SCHEDULES`), as one ``(a, b, c)``,
        or as one for each step.
      ns_steps: the number of steps; None means 5, or the schedule's own length, and any other
        number must agree with that length.
      beta: the momentum coefficient ``mu``; 0.95 as in Liu et al. 2025.
      mu_dtype: the dtype of the momentum, from `init` on; None means each parameter's own, and
        float32 for float16. Complex parameters keep a complex momentum.
      nesterov: whether to orthogonalize ``mu M_t + G_t`` instead of ``M_t``.
      adaptive: whether to multiply each update by the dual norm of its averaged momentum,
        ``(1 - beta) <U_t, O_t>`` (arXiv 2409.20325); Optax averages, this momentum sums, hence
        the factor.
      preconditioning: how matrices are scaled before the first step; see `orthogonalize`.
      ns_dtype: the dtype that Newton-Schulz multiplies in; its norm is always in float32.
      consistent_rms: the update RMS to aim at, ``consistent_rms * sqrt(max(fan_in, fan_out))``
        (Eq. 4); None means Optax's ``sqrt(max(1, fan_out / fan_in))``.
      update_scale: another scale: `UpdateNorm` (Eq. 6), `FixedScale` (Eq. 5), `AdjustedLR`, or a
        function of ``(fan_in, fan_out)``.
      weight_dimension_numbers: which axes form the matrices; see `muon`.
      heads: whether the heads of a Flax attention kernel `[d, heads, head_dim]` form one matrix,
        ``"joint"``, or one each, ``"per_head"``; or a mapping from patterns of modules' paths to
        the structure of their attention, as `qk_clip` takes, whose kernels of two axes are split
        too, each head to be a matrix; or `split_heads`, for groups of heads.
      max_group_bytes: the largest batch of matrices orthogonalized at once, in bytes of
        `ns_dtype`; None means 1 GiB. It bounds the buffers of the iteration; larger batches go
        through in a loop. All matrices of one shape are held in `ns_dtype` besides, and on a mesh
        so are their gathered results.
      mesh: the devices to share the work and the state on, ZeRO-1; see `muon`.
      zero1_axes: the mesh axes to shard the state over; see `muon`.
      param_specs: where the parameters lie on the mesh; see `muon`.
      mesh_costs: how fast the mesh's network is; see `muon`.

    Returns:
      An `optax.GradientTransformation` with state `MuonState`. Updates have the shapes and dtypes
      of the gradients. A gradient that is None or masked leaves its momentum as it was.

    Raises:
      ValueError, TypeError: for arguments out of range, or unknown names; from `init` and
        `update`, for leaves that are no matrices or do not fit the state.

    Example:
      >>> tx = optax.chain(
      ...     scale_by_muon(),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(3e-4),
      ... )
      >>> state = tx.init({"kernel": jnp.ones((8, 4))})
    """
    check_scalar("beta", beta, below=1.0)
    iteration = Iteration(
        resolve_schedule(ns_coeffs, ns_steps),
        check_preconditioning(preconditioning),
        check_ns_dtype(ns_dtype),
    )
    weight_dimension_numbers, param_specs = map(unheld, (weight_dimension_numbers, param_specs))
    scale = resolve_update_scale(consistent_rms, unheld(update_scale))
    matrix_update = MatrixUpdate(
        iteration, scale, check_bool("adaptive", adaptive), beta, check_bool("nesterov", nesterov)
    )
    resolve_heads(heads)
    group_bytes = check_group_bytes(max_group_bytes, DEFAULT_MAX_GROUP_BYTES)
    mu_dtype = check_mu_dtype(mu_dtype)
    zero1 = resolve_zero1(mesh, zero1_axes, param_specs, mesh_costs)

    def init_fn(params: PyTree) -> MuonState:
        routes, structure = _matrix_routes(params, weight_dimension_numbers, heads)
        for route in routes:  # before a function of theirs fails inside a step, far from its leaf
            for _, fan_in, fan_out in (view.matrices for view in _views(route).views):
                check_update_scale(scale, fan_in, fan_out, show(route.path))
        leaves = jax.tree.leaves(params)
        dtypes = [momentum_dtype(mu_dtype, jnp.result_type(leaf)) for leaf in leaves]
        count = jnp.zeros([], jnp.int32)
        if zero1 is None:
            zeros = [jnp.zeros_like(p, dtype=d) for p, d in zip(leaves, dtypes, strict=True)]
        else:
            layouts = zero1.layouts(params, routes)
            paths = [route.path for route in routes]
            note_state("muon", paths, layouts, [[dtype] for dtype in dtypes])
            zeros = zero1.zeros([*zip(layouts, dtypes, strict=True)])
            (count,) = zero1.replicate([count])
        return MuonState(count, structure.unflatten(zeros))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        if not isinstance(state, MuonState):
            raise TypeError(
                f"scale_by_muon was given a state of type {type(state).__name__}; expected the "
                "MuonState that its init made, as tx.update(grads, state)."
            )
        routes, structure = _matrix_routes(state.mu, weight_dimension_numbers, heads)
        mu = jax.tree.leaves(state.mu)
        gradients = gradient_leaves(structure, updates, mu, routes)
        present = [i for i, g in enumerate(gradients) if not is_absent(g)]
        views = [_views(routes[i]) for i in present]
        arrays = ([gradients[i] for i in present], [mu[i] for i in present])
        if zero1 is None:
            new = batched_update(views, matrix_update, *arrays, group_bytes)
        else:
            layouts = zero1.layouts_in_update(structure, params, gradients, mu, routes)
            leaves = [
                PlannedLeaf(
                    view, layouts[i], iteration.storage_dtype(gradients[i], mu[i]), mu[i].dtype
                )
                for i, view in zip(present, views, strict=True)
            ]
            plan = make_plan(
                leaves,
                zero1.sizes,
                zero1.axes,
                steps=len(iteration.schedule),
                max_group_bytes=group_bytes,
                whole_result=matrix_update.is_measured,
                costs=zero1.costs,
            )
            note_plan(plan, leaves)
            new = distributed_update(zero1, plan, leaves, matrix_update, *arrays)
        for old, values in zip((gradients, mu), new, strict=True):
            for i, value in zip(present, values, strict=True):
                old[i] = value
        return structure.unflatten(gradients), MuonState(
            jnp.asarray(optax.safe_increment(state.count)), structure.unflatten(mu)
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _matrix_routes(
    tree: PyTree, dimension_numbers: DimensionNumbers, heads: Heads
) -> tuple[list[Route], Any]:
    routes, structure = route_leaves(tree, dimension_numbers, heads)
    for route in routes:
        if route.views is None:
            raise ValueError(
                f"scale_by_muon was given {show(route.path)}, shape {route.shape} "
                f"({route.reason}), which belongs to AdamW. Use muon, which routes it there, give "
                "it to another optimizer with optax.partition, or declare its matrix axes with "
                "weight_dimension_numbers."
            )
    return routes, structure


def _views(route: Route) -> Any:
    assert route.views is not None
    return route.views
