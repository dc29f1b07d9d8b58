"""Muon for the matrices and AdamW for the rest, ready-made.

    W_t = W_{t-1} - lr (0.2 sqrt(max(A, B)) O_t + wd W_{t-1})

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Eq. 4. The mathematics is
in `_muon_step`; here it is only wired.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from muon_jax._adam_step import AdamStep
from muon_jax._attention.split_heads import Heads, resolve_heads
from muon_jax._common.checks import Scalar, ScalarOrSchedule, check_scalar, check_schedule
from muon_jax._common.injectable import Held, injectable, unheld
from muon_jax._mesh.cost import MeshCosts
from muon_jax._mesh.specs import AnyMesh
from muon_jax._mesh.zero1 import resolve_zero1
from muon_jax._muon_step import resolve_step
from muon_jax._optimizer import Decided, Optimizer
from muon_jax._orthogonalize import resolve_iteration
from muon_jax._preconditioning import Preconditioning
from muon_jax._routing.route_leaves import DimensionNumbers, route_leaves
from muon_jax._scaling import DEFAULT_RMS, DefaultRMS, ShapeFunction, UpdateScale


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
    4. `weight_decay_mask` covers Muon's leaves and AdamW's, and `adam_weight_decay=None` follows
       `weight_decay`.
    5. Leaves are routed by their roles, not by ``ndim == 2``: see `routing_report(params)`.
    6. A list of coefficients runs whole, and another `ns_steps` raises; Optax runs its last rows.

    Under `optax.inject_hyperparams`, which traces numbers and calls types, name `ns_steps` and
    `max_group_bytes` in `static_args`, and write dtypes as strings. Masks, scales and dimension
    numbers that are functions are not taken for schedules.

    Args:
      learning_rate: a number or a schedule; it multiplies the update and the weight decay of all
        leaves.
      ns_coeffs: see `scale_by_muon`, as for `ns_steps`, `beta`, `nesterov`, `adaptive`,
        `preconditioning`, `consistent_rms`, `update_scale`, `ns_dtype`, `heads` and
        `max_group_bytes`.
      ns_steps: see `scale_by_muon`.
      beta: see `scale_by_muon`.
      eps: AdamW's, added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate; 0.1 is Moonlight's.
      weight_decay_mask: a tree of booleans, a prefix of the parameters' tree, or a function from
        parameters to one; False leaves do not decay, whoever updates them.
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

    Examples:
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
    adam = AdamStep(zero1, step.mu_dtype, (adam_b1, adam_b2, eps, adam_eps_root))

    def chains(decided: Decided) -> optax.GradientTransformationExtraArgs:
        return optax.partition(
            {
                "muon": optax.chain(
                    step.on(decided.leaves_of("muon")),
                    optax.add_decayed_weights(weight_decay, decided.mask),
                    optax.scale_by_learning_rate(learning_rate),
                ),
                "adam": optax.chain(
                    adam.on(decided.leaves_of("adam")),
                    optax.add_decayed_weights(adam_decay, decided.mask),
                    optax.scale_by_learning_rate(adam_rate),
                ),
            },
            lambda _: decided.labels,  # a function: the tree itself may be callable (Equinox)
        )

    resolve_heads(heads)
    route = functools.partial(
        route_leaves, dimension_numbers=unheld(muon_weight_dimension_numbers), heads=heads
    )
    optimizer = Optimizer(route, step, adam, unheld(weight_decay_mask), chains)
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


def optimizer_of(tx: optax.GradientTransformationExtraArgs) -> Optimizer:
    """The optimizer of what `muon` returned, which is a pair of its methods."""
    return tx.init.__self__  # pyright: ignore[reportAttributeAccessIssue]
