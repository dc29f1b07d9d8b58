"""Muon without learning rate and weight decay, to be chained by hand."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from muon_jax._attention.split_heads import Heads, resolve_heads
from muon_jax._common.checks import Scalar
from muon_jax._common.injectable import Held, injectable, unheld
from muon_jax._common.paths import show
from muon_jax._common.trees import PyTree
from muon_jax._gradients import gradient_leaves
from muon_jax._leaves import decide_in_update, decide_leaves
from muon_jax._mesh.cost import MeshCosts
from muon_jax._mesh.specs import AnyMesh
from muon_jax._mesh.zero1 import resolve_zero1
from muon_jax._muon_step import MuonState, resolve_step
from muon_jax._orthogonalize import resolve_iteration
from muon_jax._preconditioning import Preconditioning
from muon_jax._routes import Route
from muon_jax._routing.route_leaves import DimensionNumbers, route_leaves
from muon_jax._scaling import DEFAULT_RMS, DefaultRMS, ShapeFunction, UpdateScale


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

    Examples:
      >>> tx = optax.chain(
      ...     scale_by_muon(),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(3e-4),
      ... )
      >>> state = tx.init({"kernel": jnp.ones((8, 4))})
    """
    weight_dimension_numbers = unheld(weight_dimension_numbers)
    resolve_heads(heads)
    zero1 = resolve_zero1(mesh, zero1_axes, unheld(param_specs), mesh_costs)
    step = resolve_step(
        zero1,
        resolve_iteration(ns_coeffs, ns_steps, preconditioning, ns_dtype),
        consistent_rms=consistent_rms,
        update_scale=unheld(update_scale),
        beta=beta,
        nesterov=nesterov,
        adaptive=adaptive,
        mu_dtype=mu_dtype,
        max_group_bytes=max_group_bytes,
    )

    def init_fn(params: PyTree) -> Any:
        routes, _ = _matrix_routes(params, weight_dimension_numbers, heads)
        leaves = decide_leaves(zero1, params, routes)
        step.check(leaves)
        return step.on(leaves).init(params)

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if not isinstance(state, MuonState):
            raise TypeError(
                f"scale_by_muon was given a state of type {type(state).__name__}; expected the "
                "MuonState that its init made, as tx.update(grads, state)."
            )
        routes, structure = _matrix_routes(state.mu, weight_dimension_numbers, heads)
        mu = jax.tree.leaves(state.mu)
        gradients = gradient_leaves(structure, updates, mu, routes)
        leaves = decide_in_update(zero1, structure, params, gradients, mu, routes)
        return step.on(leaves).update(updates, state)

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
