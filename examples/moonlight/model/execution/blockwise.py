"""Causal attention in square blocks, whose logits are never kept: those of one block at a time.

The blocks on and below the diagonal are visited by one loop, whose body is the whole program: a
list of blocks written one after the other would not do, as a compiler is free to compute the
logits of all of them before it uses any. (XLA:TPU did: 4.6 GB for two sequences of 8,192 tokens
and 16 heads, whatever the block.)

    key block j   0 1 2 3
    query block 0 0             forward, by rows: softmax of a row from its blocks, one by one
                1 1 2           backward, by columns: gradients of a column's keys and values
                2 3 4 5
                3 6 7 8 9       (numbers: the order of visits, forward)

Forward keeps, for each query, the largest logit so far and the sum of powers against it; both are
corrected when a larger one comes (online softmax, arXiv 1805.02867). Backward computes the logits
of a block again, from the log of that sum (FlashAttention, arXiv 2205.14135, algorithm 4).

Shapes are suffixes, see `moonlight.py`; `t` and `s` are the queries and keys of one block here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Below every logit, and finite: the difference of two is a number.
_LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The blocks of one attention.

    Attributes:
        block: Queries and keys of a block.
        time: Positions of a sequence; what fills the last block up does not count.
        hot_above: Logits above this are counted; None counts none.
    """

    block: int
    time: int
    hot_above: float | None

    @property
    def blocks(self) -> int:
        """How many fill a row of the square."""
        return -(-self.time // self.block)

    def visit(
        self, step: Callable[[Any, jax.Array, jax.Array], Any], start: Any, *, by_columns: bool
    ) -> Any:
        """Applies `step(carry, i, j)` to query block i and key block j, for all with j <= i."""
        pairs = [(i, j) for i in range(self.blocks) for j in range(i + 1)]
        if by_columns:
            pairs.sort(key=lambda pair: (pair[1], pair[0]))
        query_v, key_v = jnp.array(pairs, jnp.int32).T

        def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            v, inner = carry
            return v + 1, step(inner, query_v[v], key_v[v])

        # Not `scan`: within a scan over layers, JAX would compute what depends on i and j alone
        # outside of that, once, and keep it for every visit. That is all masks: 4.6 GB on a device.
        count = len(pairs)
        return jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), start))[1]

    def rows(self, x_bt: jax.Array, index: jax.Array) -> jax.Array:
        """The block of that number, of what has positions on axis 1."""
        return jax.lax.dynamic_slice_in_dim(x_bt, index * self.block, self.block, axis=1)

    def put(self, x_bt: jax.Array, rows_bt: jax.Array, index: jax.Array) -> jax.Array:
        """Writes the block of that number."""
        rows_bt = rows_bt.astype(x_bt.dtype)
        return jax.lax.dynamic_update_slice_in_dim(x_bt, rows_bt, index * self.block, axis=1)


def attention(
    q_bthp: jax.Array,
    k_bshp: jax.Array,
    v_bshw: jax.Array,
    segment_bt: jax.Array | None,
    *,
    block: int,
    hot_above: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Causal softmax attention within segments, logits divided by the root of the queries' width.

    Args:
        q_bthp: Queries.
        k_bshp: Keys, with as many heads.
        v_bshw: Values, with as many heads.
        segment_bt: Number of the segment of each position, 0 of padding; None is one segment.
        block: Queries and keys of a block.
        hot_above: Count the logits above this; None counts none.

    Returns:
        The output `[b, t, h, w]` in the dtype of the values; of each head the largest logit that a
        position reads, padding left out, and how many are hot or None, both float32 `[h]` and
        without gradient.
    """
    plan = _Plan(block, q_bthp.shape[1], hot_above)
    missing = plan.blocks * block - plan.time
    args = (q_bthp, k_bshp, v_bshw, segment_bt)
    if missing:
        args = jax.tree.map(
            lambda x_bt: jnp.pad(x_bt, ((0, 0), (0, missing), *((0, 0),) * (x_bt.ndim - 2))), args
        )
    out: Any = _attention(plan, *args)
    out_bthw, max_logit_h, hot_h = out
    return out_bthw[:, : plan.time], max_logit_h, hot_h


def _logits(
    plan: _Plan, q_bthp: jax.Array, k_bshp: jax.Array, segment_bt: Any, i: jax.Array, j: jax.Array
) -> jax.Array:
    """The logits of a block, float32 `[b, h, t, s]`; `_LOWEST` where a query reads no key.

    A row that has read nothing in the blocks so far has `_LOWEST` for its largest logit, and each
    key of theirs counts 1, not 0. The first real logit, at the latest the diagonal's, multiplies
    that sum by exp(_LOWEST - logit) = 0.
    """
    logit_bhts = jnp.einsum("bthp,bshp->bhts", q_bthp, k_bshp, preferred_element_type=jnp.float32)
    place_t = jnp.arange(plan.block)
    seen_ts = i * plan.block + place_t[:, None] >= j * plan.block + place_t[None]
    seen_bhts = seen_ts[None, None]
    if segment_bt is not None:
        own_bts = plan.rows(segment_bt, i)[:, :, None] == plan.rows(segment_bt, j)[:, None]
        seen_bhts = seen_bhts & own_bts[:, None]
    return jnp.where(seen_bhts, logit_bhts * q_bthp.shape[-1] ** -0.5, _LOWEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan, q_bthp: jax.Array, k_bshp: jax.Array, v_bshw: jax.Array, segment_bt: Any
):
    out_bthw, _, max_logit_h, hot_h = _visit_rows(plan, q_bthp, k_bshp, v_bshw, segment_bt)
    return out_bthw, max_logit_h, hot_h


def _visit_rows(
    plan: _Plan, q_bthp: jax.Array, k_bshp: jax.Array, v_bshw: jax.Array, segment_bt: Any
):
    """The output, the log of each query's sum of powers `[b, t, h]`, and what is measured."""
    batch, time, heads, _ = q_bthp.shape
    width = v_bshw.shape[3]

    def step(carry: Any, i: jax.Array, j: jax.Array) -> Any:
        out_bthw, log_bth, (top_bht, total_bht, sum_bhtw), max_logit_h, hot_h = carry
        logit_bhts = _logits(plan, plan.rows(q_bthp, i), plan.rows(k_bshp, j), segment_bt, i, j)
        measured_bhts = jnp.where(_counts(plan, segment_bt, i), logit_bhts, -jnp.inf)
        max_logit_h = jnp.maximum(max_logit_h, measured_bhts.max(axis=(0, 2, 3)))
        if plan.hot_above is not None:
            hot_h += (measured_bhts > plan.hot_above).sum((0, 2, 3), dtype=jnp.float32)

        begun = j > 0  # What is left of the row before does not count.
        top_bht = jnp.where(begun, top_bht, _LOWEST)
        new_bht = jnp.maximum(top_bht, logit_bhts.max(axis=3))
        power_bhts = jnp.exp(logit_bhts - new_bht[..., None])
        keep_bht = jnp.where(begun, jnp.exp(top_bht - new_bht), 0)
        total_bht = keep_bht * total_bht + power_bhts.sum(axis=3)
        sum_bhtw = keep_bht[..., None] * sum_bhtw + jnp.einsum(
            "bhts,bshw->bhtw",
            power_bhts.astype(v_bshw.dtype),
            plan.rows(v_bshw, j),
            preferred_element_type=jnp.float32,
        )
        # The row's last block is its diagonal, whose writing stays. Each query reads itself there.
        row_bthw = (sum_bhtw / total_bht[..., None]).swapaxes(1, 2)
        out_bthw = plan.put(out_bthw, row_bthw, i)
        log_bth = plan.put(log_bth, (new_bht + jnp.log(total_bht)).swapaxes(1, 2), i)
        return out_bthw, log_bth, (new_bht, total_bht, sum_bhtw), max_logit_h, hot_h

    row_bht = jnp.zeros((batch, heads, plan.block), jnp.float32)
    start = (
        jnp.zeros((batch, time, heads, width), v_bshw.dtype),
        jnp.zeros((batch, time, heads), jnp.float32),
        (row_bht, row_bht, jnp.zeros((batch, heads, plan.block, width), jnp.float32)),
        jnp.full((heads,), -jnp.inf),
        None if plan.hot_above is None else jnp.zeros((heads,)),
    )
    out_bthw, log_bth, _, max_logit_h, hot_h = plan.visit(step, start, by_columns=False)
    return out_bthw, log_bth, max_logit_h, hot_h


def _counts(plan: _Plan, segment_bt: Any, i: jax.Array) -> jax.Array:
    """Whether a query is one of the sequence's, no padding, `[b or 1, 1, t, 1]`."""
    if segment_bt is not None:
        return (plan.rows(segment_bt, i) > 0)[:, None, :, None]
    place_t = i * plan.block + jnp.arange(plan.block)
    return (place_t < plan.time)[None, None, :, None]


def _forward(plan: _Plan, q_bthp: Any, k_bshp: Any, v_bshw: Any, segment_bt: Any):
    args = (q_bthp, k_bshp, v_bshw, segment_bt)
    out_bthw, log_bth, max_logit_h, hot_h = _visit_rows(plan, *args)
    return (out_bthw, max_logit_h, hot_h), (*args, out_bthw, log_bth)


def _backward(plan: _Plan, saved: Any, grads: Any):
    q_bthp, k_bshp, v_bshw, segment_bt, out_bthw, log_bth = saved
    g_bthw = grads[0]
    # What the softmax takes off the gradient of each probability: their weighted mean.
    mean_bth = jnp.einsum("bthw,bthw->bth", out_bthw, g_bthw, preferred_element_type=jnp.float32)
    scale = q_bthp.shape[-1] ** -0.5

    def step(carry: Any, i: jax.Array, j: jax.Array) -> Any:
        d_q_bthp, d_k_bshp, d_v_bshw, (d_key_bshp, d_value_bshw) = carry
        rows_bthp, keys_bshp = plan.rows(q_bthp, i), plan.rows(k_bshp, j)
        grad_bthw = plan.rows(g_bthw, i)
        logit_bhts = _logits(plan, rows_bthp, keys_bshp, segment_bt, i, j)
        log_bht1, mean_bht1 = (
            plan.rows(x_bth, i).swapaxes(1, 2)[..., None] for x_bth in (log_bth, mean_bth)
        )
        prob_bhts = jnp.exp(logit_bhts - log_bht1)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_prob_bhts = product("bthw,bshw->bhts", grad_bthw, plan.rows(v_bshw, j))
        d_logit_bhts = (scale * prob_bhts * (d_prob_bhts - mean_bht1)).astype(q_bthp.dtype)

        begun = i > j
        d_key_bshp = jnp.where(begun, d_key_bshp, 0)
        d_value_bshw = jnp.where(begun, d_value_bshw, 0)
        d_key_bshp += product("bhts,bthp->bshp", d_logit_bhts, rows_bthp)
        d_value_bshw += product("bhts,bthw->bshw", prob_bhts.astype(v_bshw.dtype), grad_bthw)
        d_rows_bthp = product("bhts,bshp->bthp", d_logit_bhts, keys_bshp)
        d_q_bthp = plan.put(d_q_bthp, plan.rows(d_q_bthp, i) + d_rows_bthp, i)
        d_k_bshp, d_v_bshw = plan.put(d_k_bshp, d_key_bshp, j), plan.put(d_v_bshw, d_value_bshw, j)
        return d_q_bthp, d_k_bshp, d_v_bshw, (d_key_bshp, d_value_bshw)

    def column(x_bs: jax.Array) -> jax.Array:
        return jnp.zeros((x_bs.shape[0], plan.block, *x_bs.shape[2:]), jnp.float32)

    start = (
        jnp.zeros(q_bthp.shape, jnp.float32),
        jnp.zeros_like(k_bshp),
        jnp.zeros_like(v_bshw),
        (column(k_bshp), column(v_bshw)),
    )
    d_q_bthp, d_k_bshp, d_v_bshw, _ = plan.visit(step, start, by_columns=True)
    return d_q_bthp.astype(q_bthp.dtype), d_k_bshp, d_v_bshw, None


_attention.defvjp(_forward, _backward)
