"""Moonlight, the Mixture-of-Experts transformer that Muon was scaled on, read downward.

The architecture is DeepSeek-V3's (arXiv 2412.19437, section 2.1) at the size of Moonlight-16B-A3B
(arXiv 2502.16982): multi-head latent attention, a dense first layer, then layers of routed and
shared experts whose load is balanced by a bias instead of an auxiliary loss. Linear layers, norms
and attention's inner part are in `layers.py`, the experts in `experts.py`, the head's loss in
`loss.py`.

Arrays carry their shape as a suffix, and einsum strings use the same letters:

    b batch      n tokens, b*t flattened    h heads               e routed experts
    t time       d hidden                   p q/k width per head  f width of an expert
    s time read  v vocabulary               r its rope part       k experts per token
    l layers     z latent of keys, values   w value width per head

The layers with experts are one stack of parameters with a leading axis l, and the program loops
over it: it does not grow with depth. On a mesh the batch lies over `BATCH_AXES`, and XLA derives
the rest from where the parameters lie (`sharding.py`), but for the routing, the routed experts and
the loss, where what each device does is written.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.moonlight.config import Execution, MoonlightConfig
from examples.moonlight.experts import MoE, RouterBias
from examples.moonlight.layers import (
    MLP,
    AttentionStats,
    Embed,
    Linear,
    RMSNorm,
    apply_rope,
    cached_attention,
    causal_attention,
    mean_square,
    rope_table,
    run_layer,
    scan_layers,
    stack_layers,
    write_cache,
)
from examples.moonlight.loss import head_loss

# DeepSeek-V3 builds this norm with its class's default epsilon, not with the configuration's.
LATENT_NORM_EPS = 1e-6


class LatentCache(NamedTuple):
    """What generation keeps of the tokens behind it: `z + r` numbers per token and layer.

    Attributes:
        latent_lbsz: The normalised latent of keys and values, in the compute dtype.
        k_rope_lbsr: The rotated key that all heads share.
    """

    latent_lbsz: jax.Array
    k_rope_lbsr: jax.Array


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V3, Eq. 1-11, without the latent of the queries).

    Keys and values are expanded per head from one normalised latent of width z. Position enters
    through separate "decoupled" components: r extra dimensions of each query head, and one rotated
    key that all heads share.
    """

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, execution: Execution):
        c, heads, std = config, config.num_attention_heads, config.initializer_range
        kv_width = c.qk_nope_head_dim + c.v_head_dim
        self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim, stddev=std, rngs=rngs)
        self.kv_a_proj = Linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, stddev=std, rngs=rngs
        )
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * kv_width, stddev=std, rngs=rngs)
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, stddev=std, rngs=rngs)
        self.config = config
        self.execution = execution

    def __call__(self, act_nd: jax.Array, batch: int) -> tuple[jax.Array, AttentionStats]:
        """Attends causally within each of `batch` sequences.

        Args:
            act_nd: Normalised activations `[batch * time, hidden]`.
            batch: Sequences in `act_nd`.

        Returns:
            The output `[batch * time, hidden]`, and what was measured.
        """
        c = self.config
        time, heads = act_nd.shape[0] // batch, c.num_attention_heads
        q_nope, q_rope, latent_btz, k_rope = self._project(act_nd, jnp.arange(time)[None], batch)
        kv_nh = self.kv_b_proj(latent_btz.reshape(batch * time, c.kv_lora_rank))
        kv_bsh = kv_nh.reshape(batch, time, heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v_bshw = jnp.split(kv_bsh, [c.qk_nope_head_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope, (batch, time, heads, c.qk_rope_head_dim))
        q_bthp = jnp.concatenate([q_nope, q_rope], axis=-1)
        k_bshp = jnp.concatenate([k_nope, k_rope], axis=-1)
        out_bthw, stats = causal_attention(q_bthp, k_bshp, v_bshw, self.execution)
        return self.o_proj(out_bthw.reshape(batch * time, heads * c.v_head_dim)), stats

    def decode(
        self, act_nd: jax.Array, cache: LatentCache, layer: jax.Array, position_bt: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """The same for new tokens at `position_bt` behind what the cache holds.

        Queries go to the space of the latent, and what attention reads comes back from it, so that
        keys and values of the cached tokens are never expanded (DeepSeek-V2, arXiv 2405.04434,
        section 2.1.2).

        Returns:
            The output `[n, hidden]`, and the cache with the new tokens of this layer.
        """
        c = self.config
        batch, time = position_bt.shape
        q_nope, q_rope, latent_btz, k_rope = self._project(act_nd, position_bt, batch)
        cache = LatentCache(
            write_cache(cache.latent_lbsz, layer, latent_btz, position_bt),
            write_cache(cache.k_rope_lbsr, layer, k_rope[:, :, 0], position_bt),
        )
        kv_b_zhx = (
            self.kv_b_proj.kernel[...]
            .astype(act_nd.dtype)
            .reshape(c.kv_lora_rank, c.num_attention_heads, -1)
        )
        k_zhp, v_zhw = jnp.split(kv_b_zhx, [c.qk_nope_head_dim], axis=-1)
        q_latent = jnp.einsum("bthp,zhp->bthz", q_nope, k_zhp)
        # One key head for all query heads: the latent, and beside it the rotated key.
        latent_bs1z = cache.latent_lbsz[layer][:, :, None]
        k_bs1x = jnp.concatenate([latent_bs1z, cache.k_rope_lbsr[layer][:, :, None]], axis=-1)
        q_bthx = jnp.concatenate([q_latent, q_rope], axis=-1)
        scale = c.qk_head_dim**-0.5
        read_bthz = cached_attention(q_bthx, k_bs1x, latent_bs1z, position_bt, scale)
        out_bthw = jnp.einsum("bthz,zhw->bthw", read_bthz, v_zhw)
        return self.o_proj(out_bthw.reshape(batch * time, -1)), cache

    def _project(self, act_nd: jax.Array, position_bt: jax.Array, batch: int):
        """Queries without and with position, latent `[b, t, z]`, and the key with position."""
        c = self.config
        table = rope_table(position_bt, c.qk_rope_head_dim, c.rope_theta)
        q_bthp = self.q_proj(act_nd).reshape(batch, -1, c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = jnp.split(q_bthp, [c.qk_nope_head_dim], axis=-1)
        latent_nz, k_rope_nr = jnp.split(self.kv_a_proj(act_nd), [c.kv_lora_rank], axis=-1)
        latent_btz = self.kv_a_layernorm(latent_nz).reshape(batch, -1, c.kv_lora_rank)
        k_rope = k_rope_nr.reshape(batch, -1, 1, c.qk_rope_head_dim)
        return (
            q_nope,
            apply_rope(q_rope, table, interleaved=True),
            latent_btz,
            apply_rope(k_rope, table, interleaved=True),
        )


class LayerStats(NamedTuple):
    """What one layer measured; see `ModelStats`."""

    load_e: jax.Array | None
    dropped: jax.Array | None
    attention: AttentionStats
    attention_square: jax.Array | None
    mlp_square: jax.Array | None


class DecoderLayer(nnx.Module):
    """Pre-norm residual attention, then a pre-norm residual MLP, dense or of experts."""

    def __init__(
        self, config: MoonlightConfig, *, dense: bool, rngs: nnx.Rngs, execution: Execution
    ):
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = LatentAttention(c, rngs=rngs, execution=execution)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = (
            MLP(c.hidden_size, c.intermediate_size, stddev=c.initializer_range, rngs=rngs)
            if dense
            else MoE(c, rngs=rngs, execution=execution)
        )
        self.monitor = execution.monitor

    def __call__(self, act_nd: jax.Array, batch: int) -> tuple[jax.Array, LayerStats]:
        """Returns activations `[n, hidden]`, and what was measured."""
        attention_nd, attention = self.self_attn(self.input_layernorm(act_nd), batch)
        act_nd = act_nd + attention_nd
        mlp_nd, load_e, dropped = self._mlp(act_nd)
        squares = (mean_square(x) if self.monitor else None for x in (attention_nd, mlp_nd))
        return act_nd + mlp_nd, LayerStats(load_e, dropped, attention, *squares)

    def decode(
        self, act_nd: jax.Array, cache: LatentCache, layer: jax.Array, position_bt: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """The same for new tokens behind a cache."""
        normed_nd = self.input_layernorm(act_nd)
        attention_nd, cache = self.self_attn.decode(normed_nd, cache, layer, position_bt)
        act_nd = act_nd + attention_nd
        return act_nd + self._mlp(act_nd)[0], cache

    def _mlp(self, act_nd: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        normed_nd = self.post_attention_layernorm(act_nd)
        if isinstance(self.mlp, MoE):
            return self.mlp(normed_nd)
        return self.mlp(normed_nd), None, None


# --------------------------------------------------------------------------------------------------
# The model, its loss and its balance
# --------------------------------------------------------------------------------------------------


class ModelStats(NamedTuple):
    """What training watches, measured in the forward pass; None where there is nothing to measure.

    Attributes:
        load_le: Tokens routed to each expert, int32 `[layers with experts, experts]`. Sums over
            replicas and micro-batches are again loads.
        dropped_l: Choices that a capacity dropped, int32 `[layers with experts]`.
        max_logit_lh: Largest attention logit, float32 `[layers, heads]`.
        hot_share_lh: Share of attention logits above 100, float32 `[layers, heads]`; monitored.
        attention_rms_l: RMS of what attention adds to the stream, float32 `[layers]`; monitored.
        mlp_rms_l: The same of the MLP, or of the experts.
    """

    load_le: jax.Array | None
    dropped_l: jax.Array | None
    max_logit_lh: jax.Array
    hot_share_lh: jax.Array | None
    attention_rms_l: jax.Array | None
    mlp_rms_l: jax.Array | None


def merge_stats(stats: ModelStats) -> ModelStats:
    """The statistics of one step from those of its micro-batches, stacked along a leading axis."""

    def rms(x_al: jax.Array | None) -> jax.Array | None:
        return None if x_al is None else jnp.sqrt(jnp.mean(jnp.square(x_al), axis=0))

    def total(x_a: jax.Array | None) -> jax.Array | None:
        return None if x_a is None else x_a.sum(axis=0)

    return ModelStats(
        load_le=total(stats.load_le),
        dropped_l=total(stats.dropped_l),
        max_logit_lh=stats.max_logit_lh.max(axis=0),
        hot_share_lh=None if stats.hot_share_lh is None else stats.hot_share_lh.mean(axis=0),
        attention_rms_l=rms(stats.attention_rms_l),
        mlp_rms_l=rms(stats.mlp_rms_l),
    )


class Moonlight(nnx.Module):
    """The language model: tokens to next-token logits.

    Args:
        config: The architecture.
        rngs: Source of the initial weights, stream `params`.
        execution: How to run it; by default in float32 on one device. On a mesh the batch must
            divide by `BATCH_AXES`.

    Raises:
        ValueError: A mesh axis does not divide what it shards.
    """

    def __init__(
        self, config: MoonlightConfig, *, rngs: nnx.Rngs, execution: Execution | None = None
    ):
        c, std = config, config.initializer_range
        execution = execution or Execution()
        execution.sharding.check_divides(
            ("expert", "n_routed_experts", c.n_routed_experts),
            ("tensor", "num_attention_heads", c.num_attention_heads),
            ("tensor", "intermediate_size", c.intermediate_size),
            ("tensor", "moe_intermediate_size", c.moe_intermediate_size),
            ("fsdp", "hidden_size", c.hidden_size),
        )
        self.embed = Embed(c.vocab_size, c.hidden_size, stddev=std, rngs=rngs, execution=execution)
        self.first_layers = nnx.List(
            DecoderLayer(c, dense=True, rngs=rngs, execution=execution)
            for _ in range(c.first_k_dense_replace)
        )
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(c, dense=False, rngs=rngs, execution=execution),
            c.num_hidden_layers - c.first_k_dense_replace,
            rngs,
        )
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, stddev=std, rngs=rngs)
        self.config = config
        self.execution = execution

    def __call__(self, tokens_bt: jax.Array) -> tuple[jax.Array, ModelStats]:
        """Logits for the token after each position.

        Args:
            tokens_bt: Token ids, an integer array `[batch, time]`.

        Returns:
            Logits, float32 `[batch, time, vocab]`, and the statistics of this forward pass.

        Raises:
            ValueError: The tokens are not an integer matrix, longer than `max_position_embeddings`,
                or sharded over Explicit mesh axes.
        """
        act_nd, stats = self.hidden(tokens_bt)
        return self.logits(act_nd).reshape(*tokens_bt.shape, -1), stats

    def hidden(self, tokens_bt: jax.Array) -> tuple[jax.Array, ModelStats]:
        """What the head reads: activations behind the last norm, `[batch * time, hidden]`.

        Args, statistics and errors are those of `__call__`.
        """
        check_tokens(tokens_bt, self.config.max_position_embeddings)
        batch = tokens_bt.shape[0]

        def run(layer: Any, act_nd: jax.Array, _: None) -> tuple[jax.Array, LayerStats]:
            return layer(act_nd, batch)

        act_nd = self.embed(tokens_bt.reshape(-1))
        firsts = []
        for layer in self.first_layers:
            act_nd, measured = run_layer(layer, run, act_nd, None, self.execution)
            firsts.append(measured)
        act_nd, rest = scan_layers(self.layers, run, act_nd, None, self.execution)
        return self.norm(act_nd), _collect(firsts, rest)

    def logits(self, act_nd: jax.Array) -> jax.Array:
        """The head: `[n, hidden]` to float32 `[n, vocab]`, accumulated and left in float32."""
        kernel_dv = self.lm_head.kernel[...].astype(act_nd.dtype)
        return jnp.dot(act_nd, kernel_dv, preferred_element_type=jnp.float32)

    def loss(self, act_nd: jax.Array, target_n: jax.Array) -> jax.Array:
        """Mean cross-entropy of predicting `target_n` from `[n, hidden]`, without all logits."""
        return head_loss(act_nd, self.lm_head.kernel[...], target_n, self.execution)

    def init_cache(self, batch: int, length: int) -> LatentCache:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        c, shape = self.config, (self.config.num_hidden_layers, batch, length)
        return LatentCache(
            jnp.zeros((*shape, c.kv_lora_rank), self.execution.dtype),
            jnp.zeros((*shape, c.qk_rope_head_dim), self.execution.dtype),
        )

    def decode(
        self, tokens_bt: jax.Array, cache: LatentCache, start_b: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """Runs new tokens behind those in the cache: prefill with many, decoding with one.

        Args:
            tokens_bt: New ids `[batch, new]`; what fills up a shorter row is written behind its
                end, where the row's own next tokens replace it before anything reads it.
            cache: What `init_cache` or the last call returned.
            start_b: The position of each row's first new token.

        Returns:
            Activations behind the last norm, `[batch * new, hidden]`, and the cache.
        """
        position_bt = start_b[:, None] + jnp.arange(tokens_bt.shape[1])[None]
        first = len(self.first_layers)

        def run(layer: Any, carry: tuple[jax.Array, LatentCache], index: jax.Array):
            act_nd, cache = carry
            return layer.decode(act_nd, cache, index, position_bt), None

        carry = (self.embed(tokens_bt.reshape(-1)), cache)
        for index, layer in enumerate(self.first_layers):
            carry, _ = run_layer(layer, run, carry, jnp.int32(index), self.execution)
        index_l = jnp.arange(first, self.config.num_hidden_layers, dtype=jnp.int32)
        (act_nd, cache), _ = scan_layers(self.layers, run, carry, index_l, self.execution)
        return self.norm(act_nd), cache


def check_tokens(tokens_bt: jax.Array, longest: int) -> None:
    """Checks that tokens are an integer matrix of at most `longest` columns, on Auto axes.

    Raises:
        ValueError: They are not.
    """
    if tokens_bt.ndim != 2 or not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
        raise ValueError(
            "tokens must be an integer array [batch, time], "
            f"got {tokens_bt.dtype}{list(tokens_bt.shape)}."
        )
    # Gathers and the split of [n] into [b, t] have no unique sharding on Explicit axes.
    spec = jax.typeof(tokens_bt).sharding.spec
    if any(spec):
        raise ValueError(
            f"tokens are sharded as {spec} over an Explicit mesh: "
            "shard the batch over mesh axes of AxisType.Auto."
        )
    if tokens_bt.shape[1] > longest:
        raise ValueError(
            f"the sequence has {tokens_bt.shape[1]} tokens, and max_position_embeddings is "
            f"{longest}: shorten it, or replace the field."
        )


def _collect(firsts: list[LayerStats], rest: LayerStats) -> ModelStats:
    """Puts the statistics of the first layers before those of the stack."""

    def joined(pick: Any) -> jax.Array | None:
        if pick(rest) is None:
            return None
        return jnp.concatenate([*(pick(stats)[None] for stats in firsts), pick(rest)])

    def root(square_l: jax.Array | None) -> jax.Array | None:
        return None if square_l is None else jnp.sqrt(square_l)

    return ModelStats(
        load_le=rest.load_e,
        dropped_l=rest.dropped,
        max_logit_lh=joined(lambda stats: stats.attention.max_logit_h),
        hot_share_lh=joined(lambda stats: stats.attention.hot_share_h),
        attention_rms_l=root(joined(lambda stats: stats.attention_square)),
        mlp_rms_l=root(joined(lambda stats: stats.mlp_square)),
    )


def next_token_loss(model: Any, tokens_bt: jax.Array) -> tuple[jax.Array, ModelStats]:
    """Mean cross-entropy of predicting each token from those before it.

    Args:
        model: A `Moonlight`, or another model with its `hidden` and `loss`.
        tokens_bt: Integer array `[batch, time + 1]`: one column more than the model reads.

    Returns:
        The loss in nats per predicted token, a float32 scalar, and the forward pass's statistics.
    """
    act_nd, stats = model.hidden(tokens_bt[:, :-1])
    return model.loss(act_nd, tokens_bt[:, 1:].reshape(-1)), stats


def update_router_bias(
    bias_le: jax.Array, load_le: jax.Array, rate: float | jax.Array
) -> jax.Array:
    """Moves routers' biases towards balance: once per optimizer step.

    `e = mean(load) - load; b += rate * (sign(e) - mean(sign(e)))` (Moonlight, App. C). Subtracting
    the mean keeps the biases' sum constant, where DeepSeek-V3's rule lets all of them drift
    together.

    Args:
        bias_le: The biases, float32 `[layers with experts, experts]`.
        load_le: Tokens routed to each expert during this optimizer step, summed over replicas and
            micro-batches, of the same shape.
        rate: The bias update rate u: 1e-3 in Moonlight's pretraining, 0 in cooldown and
            fine-tuning.

    Returns:
        The new biases.

    Raises:
        ValueError: The shapes differ.
    """
    if load_le.shape != bias_le.shape:
        raise ValueError(f"load_le must have the shape {bias_le.shape}, got {load_le.shape}.")
    load_le = load_le.astype(jnp.float32)
    sign_le = jnp.sign(load_le.mean(axis=1, keepdims=True) - load_le)
    return bias_le + rate * (sign_le - sign_le.mean(axis=1, keepdims=True))


def max_violation(load_le: jax.Array) -> jax.Array:
    """Load imbalance `(max - mean) / mean` per layer, float32 `[layers]`: 0 if balanced."""
    load_le = load_le.astype(jnp.float32)
    mean_l = load_le.mean(axis=-1)
    return (load_le.max(axis=-1) - mean_l) / mean_l


class ParameterCounts(NamedTuple):
    """Sizes of a model, in parameters.

    Attributes:
        total: Every trained parameter.
        body: Those without the embedding and the head.
        active: Those of the body that one token passes through.
        router_bias: Balance biases, which are not trained and not in the other counts.
    """

    total: int
    body: int
    active: int
    router_bias: int


def parameter_counts(config: MoonlightConfig) -> ParameterCounts:
    """Counts a model's parameters from its abstract shapes; allocates nothing."""
    model = nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0)))
    total = body = routed = router_bias = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        size = variable.size
        if isinstance(variable, RouterBias):
            router_bias += size
            continue
        total += size
        if path[0] not in ("embed", "lm_head"):
            body += size
        if "experts" in path:
            routed += size
    unused = (
        routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    )
    return ParameterCounts(total, body, body - unused, router_bias)
