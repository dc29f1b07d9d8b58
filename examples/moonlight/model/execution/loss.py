"""Next-token cross-entropy and the head in one: the logits of all tokens never exist at once.

At 8,192 tokens and a vocabulary of 163,840, one sequence's float32 logits are 5.4 GB. Here a block
of tokens passes through the head, its loss and, when a gradient is wanted, back through the head,
before the next block: three products with the head, as many as if the logits had been kept.

On a mesh each device takes its own tokens: the head is gathered over `fsdp` in the compute dtype,
its vocabulary lies over `tensor`, and its gradient leaves in float32, summed where the head is
stored.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What `_summed_loss` has to know besides arrays.

    Attributes:
        dtype: The dtype of the products.
        block: Tokens at a time.
        vocab_axis: Mesh axis that shards the columns of the head, if any.
        store_axis: Mesh axis over which its rows are stored, if any.
        count_hits: Whether to count the targets that have the largest logit.
    """

    dtype: DTypeLike
    block: int | None
    vocab_axis: str | None
    store_axis: str | None
    count_hits: bool


def head_loss(
    act_nd: jax.Array, kernel_dv: jax.Array, target_n: jax.Array, execution: Execution
) -> jax.Array:
    """Mean cross-entropy of `softmax(act @ kernel)`, in nats per token.

    Args:
        act_nd: What the head reads, in the compute dtype.
        kernel_dv: The head, float32.
        target_n: The ids to predict, int32.
        execution: How to run it; `loss_block` is per device.

    Returns:
        A float32 scalar.
    """
    (total,) = _sums(act_nd, kernel_dv, target_n, None, execution)
    return total / act_nd.shape[0]


def weighted_head_loss(
    act_nd: jax.Array,
    kernel_dv: jax.Array,
    target_n: jax.Array,
    weight_n: jax.Array,
    execution: Execution,
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropies of `head_loss` times weights, float32 `[n]`, summed; and the hits.

    Returns:
        The sum in nats, and the sum of the weights of those targets that have the largest logit,
        both float32 scalars. No gradient reaches the weights, or comes from the hits.
    """
    total, hits = _sums(act_nd, kernel_dv, target_n, weight_n, execution)
    return total, hits


def _sums(
    act_nd: jax.Array,
    kernel_dv: jax.Array,
    target_n: jax.Array,
    weight_n: jax.Array | None,
    execution: Execution,
) -> tuple[jax.Array, ...]:
    sharding, count_hits = execution.sharding, weight_n is not None
    summed_loss: Any = _summed_loss  # What custom_vjp returns has no useful type.
    if sharding.mesh is None:
        plan = _Plan(execution.dtype, execution.loss_block, None, None, count_hits)
        return summed_loss(plan, act_nd, kernel_dv, target_n, weight_n)
    store_axis, vocab_axis = spec = sharding.param_spec(("lm_head", "kernel"), kernel_dv.shape)
    used = (axis if axis and sharding.size(axis) > 1 else None for axis in (vocab_axis, store_axis))
    plan = _Plan(execution.dtype, execution.loss_block, *used, count_hits=count_hits)
    batch = P(BATCH_AXES)

    def on_device(*args: Any) -> tuple[jax.Array, ...]:
        totals = summed_loss(plan, *args)
        return tuple(total[None] for total in totals)

    summed = jax.shard_map(
        on_device,
        mesh=sharding.mesh,
        in_specs=(batch, spec, batch, batch),
        out_specs=batch,
        check_vma=False,
    )(act_nd, kernel_dv, target_n, weight_n)
    return tuple(total.sum() for total in summed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(
    plan: _Plan,
    act_nd: jax.Array,
    kernel_dv: jax.Array,
    target_n: jax.Array,
    weight_n: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Sums over a device's tokens: of losses, and of hits if these are counted.

    `kernel_dv` is this device's part of the head. No weights are ones.
    """
    head_dv = _gather(plan, kernel_dv)
    sums = jax.lax.map(
        lambda block: _block_loss(plan, block, head_dv)[0],
        _blocks(plan, act_nd, target_n, weight_n),
    )
    return tuple(x_k.sum() for x_k in sums)


def _forward(
    plan: _Plan,
    act_nd: jax.Array,
    kernel_dv: jax.Array,
    target_n: jax.Array,
    weight_n: jax.Array | None,
):
    head_dv = _gather(plan, kernel_dv)

    def step(grad_dv: jax.Array, block: tuple[jax.Array, ...]):
        act_nd, _, weight_n = block
        sums, prob_nv, hit_nv = _block_loss(plan, block, head_dv)
        grad_nv = ((prob_nv - hit_nv) * weight_n[:, None]).astype(plan.dtype)
        grad_dv += jnp.dot(act_nd.T, grad_nv, preferred_element_type=jnp.float32)
        return grad_dv, (sums, grad_nv @ head_dv.T)

    blocks = _blocks(plan, act_nd, target_n, weight_n)
    grad_dv, (sums, grad_knd) = jax.lax.scan(step, jnp.zeros(head_dv.shape, jnp.float32), blocks)
    if plan.store_axis is not None:
        grad_dv = jax.lax.psum_scatter(grad_dv, plan.store_axis, scatter_dimension=0, tiled=True)
    grad_nd = grad_knd.reshape(-1, act_nd.shape[1])[: act_nd.shape[0]]
    # The head's gradient goes to its parts first. Left to itself XLA:TPU kept all of it, and all of
    # the head, while it went through the layers: 0.48 GiB more at the peak, with Moonlight-16B.
    grad_nd, grad_dv = jax.lax.optimization_barrier((grad_nd, grad_dv))
    return tuple(x_k.sum() for x_k in sums), (grad_nd, grad_dv)


def _backward(plan: _Plan, grads: tuple[jax.Array, jax.Array], g_sums: tuple[jax.Array, ...]):
    (grad_nd, grad_dv), g = grads, g_sums[0]
    if plan.vocab_axis is not None:
        # The sum is the same on all sharers of the vocabulary, and each is given its share of g.
        g = jax.lax.psum(g, plan.vocab_axis)
    return (g * grad_nd.astype(jnp.float32)).astype(grad_nd.dtype), g * grad_dv, None, None


_summed_loss.defvjp(_forward, _backward)


def _gather(plan: _Plan, kernel_dv: jax.Array) -> jax.Array:
    head_dv = kernel_dv.astype(plan.dtype)
    if plan.store_axis is None:
        return head_dv
    return jax.lax.all_gather(head_dv, plan.store_axis, axis=0, tiled=True)


def _blocks(
    plan: _Plan, act_nd: jax.Array, target_n: jax.Array, weight_n: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Activations, targets and weights in blocks `[k, block, ...]`; padding weighs 0."""
    tokens = act_nd.shape[0]
    block = min(plan.block or tokens, tokens)
    missing = -tokens % block
    if weight_n is None:
        weight_n = jnp.ones((tokens,), jnp.float32)
    return tuple(
        jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))).reshape(-1, block, *x.shape[1:])
        for x in (act_nd, target_n, weight_n)
    )


def _block_loss(
    plan: _Plan, block: tuple[jax.Array, ...], head_dv: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """A block's sums, its probabilities, and 1.0 at each target; the latter two `[n, v]`."""
    act_nd, target_n, weight_n = block
    logit_nv = jnp.dot(act_nd, head_dv, preferred_element_type=jnp.float32)
    first = 0
    max_n1 = logit_nv.max(axis=1, keepdims=True)
    if plan.vocab_axis is not None:
        first = jax.lax.axis_index(plan.vocab_axis) * head_dv.shape[1]
        max_n1 = jax.lax.pmax(max_n1, plan.vocab_axis)
    hit_nv = (target_n[:, None] == first + jnp.arange(head_dv.shape[1])[None]).astype(jnp.float32)
    power_nv = jnp.exp(logit_nv - max_n1)
    sums_n2 = jnp.stack([power_nv.sum(axis=1), (logit_nv * hit_nv).sum(axis=1)], axis=1)
    if plan.vocab_axis is not None:
        sums_n2 = jax.lax.psum(sums_n2, plan.vocab_axis)
    total_n, target_logit_n = sums_n2.T
    loss_n = jnp.log(total_n) + max_n1[:, 0] - target_logit_n
    sums = (jnp.vdot(loss_n, weight_n),)
    if plan.count_hits:
        right_n = (target_logit_n >= max_n1[:, 0]).astype(jnp.float32)
        sums = (*sums, jnp.vdot(right_n, weight_n))
    return sums, power_nv / total_n[:, None], hit_nv
