"""Moonlight, the Mixture-of-Experts transformer that Muon was scaled on, read downward.

The architecture is DeepSeek-V3's (arXiv 2412.19437, section 2.1) at the size of Moonlight-16B-A3B
(arXiv 2502.16982): multi-head latent attention, a dense first layer, then layers of routed and
shared experts whose load is balanced by a bias instead of an auxiliary loss. Linear layers, norms
and attention's inner part are in `layers.py`, the experts in `experts.py`, and how layers become a
model with a loss and a cache, in `language_model.py`.

Arrays carry their shape as a suffix, and einsum strings use the same letters:

    b batch      n tokens, b*t flattened    h heads               e routed experts
    t time       d hidden                   p q/k width per head  f width of an expert
    s time read  v vocabulary               r its rope part       k experts per token
    l layers     z latent of keys, values   w value width per head

The layers with experts are one stack of parameters with a leading axis l, and the program loops
over it: it does not grow with depth. On a mesh the batch lies over `BATCH_AXES`, and XLA derives
the rest from where the parameters lie (`execution/sharding.py`), but for the routing, the routed
experts and the loss, where what each device does is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.moonlight.model.attention import (
    AttentionStats,
    apply_rope,
    cached_attention,
    causal_attention,
    rope_table,
    write_cache,
)
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import MoE
from examples.moonlight.model.language_model import (
    DecoderLayer,
    LanguageModel,
    ParameterCounts,
    count_parameters,
)
from examples.moonlight.model.layers import MLP, Embed, Linear, RMSNorm, stack_layers
from examples.moonlight.model.packed import Packed, rope_positions

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

    def __call__(
        self, act_nd: jax.Array, batch: int, packed: Packed | None = None
    ) -> tuple[jax.Array, AttentionStats]:
        """Attends causally within each of `batch` sequences.

        Args:
            act_nd: Normalised activations `[batch * time, hidden]`.
            batch: Sequences in `act_nd`.
            packed: The samples of each sequence, if there are several.

        Returns:
            The output `[batch * time, hidden]`, and what was measured.
        """
        c = self.config
        time, heads = act_nd.shape[0] // batch, c.num_attention_heads
        position_bt = rope_positions(packed, time)
        q_nope, q_rope, latent_btz, k_rope = self._project(act_nd, position_bt, batch)
        kv_nh = self.kv_b_proj(latent_btz.reshape(batch * time, c.kv_lora_rank))
        kv_bsh = kv_nh.reshape(batch, time, heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v_bshw = jnp.split(kv_bsh, [c.qk_nope_head_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope, (batch, time, heads, c.qk_rope_head_dim))
        q_bthp = jnp.concatenate([q_nope, q_rope], axis=-1)
        k_bshp = jnp.concatenate([k_nope, k_rope], axis=-1)
        out_bthw, stats = causal_attention(q_bthp, k_bshp, v_bshw, self.execution, packed)
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
            self.kv_b_proj.whole_kernel()
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


# --------------------------------------------------------------------------------------------------
# The model and its balance
# --------------------------------------------------------------------------------------------------


class Moonlight(LanguageModel):
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

        def make_layer(rngs: nnx.Rngs, *, dense: bool) -> DecoderLayer:
            attention = LatentAttention(c, rngs=rngs, execution=execution)
            if dense:
                mlp = MLP(c.hidden_size, c.intermediate_size, stddev=std, rngs=rngs)
            else:
                mlp = MoE(c, rngs=rngs, execution=execution)
            return DecoderLayer(
                attention,
                mlp,
                hidden=c.hidden_size,
                eps=c.rms_norm_eps,
                monitor=execution.monitor,
            )

        self.embed = Embed(c.vocab_size, c.hidden_size, stddev=std, rngs=rngs, execution=execution)
        first = c.first_k_dense_replace if c.has_experts else 0
        self.first_layers = nnx.List(make_layer(rngs, dense=True) for _ in range(first))
        self.layers = stack_layers(
            lambda rngs: make_layer(rngs, dense=not c.has_experts),
            c.num_hidden_layers - first,
            rngs,
        )
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, stddev=std, rngs=rngs)
        self.config = config
        self.execution = execution

    def init_cache(self, batch: int, length: int) -> LatentCache:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        c, shape = self.config, (self.config.num_hidden_layers, batch, length)
        return LatentCache(
            jnp.zeros((*shape, c.kv_lora_rank), self.execution.dtype),
            jnp.zeros((*shape, c.qk_rope_head_dim), self.execution.dtype),
        )


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


def parameter_counts(config: MoonlightConfig) -> ParameterCounts:
    """Counts a model's parameters from its abstract shapes; allocates nothing."""
    return count_parameters(nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0))))
