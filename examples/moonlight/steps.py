"""The optimizer step: gradients over micro-batches, update, router bias, and what is measured.

Everything here is a pure function of a `TrainState`, so that several steps run in one call into
XLA: a small model would otherwise wait for Python between steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.moonlight.model import (
    max_violation,
    merge_stats,
    next_token_loss,
    update_router_bias,
)
from muon_jax import group_rms


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


class StepMetrics(NamedTuple):
    """What one optimizer step measured; float32 scalars, or `[steps]` once stacked.

    Attributes:
        loss: Nats per token, mean over the step's micro-batches.
        learning_rate: The schedule's value.
        grad_norm: Global L2 norm of the gradient before clipping.
        update_rms_muon: RMS of the update over Muon's matrices, weight decay included, divided by
            the learning rate. The grouping is the same when AdamW trains them.
        update_rms_adam: The same over all other parameters.
        max_violation: Load imbalance of the worst layer, 0 when balanced.
        max_attention_logit: Largest attention logit of any layer and head.
    """

    loss: jax.Array
    learning_rate: jax.Array
    grad_norm: jax.Array
    update_rms_muon: jax.Array
    update_rms_adam: jax.Array
    max_violation: jax.Array
    max_attention_logit: jax.Array


TrainSteps = Callable[[TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, StepMetrics]]


def make_train_steps(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    bias_rate: float,
) -> TrainSteps:
    """Builds the function that takes several optimizer steps in one call.

    Args:
        graphdef: Static half of the model.
        optimizer: What turns the mean gradient into an update, learning rate included.
        schedule: The optimizer's learning rate by step, for the record.
        bias_rate: Step of the router biases.

    Returns:
        `train_steps(state, tokens_sabt, step, count)`, to be jitted. The tokens are int32
        `[steps, micro-batches, batch, time + 1]`, of which the first `count` steps are taken;
        `step` is the number of steps before this call. The metrics are `[steps]`, the first `count`
        filled. `count` is an argument of the program, not of its compilation: one program serves
        calls of every length, and a resumed run whose calls fall otherwise computes the same bits.
    """

    def loss_fn(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array):
        return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)

    def one_step(state: TrainState, tokens_abt: jax.Array, step: jax.Array):
        def add_micro_batch(total: Any, tokens_bt: jax.Array):
            (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, state.bias, tokens_bt
            )
            return jax.tree.map(jnp.add, total, (grads, loss)), stats

        zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()))
        (grads, loss), stats_a = jax.lax.scan(add_micro_batch, zeros, tokens_abt)
        grads, loss = jax.tree.map(lambda x: x / tokens_abt.shape[0], (grads, loss))
        stats = merge_stats(stats_a)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learning_rate = jnp.asarray(schedule(step), jnp.float32)
        update_rms = group_rms(updates, state.params)
        measured = StepMetrics(
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=optax.tree.norm(grads),
            update_rms_muon=update_rms["muon"] / learning_rate,
            update_rms_adam=update_rms["adam"] / learning_rate,
            max_violation=max_violation(stats.load_le).max(),
            max_attention_logit=stats.max_logit_lh.max(),
        )
        bias = jax.tree.map(
            lambda bias_le: update_router_bias(bias_le, stats.load_le, bias_rate), state.bias
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, bias, opt_state), measured

    def train_steps(
        state: TrainState, tokens_sabt: jax.Array, step: jax.Array, count: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        def body(i: jax.Array, carry: tuple[TrainState, StepMetrics]):
            state, history = carry
            state, measured = one_step(state, tokens_sabt[i], step + i)
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, measured)

        empty = jnp.zeros(tokens_sabt.shape[0], jnp.float32)
        history = StepMetrics(*(empty for _ in StepMetrics._fields))
        return jax.lax.fori_loop(0, count, body, (state, history))

    return train_steps


def make_validate(
    graphdef: nnx.GraphDef,
) -> Callable[[nnx.State, nnx.State, jax.Array], jax.Array]:
    """Builds `validate(params, bias, windows_kbt)`: the mean loss, one batch at a time."""

    def validate(params: nnx.State, bias: nnx.State, windows_kbt: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, bias)
        losses_k = jax.lax.map(lambda tokens_bt: next_token_loss(model, tokens_bt)[0], windows_kbt)
        return losses_k.mean()

    return validate
