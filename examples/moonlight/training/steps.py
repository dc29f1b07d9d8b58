"""The optimizer step: gradients over micro-batches, update, router bias, and what is measured.

Everything here is a pure function of a `TrainState`, so that several steps run in one call into
XLA: a small model would otherwise wait for Python between steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

from examples.moonlight.model.language_model import ModelStats, merge_stats, next_token_loss
from examples.moonlight.model.moonlight import max_violation, update_router_bias
from examples.moonlight.training.monitors import Watched, layer_rms
from examples.moonlight.training.muonclip import logits_by_module
from examples.moonlight.training.nonfinite import OnNonfinite, all_finite
from muon_jax import UseRoles, rms_by_optimizer


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        params: The model's float32 parameters.
        bias: The routers' balance biases.
        opt_state: The optax state.
    """

    params: nnx.State
    bias: nnx.State
    opt_state: Any


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    load_le: jax.Array | None,
    optimizer: optax.GradientTransformation,
    *,
    bias_rate: float | jax.Array,
    rate: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[TrainState, PyTree]:
    """One optimizer step from its gradients; the router biases follow the experts' load.

    Args:
        state: Before the step.
        grads: The gradients of the loss, like the parameters.
        load_le: The tokens that each layer's experts were chosen by; None without experts.
        optimizer: What turns gradients into updates.
        bias_rate: How far a router bias goes.
        rate: Multiplies the updates; None, where the optimizer has its learning rate itself.
        **extra_args: What else the optimizer takes, such as `max_logits`.

    Returns:
        The state after the step, and the optimizer's updates, before `rate`.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra_args)
    scaled = updates if rate is None else jax.tree.map(lambda u: rate * u, updates)
    params: Any = optax.apply_updates(state.params, scaled)
    bias = state.bias
    if load_le is not None:
        bias = jax.tree.map(lambda bias_le: update_router_bias(bias_le, load_le, bias_rate), bias)
    return TrainState(params, bias, opt_state), updates


class StepMetrics(NamedTuple):
    """What one optimizer step measured; float32 scalars, or `[steps]` once stacked.

    Attributes:
        loss: Nats per token, mean over the step's micro-batches.
        learning_rate: The schedule's value.
        grad_norm: Global L2 norm of the gradient before clipping.
        update_rms_muon: RMS of the update over Muon's matrices, weight decay included, divided by
            the learning rate. The grouping is the same when AdamW trains them.
        update_rms_adam: The RMS of the update over all other parameters.
        max_violation: Load imbalance of the worst layer, 0 when balanced; None without experts.
        max_attention_logit: Largest attention logit of any layer and head.
        dropped_share: Share of the tokens' choices that a capacity dropped; None without one.
        grads_finite: Whether the loss and every gradient are finite; bool.
        state_finite: Whether all is finite that the step left behind; bool.
    """

    loss: jax.Array
    learning_rate: jax.Array
    grad_norm: jax.Array
    update_rms_muon: jax.Array
    update_rms_adam: jax.Array
    max_violation: jax.Array | None
    max_attention_logit: jax.Array
    dropped_share: jax.Array | None
    grads_finite: jax.Array
    state_finite: jax.Array


def _dropped_share(stats: ModelStats) -> jax.Array | None:
    if stats.dropped_l is None or stats.load_le is None:
        return None
    return stats.dropped_l.sum() / stats.load_le.sum()


TrainSteps = Callable[..., tuple[TrainState, StepMetrics, Watched | None]]


def make_train_steps(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    bias_rate: float | optax.Schedule,
    monitor: bool = False,
    on_nonfinite: OnNonfinite = "stop",
    roles: UseRoles | None = None,
) -> TrainSteps:
    """Builds the function that takes several optimizer steps in one call.

    Args:
        graphdef: Static half of the model.
        optimizer: What turns the mean gradient into an update, learning rate included.
        schedule: The optimizer's learning rate by step, for the record.
        bias_rate: Step of the router biases; by step, where it changes.
        on_nonfinite: What the optimizer was guarded with, see `nonfinite.guard`.
        roles: Which parameters are Muon's, for the record; None reads their names.
        monitor: Also bring back what `monitors.py` watches, of the last step of a call; of a model
            whose `Execution` monitors.

    Returns:
        `train_steps(state, tokens_sabt, step, count, micro_s=None)`, to be jitted. The tokens are
        int32 `[steps, micro-batches, batch, time + 1]`, of which the first `count` steps are taken,
        and of each of them the first `micro_s` micro-batches, int32 `[steps]`; None takes all.
        `step` is the number of steps before this call. The metrics are `[steps]`, the first `count`
        filled, and the third result is None unless monitored. Steps and micro-batches are counted
        by arguments of the program, not of its compilation: one program serves calls of every
        length and every stage, and a resumed run whose calls fall otherwise computes the same bits.
    """
    bias_schedule = bias_rate if callable(bias_rate) else optax.constant_schedule(bias_rate)

    # Both are asked for their results' shapes before they are called: as jitted functions they are
    # traced once. Inlined, they change nothing of the program.
    @functools.partial(jax.jit, inline=True)
    def loss_fn(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array):
        return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)

    @functools.partial(jax.jit, inline=True)
    def one_step(
        state: TrainState,
        tokens_abt: jax.Array,
        step: jax.Array,
        micro: jax.Array | None,
        last: jax.Array,
    ) -> tuple[TrainState, StepMetrics, Watched | None]:
        batches = len(tokens_abt) if micro is None else micro

        def add_micro_batch(i: jax.Array, carry: Any):
            total, stats_a = carry
            (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, state.bias, tokens_abt[i]
            )
            stats_a = jax.tree.map(lambda all_a, one: all_a.at[i].set(one), stats_a, stats)
            return jax.tree.map(jnp.add, total, (grads, loss)), stats_a

        _, stats = jax.eval_shape(loss_fn, state.params, state.bias, tokens_abt[0])
        stats_a = jax.tree.map(lambda x: jnp.zeros((len(tokens_abt), *x.shape), x.dtype), stats)
        zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()))
        (grads, loss), stats_a = jax.lax.fori_loop(0, batches, add_micro_batch, (zeros, stats_a))
        grads, loss = jax.tree.map(lambda x: x / batches, (grads, loss))
        stats = merge_stats(stats_a, batches)
        load_le = stats.load_le

        max_logits = logits_by_module(state.params, stats.max_logit_lh)
        grads_finite = all_finite((grads, loss))
        bias_rate = jnp.asarray(bias_schedule(step))
        if on_nonfinite == "skip":
            bias_rate = jnp.where(grads_finite, bias_rate, 0.0)
        after, updates = apply_gradients(
            state, grads, load_le, optimizer, bias_rate=bias_rate, max_logits=max_logits
        )
        learning_rate = jnp.asarray(schedule(step), jnp.float32)
        update_rms = rms_by_optimizer(updates, state.params, muon_weight_dimension_numbers=roles)
        measured = StepMetrics(
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=optax.tree.norm(grads),
            update_rms_muon=update_rms["muon"] / learning_rate,
            update_rms_adam=update_rms["adam"] / learning_rate,
            max_violation=None if load_le is None else max_violation(load_le).max(),
            max_attention_logit=stats.max_logit_lh.max(),
            dropped_share=_dropped_share(stats),
            grads_finite=grads_finite,
            state_finite=all_finite(after),
        )
        watched = None
        if monitor:

            def take_rms() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
                of_updates = layer_rms(updates)
                return layer_rms(after.params), jax.tree.map(
                    lambda x: x / learning_rate, of_updates
                )

            none_taken = jax.tree.map(jnp.zeros_like, jax.eval_shape(take_rms))
            watched = Watched(stats, *jax.lax.cond(last, take_rms, lambda: none_taken))
        return after, measured, watched

    def train_steps(
        state: TrainState,
        tokens_sabt: jax.Array,
        step: jax.Array,
        count: jax.Array,
        micro_s: jax.Array | None = None,
    ) -> tuple[TrainState, StepMetrics, Watched | None]:
        def step_args(i: jax.Array) -> tuple[Any, ...]:
            micro = None if micro_s is None else micro_s[i]
            return tokens_sabt[i], step + i, micro, i == count - 1

        def body(i: jax.Array, carry: Any):
            state, history, _ = carry
            state, measured, watched = one_step(state, *step_args(i))
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, measured), watched

        _, measured, watched = jax.eval_shape(one_step, state, *step_args(jnp.int32(0)))
        none_watched = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), watched)
        steps = tokens_sabt.shape[0]
        history = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), measured)
        return jax.lax.fori_loop(0, count, body, (state, history, none_watched))

    return train_steps


def make_validate(
    graphdef: nnx.GraphDef,
) -> Callable[[nnx.State, nnx.State, jax.Array], jax.Array]:
    """Builds `validate(params, bias, windows_kbt)`: the mean loss of each batch, float32 `[k]`."""

    def validate(params: nnx.State, bias: nnx.State, windows_kbt: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, bias)
        return jax.lax.map(lambda tokens_bt: next_token_loss(model, tokens_bt)[0], windows_kbt)

    return validate
