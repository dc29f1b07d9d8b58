"""Muon for the matrices and AdamW for the rest, ready-made.

    W_t = W_{t-1} - lr (0.2 sqrt(max(A, B)) O_t + wd W_{t-1})

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Eq. 4. The mathematics is
in `_scale_by_muon`; here it is only wired.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from muon_jax._checks import Scalar, ScalarOrSchedule, check_scalar
from muon_jax._gradients import gradient_leaves
from muon_jax._orthogonalize import Preconditioning
from muon_jax._paths import is_absent
from muon_jax._routing import DimensionNumbers, Heads, Route, route_leaves
from muon_jax._scale_by_muon import check_mu_dtype, momentum_dtype, scale_by_muon
from muon_jax._scaling import DEFAULT_RMS, DefaultRMS, ShapeFunction, UpdateScale


def muon(
    learning_rate: ScalarOrSchedule,
    *,
    ns_coeffs: Any = "standard",
    ns_steps: int | None = None,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.1,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.95,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: ScalarOrSchedule | None = None,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers = None,
    consistent_rms: Scalar | DefaultRMS | None = DEFAULT_RMS,
    update_scale: UpdateScale | ShapeFunction | None = None,
    ns_dtype: jax.typing.DTypeLike = "bfloat16",
    heads: Heads = "joint",
    max_group_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices, AdamW for the rest, with AdamW's learning rate and weight decay.

    By default everything decays: matrices, embeddings, norms and biases too, as in Moonlight (Liu
    et al. 2025, Appendix D: decayed gains keep training stable). `weight_decay_mask` changes it.
    Keep the parameters in float32: ``learning_rate * weight_decay`` of 3e-5 vanishes in a bfloat16
    weight. Clip before, not after: ``optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4))``.

    Every keyword of `optax.contrib.muon` is accepted. The defaults are Moonlight's, and six
    meanings differ:

    1. Momentum is the paper's heavy ball without bias correction; Optax's is a bias-corrected
       average, up to 10% away in the first steps. `adaptive` rescales for it, and takes the dual
       norm of each matrix, where Optax takes that of the leaf.
    2. `eps` is AdamW's only: Newton-Schulz is scale-invariant and needs none.
    3. `nesterov` is Muon's only: AdamW stays AdamW.
    4. `weight_decay_mask` covers both groups, and `adam_weight_decay=None` follows
       `weight_decay`.
    5. Leaves are routed by their roles, not by ``ndim == 2``: print `routing_report(params)`.
    6. A list of coefficients runs whole, and another `ns_steps` raises; Optax runs its last rows.

    Under `optax.inject_hyperparams`, which traces numbers and calls functions, name the arguments
    that are neither rates nor schedules in `static_args`: `ns_steps`, `max_group_bytes`, and
    functions given as `weight_decay_mask`, `update_scale` or `muon_weight_dimension_numbers`; and
    write dtypes as strings.

    Args:
      learning_rate: a number or a schedule; it multiplies the update and the weight decay of both
        groups.
      ns_coeffs: see `scale_by_muon`, as for `ns_steps`, `beta`, `nesterov`, `adaptive`,
        `preconditioning`, `consistent_rms`, `update_scale`, `ns_dtype`, `heads` and
        `max_group_bytes`.
      ns_steps: see `scale_by_muon`.
      beta: see `scale_by_muon`.
      eps: AdamW's, added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate; 0.1 is Moonlight's.
      weight_decay_mask: a tree of booleans, a prefix of the parameters' tree, or a function from
        parameters to one; False leaves do not decay, in either group.
      mu_dtype: the dtype of Muon's momentum and AdamW's first moment; None means each
        parameter's.
      nesterov: see `scale_by_muon`.
      adaptive: see `scale_by_muon`.
      preconditioning: see `scale_by_muon`.
      adam_b1: AdamW's decay of the first moment.
      adam_b2: AdamW's decay of the second moment; 0.95 is Moonlight's.
      adam_eps_root: AdamW's, added under the root.
      adam_weight_decay: AdamW's weight decay; None follows `weight_decay`.
      adam_learning_rate: AdamW's learning rate; None follows `learning_rate`.
      muon_weight_dimension_numbers: which leaves are matrices, along which axes. None: by the
        table of names and by rank. A tree (or a prefix of one, or a function of the parameters)
        of `optax.contrib.MuonDimensionNumbers`, `FusedBlocks` or None for AdamW: as it says.
        `by_path`: as it says for the leaves it names, by the table for the others.
      consistent_rms: see `scale_by_muon`.
      update_scale: see `scale_by_muon`; not together with `consistent_rms`.
      ns_dtype: see `scale_by_muon`.
      heads: see `scale_by_muon`.
      max_group_bytes: see `scale_by_muon`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its `update` needs `params`; a parameter whose
      gradient is None or masked keeps its value and its state.

    Raises:
      ValueError, TypeError: for arguments out of range or unknown names; from `init` and
        `update`, for leaves whose matrices cannot be known, naming each and what to write.

    Example:
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4, weight_decay=0.1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    adam_learning_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adam_weight_decay = weight_decay if adam_weight_decay is None else adam_weight_decay
    check_scalar("learning_rate", learning_rate, schedule=True)
    check_scalar("adam_learning_rate", adam_learning_rate, schedule=True)
    check_scalar("weight_decay", weight_decay, schedule=True)
    check_scalar("adam_weight_decay", adam_weight_decay, schedule=True)
    check_scalar("adam_b1", adam_b1, below=1.0)
    check_scalar("adam_b2", adam_b2, below=1.0)
    check_scalar("eps", eps)
    check_scalar("adam_eps_root", adam_eps_root)
    make_muon = functools.partial(
        scale_by_muon,
        ns_coeffs,
        ns_steps,
        beta,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        ns_dtype=ns_dtype,
        consistent_rms=consistent_rms,
        update_scale=update_scale,
        heads=heads,
        max_group_bytes=max_group_bytes,
    )
    make_muon()  # so that bad arguments raise here, not at the first init
    route = functools.partial(
        route_leaves, dimension_numbers=muon_weight_dimension_numbers, heads=heads
    )

    def for_params(
        params: PyTree, routes: list[Route], structure: Any
    ) -> optax.GradientTransformationExtraArgs:
        labels = structure.unflatten([route.group for route in routes])
        specs = structure.unflatten([route.spec for route in routes])
        mask = weight_decay_mask
        if routes and callable(mask) and jax.tree_util.all_leaves([mask]):
            mask = mask(params)
        return optax.partition(
            {
                "muon": optax.chain(
                    make_muon(weight_dimension_numbers=specs),
                    optax.add_decayed_weights(weight_decay, mask),
                    optax.scale_by_learning_rate(learning_rate),
                ),
                "adam": optax.chain(
                    _scale_by_adam(adam_b1, adam_b2, eps, adam_eps_root, mu_dtype),
                    optax.add_decayed_weights(adam_weight_decay, mask),
                    optax.scale_by_learning_rate(adam_learning_rate),
                ),
            },
            lambda _: labels,  # a function: the tree itself may be callable (Equinox modules)
        )

    def init_fn(params: PyTree) -> optax.OptState:
        return for_params(params, *route(params)).init(params)

    def update_fn(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.OptState]:
        if params is None:
            raise ValueError(
                "muon decays weights and needs them: call tx.update(grads, state, params)."
            )
        routes, structure = route(params)
        leaves = jax.tree.leaves(params)
        gradients = gradient_leaves(structure, updates, leaves, routes)
        # Optax's weight decay wants the parameter of a masked gradient masked too.
        params_to_decay = structure.unflatten(
            g if isinstance(g, optax.MaskedNode) else p
            for g, p in zip(gradients, leaves, strict=True)
        )
        tx = for_params(params, routes, structure)
        return tx.update(updates, state, params_to_decay, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scale_by_adam(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a state that is a fixed point.

    Optax drops the moments of a leaf whose gradient is None or masked, lets the first moment take
    the gradient's dtype after the first step, and casts a complex one to a real `mu_dtype`.
    """
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    dtype = check_mu_dtype(mu_dtype)

    def init_fn(params: PyTree) -> Any:
        state: Any = inner.init(params)
        if dtype is None:
            return state
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=momentum_dtype(dtype, p)), params)
        return state._replace(mu=zeros)

    def like_gradients(gradients: PyTree, moments: PyTree) -> PyTree:
        return jax.tree.map(
            lambda g, m: g if is_absent(g) else m, gradients, moments, is_leaf=is_absent
        )

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(
            lambda n, o: o if is_absent(n) else n.astype(o.dtype), new, old, is_leaf=is_absent
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        present = state._replace(
            mu=like_gradients(updates, state.mu), nu=like_gradients(updates, state.nu)
        )
        new: Any
        updates, new = inner.update(updates, present, params)
        return updates, new._replace(mu=keep(new.mu, state.mu), nu=keep(new.nu, state.nu))

    return optax.GradientTransformation(init_fn, update_fn)
