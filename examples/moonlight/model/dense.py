"""Dense transformers with grouped-query attention, Llama's (arXiv 2302.13971) and Qwen2's.

    q, k, v = x Wq + bq, x Wk + bk, x Wv + bv     biases in Qwen2 only; fewer heads for k and v
    attention(rope(q), rope(k), v) Wo             head i reads key and value i // (heads / kv heads)
    down(silu(gate(x)) * up(x))                   the MLP

Each behind a norm and beside a residual stream, in layers that are one stack of parameters. Linear
layers, norms and attention's inner part are in `layers.py`, how layers become a model with a loss
and a cache is in `language_model.py`, and both are Moonlight's too. Shapes are suffixes, see
`moonlight.py`; here g is the heads of keys and values.
"""

import dataclasses
from typing import NamedTuple, Protocol

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
from examples.moonlight.model.config import check_fields
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.language_model import DecoderLayer, LanguageModel
from examples.moonlight.model.layers import MLP, Embed, Linear, RMSNorm, stack_layers
from examples.moonlight.model.packed import Packed, rope_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Architecture of a dense model; the fields are named as in Hugging Face's `config.json`.

    Attributes:
        vocab_size: Rows of the embedding and columns of the head.
        hidden_size: Width d of the residual stream.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads, each shared by as many query heads.
        intermediate_size: Inner width of the MLP.
        max_position_embeddings: Longest sequence accepted.
        head_dim: Width of a head, all of it rotated, so even; 0 becomes
            `hidden_size / num_attention_heads`.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Epsilon of every norm.
        tie_word_embeddings: Whether the head is the embedding's transpose.
        attention_bias: Whether queries, keys and values have a bias: Qwen2's do, Llama's don't.
        initializer_range: Standard deviation of every initial matrix; biases start at zero.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    head_dim: int = 0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        """Raises ValueError for a field, or a pair of fields, that no model can have."""
        check_fields(self, may_be_zero=("head_dim",))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size "
                    f"({self.hidden_size}), or head_dim be given."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, because rope rotates pairs; got {self.head_dim}."
            )


class KeyValueCache(NamedTuple):
    """What generation keeps of the tokens behind it: `2 g p` numbers per token and layer.

    Attributes:
        key_lbsgp: Keys, rotated, in the compute dtype.
        value_lbsgp: Values.
    """

    key_lbsgp: jax.Array
    value_lbsgp: jax.Array


class GroupedQueryAttention(nnx.Module):
    """Causal attention in which several query heads share a head of keys and values.

    See Ainslie et al. 2023 (arXiv 2305.13245).
    """

    def __init__(self, config: DenseConfig, *, rngs: nnx.Rngs, execution: Execution):
        c, std, use_bias = config, config.initializer_range, config.attention_bias
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_width, stddev=std, rngs=rngs, use_bias=use_bias)
        self.k_proj = Linear(c.hidden_size, kv_width, stddev=std, rngs=rngs, use_bias=use_bias)
        self.v_proj = Linear(c.hidden_size, kv_width, stddev=std, rngs=rngs, use_bias=use_bias)
        self.o_proj = Linear(q_width, c.hidden_size, stddev=std, rngs=rngs)
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
        time = act_nd.shape[0] // batch
        q_bthp, k_bsgp, v_bsgp = self._project(act_nd, rope_positions(packed, time), batch)
        out_bthp, stats = causal_attention(q_bthp, k_bsgp, v_bsgp, self.execution, packed)
        return self.o_proj(out_bthp.reshape(batch * time, -1)), stats

    def decode(
        self, act_nd: jax.Array, cache: KeyValueCache, layer: jax.Array, position_bt: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """The same for new tokens at `position_bt` behind what the cache holds.

        Returns:
            The output `[n, hidden]`, and the cache with the new tokens of this layer.
        """
        batch, time = position_bt.shape
        q_bthp, k_btgp, v_btgp = self._project(act_nd, position_bt, batch)
        cache = KeyValueCache(
            write_cache(cache.key_lbsgp, layer, k_btgp, position_bt),
            write_cache(cache.value_lbsgp, layer, v_btgp, position_bt),
        )
        out_bthp = cached_attention(
            q_bthp,
            cache.key_lbsgp[layer],
            cache.value_lbsgp[layer],
            position_bt,
            self.config.head_dim**-0.5,
        )
        return self.o_proj(out_bthp.reshape(batch * time, -1)), cache

    def _project(
        self, act_nd: jax.Array, position_bt: jax.Array, batch: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[b, t, h, p]` and keys `[b, t, g, p]`, both rotated, and values."""
        width = self.config.head_dim
        table = rope_table(position_bt, width, self.config.rope_theta)
        q_bthp, k_btgp, v_btgp = (
            project(act_nd).reshape(batch, -1, heads, width)
            for project, heads in (
                (self.q_proj, self.config.num_attention_heads),
                (self.k_proj, self.config.num_key_value_heads),
                (self.v_proj, self.config.num_key_value_heads),
            )
        )
        q_bthp, k_btgp = (apply_rope(x, table, interleaved=False) for x in (q_bthp, k_btgp))
        return q_bthp, k_btgp, v_btgp


class FeedForward(Protocol):
    """A module between activations `[n, hidden]`, built and called as `MLP` is."""

    def __init__(self, hidden: int, inner: int, *, stddev: float, rngs: nnx.Rngs): ...

    def __call__(self, act_nd: jax.Array) -> jax.Array:
        """Maps `[n, hidden]` to `[n, hidden]`."""
        ...


class Dense(LanguageModel):
    """The language model: tokens to next-token logits.

    Args:
        config: The architecture.
        rngs: Source of the initial weights, stream `params`.
        execution: How to run it; by default in float32 on one device. On a mesh the batch must
            divide by `BATCH_AXES`. `experts` chooses among routes that a dense model has not.

    Raises:
        ValueError: A mesh axis does not divide what it shards, or there is a capacity for experts.
    """

    mlp_type: type[FeedForward] = MLP
    """What follows attention; a subclass may bring another."""

    def __init__(self, config: DenseConfig, *, rngs: nnx.Rngs, execution: Execution | None = None):
        c, std = config, config.initializer_range
        execution = execution or Execution()
        execution.sharding.check_divides(
            ("tensor", "num_key_value_heads", c.num_key_value_heads),
            ("tensor", "intermediate_size", c.intermediate_size),
            ("fsdp", "hidden_size", c.hidden_size),
        )
        if execution.expert_capacity is not None:
            raise ValueError(
                f"expert_capacity is {execution.expert_capacity}, and a dense model has no experts "
                "to limit: leave it out."
            )

        def make_layer(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(
                GroupedQueryAttention(c, rngs=rngs, execution=execution),
                self.mlp_type(c.hidden_size, c.intermediate_size, stddev=std, rngs=rngs),
                hidden=c.hidden_size,
                eps=c.rms_norm_eps,
                monitor=execution.monitor,
            )

        self.embed = Embed(c.vocab_size, c.hidden_size, stddev=std, rngs=rngs, execution=execution)
        self.first_layers = nnx.List([])
        self.layers = stack_layers(make_layer, c.num_hidden_layers, rngs)
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = nnx.data(
            None
            if c.tie_word_embeddings
            else Linear(c.hidden_size, c.vocab_size, stddev=std, rngs=rngs)
        )
        self.config = config
        self.execution = execution

    def init_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        c = self.config
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        dtype = self.execution.dtype
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
