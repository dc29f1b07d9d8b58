"""Attention: rotated positions, the causal kind for training, and the kind that reads a cache.

Shapes are suffixes, see `moonlight.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from examples.moonlight.model.execution import blockwise
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.packed import Packed

# Moonlight's report watches the share of attention logits above this (arXiv 2502.16982, App. F).
HOT_LOGIT = 100.0


def rope_table(position_bt: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `position * theta^(-2i / width)`, float32 `[b, t, width / 2]`."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = position_bt.astype(jnp.float32)[..., None] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x_bthr: jax.Array, table: tuple[jax.Array, jax.Array], *, interleaved: bool
) -> jax.Array:
    """Rotates pairs of the last axis by position.

    Args:
        x_bthr: Queries or keys, `[batch, time, heads, rope width]`.
        table: What `rope_table` returned for these positions and this width, `[b or 1, t, r / 2]`.
        interleaved: Whether a pair is (0, 1), (2, 3), ..., as in Moonlight's weights, or
            (0, r/2), (1, r/2 + 1), ..., as in Llama's and Qwen's.

    Returns:
        The rotated array, in the dtype of `x_bthr`; the rotation itself is float32, because
        bfloat16 could not tell positions beyond 256 apart.
    """
    cos, sin = (half[:, :, None, :] for half in table)
    wide = x_bthr.astype(jnp.float32)
    if interleaved:
        pairs = wide.reshape(*x_bthr.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return rotated.reshape(x_bthr.shape).astype(x_bthr.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x_bthr.dtype)


class AttentionStats(NamedTuple):
    """What attention measured of one layer, after scaling, before softmax, over causal positions.

    Attributes:
        max_logit_h: Largest logit of each head, float32.
        hot_share_h: Share of logits above `HOT_LOGIT`, float32; None unless monitored.
    """

    max_logit_h: jax.Array
    hot_share_h: jax.Array | None


def causal_attention(
    q_bthp: jax.Array,
    k_bshp: jax.Array,
    v_bshw: jax.Array,
    execution: Execution,
    packed: Packed | None = None,
) -> tuple[jax.Array, AttentionStats]:
    """Softmax attention of each position to itself and those before it, within each sequence.

    With `execution.attention_block` in square blocks of that many queries and keys, see
    `execution/blockwise.py`: the logits of one block exist at a time, forward and backward, and of
    the blocks behind the diagonal nothing is computed.

    Args:
        q_bthp: Queries.
        k_bshp: Keys; their heads divide the queries' (grouped-query attention).
        v_bshw: Values, with the heads of the keys.
        execution: How to run it.
        packed: The samples of each row: none reads another. None takes a row for one sample.

    Returns:
        The output `[b, t, h, w]` in the dtype of the values, and what was measured.
    """
    batch, time, heads, _ = q_bthp.shape
    if k_bshp.shape[2] != heads:
        repeats = heads // k_bshp.shape[2]
        k_bshp, v_bshw = (jnp.repeat(x, repeats, axis=2) for x in (k_bshp, v_bshw))
    segment_bt = None if packed is None else packed.segment_bt
    hot_above = HOT_LOGIT if execution.monitor else None
    block = execution.attention_block
    if block is None or block >= time:
        out_bthw, max_logit_h, hot_h = _whole(q_bthp, k_bshp, v_bshw, segment_bt, hot_above)
    else:
        out_bthw, max_logit_h, hot_h = blockwise.attention(
            q_bthp, k_bshp, v_bshw, segment_bt, block=block, hot_above=hot_above
        )
    hot_share_h = None
    if hot_h is not None:
        if packed is None:
            logits = batch * time * (time + 1) / 2
        else:  # A position at p of its sample reads p + 1.
            read_bt = jnp.where(packed.segment_bt > 0, packed.position_bt + 1, 0)
            logits = jnp.maximum(read_bt.sum(dtype=jnp.float32), 1)
        hot_share_h = hot_h / logits
    return out_bthw, AttentionStats(max_logit_h, hot_share_h)


def _whole(
    q_bthp: jax.Array,
    k_bshp: jax.Array,
    v_bshw: jax.Array,
    segment_bt: jax.Array | None,
    hot_above: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What `blockwise.attention` returns, from all logits at once."""
    time = q_bthp.shape[1]
    logit_bhts = jnp.einsum("bthp,bshp->bhts", q_bthp, k_bshp, preferred_element_type=jnp.float32)
    logit_bhts = logit_bhts * q_bthp.shape[-1] ** -0.5
    seen_bhts = jnp.tril(jnp.ones((time, time), bool))[None, None]
    if segment_bt is not None:
        seen_bhts = seen_bhts & (segment_bt[:, None, :, None] == segment_bt[:, None, None, :])
    logit_bhts = jnp.where(seen_bhts, logit_bhts, -jnp.inf)
    measured_bhts = jax.lax.stop_gradient(logit_bhts)
    if segment_bt is not None:
        measured_bhts = jnp.where((segment_bt > 0)[:, None, :, None], measured_bhts, -jnp.inf)
    max_logit_h = measured_bhts.max(axis=(0, 2, 3))
    hot_h = None
    if hot_above is not None:
        hot_h = (measured_bhts > hot_above).sum((0, 2, 3), dtype=jnp.float32)
    prob_bhts = jax.nn.softmax(logit_bhts, axis=-1).astype(v_bshw.dtype)
    return jnp.einsum("bhts,bshw->bthw", prob_bhts, v_bshw), max_logit_h, hot_h


def cached_attention(
    q_bthp: jax.Array, k_bshp: jax.Array, v_bshw: jax.Array, position_bt: jax.Array, scale: float
) -> jax.Array:
    """Attention of new tokens to a cache that holds slots behind them, too.

    Args:
        q_bthp: Queries of the new tokens.
        k_bshp: Every slot's key, slot s being position s; heads divide those of the queries.
        v_bshw: Every slot's value.
        position_bt: The new tokens' positions: each reads the slots up to its own.
        scale: The factor on the logits.

    Returns:
        The output `[b, t, h, w]`, in the dtype of the values.
    """
    batch, time, heads, width = q_bthp.shape
    kv_heads = k_bshp.shape[2]
    q_btgrp = q_bthp.reshape(batch, time, kv_heads, heads // kv_heads, width)
    logit_bgrts = scale * jnp.einsum(
        "btgrp,bsgp->bgrts", q_btgrp, k_bshp, preferred_element_type=jnp.float32
    )
    seen_bts = jnp.arange(k_bshp.shape[1])[None, None, :] <= position_bt[:, :, None]
    logit_bgrts = jnp.where(seen_bts[:, None, None], logit_bgrts, -jnp.inf)
    prob_bgrts = jax.nn.softmax(logit_bgrts, axis=-1).astype(v_bshw.dtype)
    out_btgrw = jnp.einsum("bgrts,bsgw->btgrw", prob_bgrts, v_bshw)
    return out_btgrw.reshape(batch, time, heads, v_bshw.shape[-1])


def write_cache(cache_lbs: jax.Array, layer: Any, new_bt: jax.Array, position_bt: jax.Array):
    """Puts entries `[b, t, ...]` into a cache `[l, b, s, ...]`; those behind its end are lost."""
    rows_b1 = jnp.arange(new_bt.shape[0])[:, None]
    return cache_lbs.at[layer, rows_b1, position_bt].set(
        new_bt.astype(cache_lbs.dtype), mode="drop"
    )
