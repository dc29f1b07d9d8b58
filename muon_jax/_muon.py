"""Muon for the matrices and AdamW for the rest, ready-made.

    W_t = W_{t-1} - lr (0.2 sqrt(max(A, B)) O_t + wd W_{t-1})

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Eq. 4. The mathematics is
in `_scale_by_muon`; here it is only wired.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from muon_jax._checks import Scalar, ScalarOrSchedule, check_scalar, check_schedule
from muon_jax._cost import MeshCosts
from muon_jax._gradients import gradient_leaves
from muon_jax._injectable import Held, injectable, unheld
from muon_jax._preconditioning import Preconditioning
from muon_jax._prefix import resolve_mask
from muon_jax._routes import Route
from muon_jax._routing import DimensionNumbers, route_leaves, warn_of_tables
from muon_jax._scale_by_adam import scale_by_adam
from muon_jax._scale_by_muon import scale_by_muon
from muon_jax._scaling import DEFAULT_RMS, DefaultRMS, ShapeFunction, UpdateScale
from muon_jax._specs import AnyMesh, partition_spec
from muon_jax._split_heads import Heads
from muon_jax._state_checks import check_state_of
from muon_jax._zero1 import resolve_zero1


@injectable
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
    update_scale: UpdateScale | ShapeFunction | Held | None = None,
    ns_dtype: jax.typing.DTypeLike = "bfloat16",
    heads: Heads = "joint",
    max_group_bytes: int | None = None,
    mesh: AnyMesh | Held | None = None,
    zero1_axes: Sequence[str] | str | None = None,
    param_specs: Any = None,
    mesh_costs: MeshCosts | None = None,
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
    5. Leaves are routed by their roles, not by ``ndim == 2``: see `routing_report(params)`.
    6. A list of coefficients runs whole, and another `ns_steps` raises; Optax runs its last rows.

    Under `optax.inject_hyperparams`, which traces numbers and calls types, name `ns_steps` and
    `max_group_bytes` in `static_args`, and write dtypes as strings. Masks, scales and dimension
    numbers that are functions are not taken for schedules.

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
        parameter's, and float32 for float16, as AdamW's second moment is in any case.
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
        `by_path`: as it says for the leaves it names, by the table for the others. `by_use`: as
        the loss uses them.
      consistent_rms: see `scale_by_muon`.
      update_scale: see `scale_by_muon`; not together with `consistent_rms`.
      ns_dtype: see `scale_by_muon`.
      heads: see `scale_by_muon`.
      max_group_bytes: see `scale_by_muon`.
      mesh: the devices to share the optimizer's work and state on, ZeRO-1; None keeps both where
        the parameters are. The state that `init` returns lies in its layout already. See
        `sharding_report(params, mesh=mesh)`.
      zero1_axes: the mesh axes to shard the state over, besides those that shard the parameter
        itself; None means all over which a parameter is replicated. Axes left out repeat the work
        and carry none of the optimizer's traffic.
      param_specs: where the parameters lie: a tree of `jax.sharding.PartitionSpec`s, or a prefix of
        one. None: their types on Explicit axes, else replicated.
      mesh_costs: how fast the mesh's network is beside its devices: routes are chosen by it. None
        means `MeshCosts()`, the numbers of TPUs and of GPUs on NVLink.

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
    adam_rate: Any = learning_rate if adam_learning_rate is None else adam_learning_rate
    adam_decay: Any = weight_decay if adam_weight_decay is None else adam_weight_decay
    learning_rate = check_schedule("learning_rate", learning_rate)
    adam_rate = check_schedule("adam_learning_rate", adam_rate)
    weight_decay = check_schedule("weight_decay", weight_decay)
    adam_decay = check_schedule("adam_weight_decay", adam_decay)
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
        mesh=mesh,
        zero1_axes=zero1_axes,
        mesh_costs=mesh_costs,
    )
    zero1 = resolve_zero1(mesh, zero1_axes, unheld(param_specs), mesh_costs)
    make_muon()  # so that bad arguments raise here, not at the first init
    route = functools.partial(
        route_leaves, dimension_numbers=unheld(muon_weight_dimension_numbers), heads=heads
    )

    def for_params(
        params: PyTree, routes: list[Route], structure: Any
    ) -> optax.GradientTransformationExtraArgs:
        labels = structure.unflatten([route.group for route in routes])
        numbers = structure.unflatten([route.spec for route in routes])
        where, layouts = None, None
        if zero1 is not None:
            layouts = zero1.layouts(params, routes)
            where = structure.unflatten([partition_spec(x.param, zero1.mesh) for x in layouts])
            layouts = [x for x, r in zip(layouts, routes, strict=True) if r.group == "adam"]
        mask = resolve_mask(unheld(weight_decay_mask), params, structure)
        return optax.partition(
            {
                "muon": optax.chain(
                    # The routes have the heads apart already.
                    make_muon(weight_dimension_numbers=numbers, heads="joint", param_specs=where),
                    optax.add_decayed_weights(weight_decay, mask),
                    optax.scale_by_learning_rate(learning_rate),
                ),
                "adam": optax.chain(
                    scale_by_adam(adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, zero1, layouts),
                    optax.add_decayed_weights(adam_decay, mask),
                    optax.scale_by_learning_rate(adam_rate),
                ),
            },
            lambda _: labels,  # a function: the tree itself may be callable (Equinox modules)
        )

    def init_fn(params: PyTree) -> optax.OptState:
        routes, structure = route(params)
        warn_of_tables(routes)
        state = for_params(params, routes, structure).init(params)
        if zero1 is None:
            return state
        # Counts of schedules, which would otherwise move onto the mesh with the first update.
        leaves, structure = jax.tree.flatten(state)
        scalars = iter(zero1.replicate([x for x in leaves if not x.ndim]))
        return structure.unflatten([x if x.ndim else next(scalars) for x in leaves])

    def update_fn(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.OptState]:
        if params is None:
            raise ValueError(
                "muon decays weights and needs them: call tx.update(grads, state, params)."
            )
        if not hasattr(state, "inner_states"):
            raise TypeError(
                f"muon was given a state of type {type(state).__name__}; expected the one that its "
                "init made, as tx.update(grads, state, params)."
            )
        routes, structure = route(params)
        check_state_of(state, routes)
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
