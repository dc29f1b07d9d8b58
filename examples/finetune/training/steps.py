"""An optimizer step of fine-tuning: summed gradients over micro-batches, divided once.

    g = (sum over micro-batches of d/dW sum_i w_i loss_i) / (sum over micro-batches of sum_i w_i)

The mean is over the tokens that count, of all micro-batches together. A mean of the micro-batches'
means would give a token of a short answer more weight the fewer tokens its micro-batch has, and
would change with the split; so a batch of 16 rows gives one update, however it is split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.finetune.data.packing import Rows
from examples.finetune.lora.adapters import folded
from examples.moonlight.model.packed import Packed
from examples.moonlight.training.muonclip import logits_by_module
from examples.moonlight.training.nonfinite import all_finite
from examples.moonlight.training.steps import TrainState, apply_gradients


class Frozen(NamedTuple):
    """What no step changes.

    Attributes:
        dropout: The keys of the factors' dropout; empty without LoRA.
        base: The model's own weights under LoRA; empty where they are trained.
        bias: The routers' biases, which fine-tuning never changes.
    """

    dropout: nnx.State
    base: nnx.State
    bias: nnx.State

    def saved_with(self, trained: nnx.State) -> dict[str, nnx.State]:
        """What a checkpoint holds of the model: the factors alone, or all of it."""
        if jax.tree.leaves(self.base):
            return {"adapters": trained}
        return {"params": trained, "router_bias": self.bias}

    def at(self, step: jax.Array, micro: jax.Array) -> "Frozen":
        """The same with the dropout of a micro-batch of a step."""
        return self._replace(dropout=folded(folded(self.dropout, step), micro))


class StepMetrics(NamedTuple):
    """What one step measured; scalars.

    Attributes:
        loss: Nats per token that counts, over the whole batch.
        token_acc: Share of these tokens that have the largest logit.
        tokens: How many count.
        learning_rate: The schedule's value.
        grad_norm: Global L2 norm of the gradient before clipping.
        max_attention_logit: Largest attention logit of any layer and head.
        grads_finite: Whether the loss and every gradient are finite; bool.
        state_finite: Whether all is finite that the step left behind; bool.
    """

    loss: jax.Array
    token_acc: jax.Array
    tokens: jax.Array
    learning_rate: jax.Array
    grad_norm: jax.Array
    max_attention_logit: jax.Array
    grads_finite: jax.Array
    state_finite: jax.Array


class Sums(NamedTuple):
    """What micro-batches add up to; float32 scalars."""

    loss: jax.Array
    hits: jax.Array
    weight: jax.Array


def summed_loss(
    graphdef: nnx.GraphDef, trained: nnx.State, frozen: Frozen, rows: Rows
) -> tuple[jax.Array, tuple[Sums, jax.Array]]:
    """The loss of a micro-batch, summed over its tokens; its sums, and the largest logits."""
    model: Any = nnx.merge(graphdef, trained, *frozen)
    tokens_bt, targets_bt, weight_bt, *packed = map(jnp.asarray, rows)
    loss, weight, stats = model.weighted_loss(tokens_bt, targets_bt, weight_bt, Packed(*packed))
    return loss, (Sums(loss, stats.hits, weight), stats.max_logit_lh)


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Builds the function that takes one optimizer step.

    Args:
        graphdef: Static half of the model, dropout included.
        optimizer: What turns the mean gradient into an update, learning rate included.
        schedule: The optimizer's learning rate by step, for the record.

    Returns:
        `train_step(state, frozen, rows_abt, step)`, to be jitted: rows `[micro-batches, batch,
        time]`, and the number of steps before this one.
    """

    def train_step(
        state: TrainState, frozen: Frozen, rows_abt: Rows, step: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        def add_micro_batch(carry: Any, micro: tuple[Rows, jax.Array]):
            total, max_logit_lh = carry
            rows_bt, index = micro
            (_, (sums, logit_lh)), grads = jax.value_and_grad(
                lambda trained: summed_loss(graphdef, trained, frozen.at(step, index), rows_bt),
                has_aux=True,
            )(state.params)
            total = jax.tree.map(jnp.add, total, (grads, sums))
            return (total, jnp.maximum(max_logit_lh, logit_lh)), None

        first = jax.tree.map(lambda x: x[0], rows_abt)
        _, (sums, logit_lh) = jax.eval_shape(
            lambda: summed_loss(graphdef, state.params, frozen, first)
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state.params, sums))
        carry = (zeros, jnp.full(logit_lh.shape, -jnp.inf, logit_lh.dtype))
        indices_a = jnp.arange(len(rows_abt.tokens_bt))
        ((grads, sums), max_logit_lh), _ = jax.lax.scan(
            add_micro_batch, carry, (rows_abt, indices_a)
        )
        # A batch in which nothing counts has no gradient.
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss = sums.loss / weight
        extra: dict[str, Any] = {}
        if not jax.tree.leaves(frozen.base):
            extra = {"max_logits": logits_by_module(state.params, max_logit_lh)}
        after, _ = apply_gradients(state, grads, None, optimizer, bias_rate=0.0, **extra)
        return after, StepMetrics(
            loss=loss,
            token_acc=sums.hits / weight,
            tokens=sums.weight,
            learning_rate=jnp.asarray(schedule(step), jnp.float32),
            grad_norm=optax.tree.norm(grads),
            max_attention_logit=max_logit_lh.max(),
            grads_finite=all_finite((grads, loss)),
            state_finite=all_finite(after),
        )

    return train_step


def make_validate(graphdef: nnx.GraphDef) -> Callable[..., Sums]:
    """Builds `validate(trained, frozen, rows_kbt)`: the sums over all held-out rows.

    Args:
        graphdef: Static half of the model, without dropout.
    """

    def validate(trained: nnx.State, frozen: Frozen, rows_kbt: Rows) -> Sums:
        def one(rows_bt: Rows) -> Sums:
            return summed_loss(graphdef, trained, frozen, rows_bt)[1][0]

        return jax.tree.map(jnp.sum, jax.lax.map(one, rows_kbt))

    return validate


def accuracy_of(hits: float, weight: float) -> float:
    """The share of tokens that were right; 0 of none."""
    return hits / weight if weight else 0.0
