"""QK-Clip: bound attention logits by the weights, head by head.

    gamma_h = min(1, threshold / S_h),  W_q^h <- sqrt(gamma_h) W_q^h,  W_k^h <- sqrt(gamma_h) W_k^h

with S_h the largest logit of head h in the batch: Kimi Team 2025, "Kimi K2" (arXiv 2507.20534),
Algorithm 1, lines 11 to 17. Chained behind `muon` this is MuonClip. Which columns of which kernel
take which power of gamma is in `_attention`; here the weights after the update are scaled, and the
update that leads there is returned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Inexact, Int, PyTree

from muon_jax._attention import AttentionHeads, check_rule
from muon_jax._attention_leaves import AttentionModule, find_attention
from muon_jax._checks import Scalar, check_scalar, is_positive_integer
from muon_jax._paths import is_absent, show


class QKClipState(NamedTuple):
    """What `qk_clip` remembers while micro-batches are accumulated.

    Attributes:
      micro_step: micro-batches seen since the last step.
      step: steps of the optimizer.
      max_logits: the largest logits so far, from a module's path to `[*stack, heads]`.
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
      attention: from a regular expression, searched in the paths of modules, to the structure of
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

    Example:
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
        check_rule(pattern, heads)
    check_scalar("threshold", threshold)
    if not isinstance(threshold, Tracer) and float(threshold) == 0:
        raise ValueError("threshold must be positive; got 0, which would set the weights to 0.")
    traced = isinstance(every_k_schedule, jax.Array)
    if not (traced or callable(every_k_schedule) or is_positive_integer(every_k_schedule)):
        raise ValueError(
            "every_k_schedule must be a whole number of at least 1 or a function of the step; got "
            f"{every_k_schedule!r}."
        )
    accumulates = traced or callable(every_k_schedule) or every_k_schedule > 1

    def init_fn(params: PyTree) -> QKClipState | optax.EmptyState:
        modules, _ = find_attention(params, rules)
        if not accumulates:
            return optax.EmptyState()
        # Of an explicit dtype: a weakly typed -inf would change its type, and the program, in the
        # first update.
        none_yet = {show(m.path): jnp.full(m.logits_shape, -jnp.inf, jnp.float32) for m in modules}
        return QKClipState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), none_yet)

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
        modules, structure = find_attention(params, rules)
        largest = _check_logits(max_logits, modules)
        if axis_name is not None:
            largest = jax.lax.pmax(largest, axis_name)
        steps_now: Any = True
        if isinstance(state, QKClipState):
            every = every_k_schedule(state.step) if callable(every_k_schedule) else every_k_schedule
            largest = jax.tree.map(jnp.maximum, state.max_logits, largest)
            steps_now = state.micro_step + 1 >= every
            state = QKClipState(
                jnp.where(steps_now, 0, state.micro_step + 1),
                state.step + steps_now,
                jax.tree.map(lambda x: jnp.where(steps_now, -jnp.inf, x), largest),
            )
        weights = jax.tree.leaves(params)
        scaled = structure.flatten_up_to(updates)
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


def _scale(
    update: Inexact[Array, "*shape"],
    weight: Inexact[Array, "*shape"],
    factor: Float[Array, "*factors"],
) -> Inexact[Array, "*shape"]:
    """The update to ``factor * (weight + update)``; where the factor is 1, `update` itself."""
    wide = jnp.promote_types(jnp.promote_types(weight.dtype, update.dtype), jnp.float32)
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
