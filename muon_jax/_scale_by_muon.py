"""Momentum, orthogonalized and scaled: Muon without learning rate and weight decay.

    M_t = mu M_{t-1} + G_t                                  heavy ball, Eq. 1
    O_t = NewtonSchulz(mu M_t + G_t)                        Nesterov, footnote 1
    update = 0.2 sqrt(max(A, B)) O_t                        Eq. 4

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Section 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Int, PyTree

from muon_jax._batching import DEFAULT_MAX_GROUP_BYTES, map_by_shape
from muon_jax._checks import Scalar, check_dtype, check_group_bytes, check_scalar
from muon_jax._gradients import gradient_leaves
from muon_jax._orthogonalize import (
    Iteration,
    Preconditioning,
    check_ns_dtype,
    check_preconditioning,
)
from muon_jax._paths import is_absent, show
from muon_jax._polynomials import resolve_schedule
from muon_jax._routing import DimensionNumbers, Heads, Route, check_heads, route_leaves
from muon_jax._scaling import (
    DEFAULT_RMS,
    DefaultRMS,
    ShapeFunction,
    UpdateScale,
    apply_update_scale,
    resolve_update_scale,
)


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      count: the number of updates so far, int32.
      mu: the momentum, shaped like the parameters.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree


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
    update_scale: UpdateScale | ShapeFunction | None = None,
    weight_dimension_numbers: DimensionNumbers = None,
    heads: Heads = "joint",
    max_group_bytes: int | None = None,
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
      heads: whether the heads of a Flax attention kernel form one matrix or one each.
      max_group_bytes: the largest batch of matrices orthogonalized at once, in bytes of
        `ns_dtype`; None means 1 GiB. It bounds the buffers of the iteration; a stacked leaf larger
        than it is cut too, but also held whole before and after.

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
    scale = resolve_update_scale(consistent_rms, update_scale)
    check_heads(heads)
    group_bytes = check_group_bytes(max_group_bytes, DEFAULT_MAX_GROUP_BYTES)
    mu_dtype = check_mu_dtype(mu_dtype)

    def init_fn(params: PyTree) -> MuonState:
        _matrix_routes(params, weight_dimension_numbers, heads)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=momentum_dtype(mu_dtype, p)), params)
        return MuonState(jnp.zeros([], jnp.int32), mu)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        del params
        routes, structure = _matrix_routes(state.mu, weight_dimension_numbers, heads)
        old = jax.tree.leaves(state.mu)
        gradients = gradient_leaves(structure, updates, old, routes)

        mu, out = list(old), list(gradients)
        nudged, stacks = {}, []
        for i, (route, gradient) in enumerate(zip(routes, gradients, strict=True)):
            if is_absent(gradient):
                continue
            momentum, nudged[i] = heavy_ball(old[i], gradient, beta, nesterov)
            mu[i] = momentum.astype(old[i].dtype)
            # Cast before slicing: a leaf cut into chunks is then kept in the narrow dtype.
            stacks += _views(route).take(iteration.cast(nudged[i]))

        orthogonal = iter(map_by_shape(iteration, stacks, group_bytes))
        for i, source in nudged.items():
            views = _views(routes[i])
            matrices = [next(orthogonal) for _ in views.views]
            if adaptive:
                sources = views.take(source)
                matrices = [
                    scale_by_dual_norm(o, u, beta) for o, u in zip(matrices, sources, strict=True)
                ]
            scaled = [apply_update_scale(o, scale) for o in matrices]
            out[i] = views.put(scaled).astype(gradients[i].dtype)
        return structure.unflatten(out), MuonState(
            jnp.asarray(optax.safe_increment(state.count)), structure.unflatten(mu)
        )

    return optax.GradientTransformation(init_fn, update_fn)


def heavy_ball(
    momentum: Inexact[Array, "*shape"],
    gradient: Inexact[Array, "*shape"],
    beta: Scalar,
    nesterov: bool,
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    """``M_t = beta M_{t-1} + G_t`` and what is orthogonalized, in float32 or wider (Eq. 1)."""
    wide = jnp.promote_types(jnp.promote_types(momentum.dtype, gradient.dtype), jnp.float32)
    gradient = gradient.astype(wide)
    beta = jnp.asarray(beta, jnp.finfo(wide).dtype)
    momentum = beta * momentum.astype(wide) + gradient
    return momentum, beta * momentum + gradient if nesterov else momentum


def scale_by_dual_norm(
    orthogonal: Inexact[Array, "batch fan_in fan_out"],
    source: Inexact[Array, "batch fan_in fan_out"],
    beta: Scalar,
) -> Inexact[Array, "batch fan_in fan_out"]:
    """Multiply each matrix by ``(1 - beta) <U, O>``, the dual norm of the averaged momentum."""
    wide = orthogonal.astype(source.dtype)
    dual = jnp.sum(source.conj() * wide, axis=(-2, -1), keepdims=True).real
    return wide * ((1 - beta) * dual).astype(dual.dtype)


def check_mu_dtype(mu_dtype: Any) -> jnp.dtype | None:
    """Return the dtype, or raise where a momentum cannot have it."""
    if mu_dtype is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(check_dtype("mu_dtype", mu_dtype))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be a floating-point dtype or None; got {mu_dtype}.")
    return dtype


def momentum_dtype(mu_dtype: jnp.dtype | None, param: jax.Array) -> jnp.dtype:
    """The dtype of a parameter's momentum.

    Complex parameters keep a complex one. float16 ends at 65504, and a heavy ball sums to twenty
    gradients: its default is float32.
    """
    if mu_dtype is None:
        return jnp.dtype(jnp.float32 if param.dtype == jnp.float16 else param.dtype)
    complex_ = jnp.issubdtype(param.dtype, jnp.complexfloating)
    return jnp.promote_types(mu_dtype, jnp.complex64) if complex_ else mu_dtype


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
