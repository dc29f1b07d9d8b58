"""QK-Clip: bound attention logits by the weights, head by head.

    gamma_h = min(1, threshold / S_h),  W_q^h <- sqrt(gamma_h) W_q^h,  W_k^h <- sqrt(gamma_h) W_k^h

with S_h the largest logit of head h in the batch: Kimi Team 2025, "Kimi K2" (arXiv 2507.20534),
Algorithm 1, lines 11 to 17. Chained behind `muon` this is MuonClip. Which columns of which kernel
take which power of gamma is in `structures`; here the weights after the update are scaled, and the
update that leads there is returned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Inexact, Int

from muon_jax._attention.leaves import AttentionModule, find_attention
from muon_jax._attention.structures import AttentionHeads, check_rule
from muon_jax._common.checks import Scalar, check_arity, check_scalar, is_positive_integer
from muon_jax._common.dtypes import promote
from muon_jax._common.paths import flatten_with_names, is_absent, show
from muon_jax._common.trees import PyTree
from muon_jax._mesh.specs import partition_spec, place


class QKClipState(NamedTuple):
    """What `qk_clip` remembers while micro-batches are accumulated.

    Attributes:
      micro_step: micro-batches seen since the last step.
      step: steps of the optimizer.
      max_logits: the largest logits so far, from a module's path to `[*stack, heads]`.

    Examples:
      >>> params = {"attn": {"q_proj": jnp.ones((8, 4)), "k_proj": jnp.ones((8, 4))}}
      >>> state = qk_clip(MultiHead(heads=2, head_dim=2), every_k_schedule=4).init(params)
      >>> print(state.max_logits["attn"])
      [-inf -inf]
    """

    micro_step: Int[Array, ""]
    step: Int[Array, ""]
    max_logits: dict[str, Float[Array, "*stack heads"]]


def qk_clip(
    attention: AttentionHeads | Mapping[str, AttentionHeads],
    threshold: Scalar = 100.0,
    *,
    every_k_schedule: int | Int[Array, ""] | Callable[[Any], Any] = 1,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip attention logits: where a head's largest exceeds the threshold, shrink its weights.

    It comes last in the chain, for it scales the weights after the update, and `update` takes one
    argument more, the largest logits of the forward pass that made the gradients:

        tx = optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4), qk_clip(heads))
        updates, state = tx.update(grads, state, params, max_logits=max_logits)

    `max_logits` maps each module's path, such as ``layers/0/self_attn``, to the largest logit of
    each head, ``q . k * scale`` before the softmax: `[heads]`, or `[*stack, heads]` where layers
    are stacked. An array alone will do where there is one module. A head at or below the
    threshold gets the update that came, bit for bit, as it does where its logit is NaN or
    infinite, from which no factor follows.

    The maximum belongs to the whole batch:

    - micro-batches in one `update`: give the maximum over them.
    - micro-batches by `optax.MultiSteps`: put `qk_clip` behind it and give it the same
      ``every_k_schedule``; it keeps the maximum, and clips when MultiSteps steps. Inside
      MultiSteps it would see the last micro-batch only.
    - devices: under `jax.jit` a maximum over a global array is global. Inside `jax.shard_map` or
      `jax.pmap` name the axes in `axis_name`.

    It clips kernels `[..., in, heads * width]` or `[..., in, heads, width]` and their biases, on
    any mesh and without communication besides that maximum.

    Args:
      attention: a mapping from a pattern, searched in modules' paths, to the structure of
        their heads, `MultiHead`, `GroupedQuery` or `MultiHeadLatent`; the first pattern that is
        found decides. One structure alone holds for every module that has its projections.
      threshold: the largest logit allowed, positive; 100 is Kimi K2's.
      every_k_schedule: as given to the `optax.MultiSteps` in front: how many micro-batches make a
        step, or a function from the count of steps to that.
      axis_name: the mapped axes to take the maximum over.

    Returns:
      An `optax.GradientTransformationExtraArgs`, without state unless `every_k_schedule` is given.

    Raises:
      ValueError, TypeError: for arguments out of range or of unknown type; from `init` and
        `update`, for patterns that find no module, for modules whose logits are not linear in
        their weights (norms of queries or keys) or whose leaves do not fit; from `update`, where
        `params` or `max_logits` are missing or do not fit.

    Examples:
      >>> params = {"attn": {"q_proj": jnp.ones((8, 4)), "k_proj": jnp.ones((8, 4))}}
      >>> tx = optax.chain(muon(3e-4), qk_clip(MultiHead(heads=2, head_dim=2)))
      >>> state = tx.init(params)
      >>> largest = {"attn": jnp.asarray([400.0, 50.0])}
      >>> updates, state = tx.update(params, state, params, max_logits=largest)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["attn"]["q_proj"][0].round(2))
      [0.5 0.5 1.  1. ]
    """
    rules = {"": attention} if isinstance(attention, AttentionHeads) else attention
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            "qk_clip takes the structure of the heads, or a mapping from patterns of modules' "
            f"paths to it; got {attention!r}."
        )
    for pattern, heads in rules.items():
        check_rule("qk_clip", pattern, heads, "Attention of another structure cannot be clipped.")
    check_scalar("threshold", threshold)
    if not isinstance(threshold, Tracer) and float(threshold) == 0:
        raise ValueError("threshold must be positive; got 0, which would set the weights to 0.")
    traced = isinstance(every_k_schedule, jax.Array)
    if callable(every_k_schedule):
        check_arity("every_k_schedule", every_k_schedule, "the count of steps", 1)
    else:
        _check_every(every_k_schedule, "or a function of the step; got")
    _check_axis_name(axis_name)
    accumulates = traced or callable(every_k_schedule) or every_k_schedule > 1

    def init_fn(params: PyTree) -> QKClipState | optax.EmptyState:
        modules, _ = find_attention(params, rules)
        if not accumulates:
            return optax.EmptyState()
        # Of an explicit dtype: a weakly typed -inf would change its type, and the program, in the
        # first update.
        none_yet = {show(m.path): jnp.full(m.logits_shape, -jnp.inf, jnp.float32) for m in modules}
        zero = jnp.zeros((), jnp.int32)
        return _replicated_like(params, QKClipState(zero, jnp.copy(zero), none_yet))

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        max_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                "qk_clip scales weights and needs them: call tx.update(updates, state, params, "
                "max_logits=...)."
            )
        if isinstance(state, QKClipState) != accumulates:
            raise TypeError(
                f"qk_clip was given a state of type {type(state).__name__}; expected the one that "
                f"its init made, {'a QKClipState' if accumulates else 'optax.EmptyState()'}, as "
                "every_k_schedule says."
            )
        modules, structure = find_attention(params, rules)
        largest = _check_logits(max_logits, modules)
        if axis_name is not None:
            largest = _largest_over(largest, axis_name)
        steps_now: Any = True
        if isinstance(state, QKClipState):
            every: Any = every_k_schedule
            if callable(every_k_schedule):
                every = every_k_schedule(state.step)
                _check_every(every, "from its function; it returned")
            largest = jax.tree.map(jnp.maximum, state.max_logits, largest)
            steps_now = state.micro_step + 1 >= every
            state = QKClipState(
                jnp.where(steps_now, 0, state.micro_step + 1),
                state.step + steps_now,
                jax.tree.map(lambda x: jnp.where(steps_now, -jnp.inf, x), largest),
            )
        weights = jax.tree.leaves(params)
        scaled = _updates_like(params, structure, updates)
        for module in modules:
            logits = largest[show(module.path)]
            clips = jnp.isfinite(logits) & (logits > threshold) & steps_now
            gamma = jnp.where(clips, threshold / jnp.where(clips, logits, 1), 1)
            factors = module.heads.factors(gamma)
            for leaf in module.leaves:
                if is_absent(scaled[leaf.index]):
                    raise ValueError(
                        f"qk_clip: {show(leaf.path)} has no update, so its weights cannot be "
                        "clipped. Train it, or leave its module out of the patterns."
                    )
                factor = factors[leaf.projection].reshape(leaf.factors_shape)
                scaled[leaf.index] = _scale(scaled[leaf.index], weights[leaf.index], factor)
        return structure.unflatten(scaled), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _replicated_like(params: PyTree, state: QKClipState) -> QKClipState:
    """The state on the parameters' mesh, to which the first update would otherwise move it."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    shardings = [x.sharding for x in arrays if not isinstance(x, Tracer)]
    mesh = next((x.mesh for x in shardings if isinstance(x, NamedSharding)), None)
    if mesh is None:
        return state
    return jax.tree.map(lambda x: place(x, mesh, partition_spec(((),) * x.ndim, mesh)), state)


def _check_every(every: Any, else_or: str) -> None:
    """Raise where `every_k_schedule`, or what it returns, is no count; a traced one is an array."""
    is_count = is_positive_integer(every)
    if isinstance(every, jax.Array | np.ndarray):
        is_count = jnp.issubdtype(every.dtype, np.integer) and not every.shape
        is_count = is_count and (isinstance(every, Tracer) or int(every) > 0)
    if not is_count:
        raise ValueError(
            f"every_k_schedule must be a whole number of at least 1 {else_or} {every!r}."
        )


def _check_axis_name(axis_name: Any) -> None:
    names = axis_name if isinstance(axis_name, Sequence) else [axis_name]
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must name mapped axes, such as 'data'; got {axis_name!r}.")


def _largest_over(largest: dict[str, jax.Array], axis_name: Any) -> dict[str, jax.Array]:
    try:
        return jax.lax.pmax(largest, axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} names an axis that is not mapped here: {error} Under jax.jit "
            "leave it out: a maximum over a global array is global."
        ) from error


def _updates_like(params: PyTree, structure: Any, updates: PyTree) -> list[Any]:
    """The updates in the order of the parameters' leaves."""
    try:
        leaves = structure.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"qk_clip: the updates' tree differs from that of the parameters: {error}"
        ) from error
    for (path, param), update in zip(flatten_with_names(params)[0], leaves, strict=True):
        if not is_absent(update) and jnp.shape(update) != jnp.shape(param):
            raise ValueError(
                f"qk_clip: {show(path)} has shape {jnp.shape(param)}, but its update has "
                f"{jnp.shape(update)}."
            )
    return leaves


def _scale(
    update: Inexact[Array, "*shape"],
    weight: Inexact[Array, "*shape"],
    factor: Float[Array, "*factors"],
) -> Inexact[Array, "*shape"]:
    """The update to ``factor * (weight + update)``; where the factor is 1, `update` itself."""
    wide = promote(promote(weight.dtype, update.dtype), jnp.float32)
    before = weight.astype(wide)
    after = factor.astype(wide) * (before + update.astype(wide))
    # The predicate takes its shape and its sharding from the update's own values. On Explicit axes
    # broadcasting gives it none, as a constant does (`zeros_like`, from jax 0.11 on), and `where`
    # wants its predicate sharded as its cases are. A NaN stays one either way.
    keeps = (factor == 1) | jnp.isnan(update)
    return jnp.where(keeps, update, (after - before).astype(update.dtype))


def _check_logits(max_logits: Any, modules: list[AttentionModule]) -> dict[str, jax.Array]:
    """The largest logits by module, in float32, replicated."""
    shapes = {show(module.path): module.logits_shape for module in modules}
    expected = ", ".join(f"{name!r}: {list(shape)}" for name, shape in list(shapes.items())[:8])
    expected = f"{{{expected}{', ...' if len(shapes) > 8 else ''}}}"
    if max_logits is None:
        raise TypeError(
            "qk_clip needs the largest attention logits: call tx.update(updates, state, params, "
            f"max_logits=...) with arrays of the shapes {expected}."
        )
    if not isinstance(max_logits, Mapping):
        if len(shapes) > 1:
            raise TypeError(
                f"max_logits must map the paths of {len(shapes)} modules to arrays, {expected}; "
                f"got {type(max_logits).__name__}."
            )
        max_logits = dict.fromkeys(shapes, max_logits)
    if max_logits.keys() != shapes.keys():
        missing, unknown = shapes.keys() - max_logits.keys(), max_logits.keys() - shapes.keys()
        wrong = f"lacks {min(missing)!r}" if missing else f"names {min(unknown)!r}, which is none"
        raise ValueError(f"max_logits {wrong} of the modules; expected {expected}.")
    checked = {}
    for name, shape in shapes.items():
        logits = max_logits[name]
        if not isinstance(logits, jax.Array | np.ndarray):
            raise TypeError(
                f"max_logits[{name!r}] must be an array of shape {shape}; got "
                f"{type(logits).__name__}. Stack the heads' largest logits with jnp.stack."
            )
        dtype = logits.dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"max_logits[{name!r}] has dtype {dtype}; expected logits, floats.")
        if jnp.shape(logits) != shape:
            raise ValueError(
                f"max_logits[{name!r}] has shape {jnp.shape(logits)}; expected {shape}, the "
                "largest logit of each head. Take the maximum over micro-batches, sequences and "
                "positions first."
            )
        checked[name] = _replicated(jnp.asarray(logits, jnp.float32))
    return checked


def _replicated(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # Factors of sharded heads could not be spread over the columns of a kernel on Explicit axes.
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.P()))
