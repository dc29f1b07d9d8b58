"""What every language model here is: an embedding, residual layers, a norm and a head.

A family (`moonlight.py`, `dense.py`) builds the parts and brings an attention with its cache. Here
the parts are run: forward, with a cache, and to a loss, with what training watches measured on
the way. Shapes are suffixes, see `moonlight.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.moonlight.model.attention import (
    AttentionStats,
)
from examples.moonlight.model.execution.loss import head_loss, weighted_head_loss
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import MoE, RouterBias
from examples.moonlight.model.layers import (
    Embed,
    Linear,
    RMSNorm,
    check_drops_nothing,
    mean_square,
    run_layer,
    scan_layers,
)
from examples.moonlight.model.packed import Packed, check_packed

# A NamedTuple of arrays whose leading axes are layers and batch; each attention has its own.
Cache = Any


# --------------------------------------------------------------------------------------------------
# A layer
# --------------------------------------------------------------------------------------------------


class LayerStats(NamedTuple):
    """What one layer measured; see `ModelStats`."""

    load_e: jax.Array | None
    dropped: jax.Array | None
    attention: AttentionStats
    attention_square: jax.Array | None
    mlp_square: jax.Array | None


class DecoderLayer(nnx.Module):
    """Pre-norm residual attention, then a pre-norm residual MLP, dense or of experts.

    Args:
        attention: Maps `(act_nd, batch, packed)` to its output and `AttentionStats`, and has a
            `decode`.
        mlp: What follows it.
        hidden: Width of the residual stream.
        eps: The epsilon of the norms.
        monitor: Whether to measure the outputs' mean squares.
    """

    def __init__(
        self,
        attention: Any,
        mlp: MoE | Callable[[jax.Array], jax.Array],
        *,
        hidden: int,
        eps: float,
        monitor: bool,
    ):
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        self.mlp = mlp
        self.monitor = monitor

    def __call__(
        self, act_nd: jax.Array, batch: int, packed: Packed | None = None
    ) -> tuple[jax.Array, LayerStats]:
        """Returns activations `[n, hidden]`, and what was measured."""
        attention_nd, attention = self.self_attn(self.input_layernorm(act_nd), batch, packed)
        act_nd = act_nd + attention_nd
        mlp_nd, load_e, dropped = self._mlp(act_nd)
        squares = (mean_square(x) if self.monitor else None for x in (attention_nd, mlp_nd))
        return act_nd + mlp_nd, LayerStats(load_e, dropped, attention, *squares)

    def decode(
        self, act_nd: jax.Array, cache: Cache, layer: jax.Array, position_bt: jax.Array
    ) -> tuple[jax.Array, Cache]:
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
# What a forward pass measures
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
        mlp_rms_l: RMS of what the MLP, or the experts, add, float32 `[layers]`; monitored.
        hits: Sum of the weights of the targets that have the largest logit, a float32 scalar; of
            `weighted_loss`.
    """

    load_le: jax.Array | None
    dropped_l: jax.Array | None
    max_logit_lh: jax.Array
    hot_share_lh: jax.Array | None
    attention_rms_l: jax.Array | None
    mlp_rms_l: jax.Array | None
    hits: jax.Array | None = None


def merge_stats(stats: ModelStats, count: int | jax.Array) -> ModelStats:
    """The statistics of one step from those of its micro-batches.

    Args:
        stats: Stacked along a leading axis.
        count: How many there are; entries after them are 0.
    """

    def mean(x_a: jax.Array | None) -> jax.Array | None:
        return None if x_a is None else x_a.sum(axis=0) / count

    def rms(x_al: jax.Array | None) -> jax.Array | None:
        return None if x_al is None else jnp.sqrt(jnp.square(x_al).sum(axis=0) / count)

    def total(x_a: jax.Array | None) -> jax.Array | None:
        return None if x_a is None else x_a.sum(axis=0)

    there_a = jnp.arange(len(stats.max_logit_lh)) < count
    logit_alh = jnp.where(there_a[:, None, None], stats.max_logit_lh, -jnp.inf)
    return ModelStats(
        load_le=total(stats.load_le),
        dropped_l=total(stats.dropped_l),
        max_logit_lh=logit_alh.max(axis=0),
        hot_share_lh=mean(stats.hot_share_lh),
        attention_rms_l=rms(stats.attention_rms_l),
        mlp_rms_l=rms(stats.mlp_rms_l),
        hits=total(stats.hits),
    )


def _collect(firsts: list[LayerStats], rest: LayerStats) -> ModelStats:
    """Puts the statistics of the first layers before those of the stack."""

    def joined(pick: Any) -> Any:
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


# --------------------------------------------------------------------------------------------------
# The model and its loss
# --------------------------------------------------------------------------------------------------


class LanguageModel(nnx.Module):
    """Tokens to next-token logits. A family's `__init__` sets the attributes, and `init_cache`.

    Attributes:
        config: The architecture; `vocab_size` and `max_position_embeddings` are read here.
        execution: How to run it.
        embed: The embedding.
        first_layers: Layers that differ from those of the stack, in front of it; may be empty.
        layers: All others, stacked.
        norm: The last norm.
        lm_head: The head; None if it is the embedding's transpose ("tied").
    """

    config: Any
    execution: Execution
    embed: Embed
    first_layers: nnx.List
    layers: Any
    norm: RMSNorm
    lm_head: Linear | None

    def __call__(
        self, tokens_bt: jax.Array, packed: Packed | None = None
    ) -> tuple[jax.Array, ModelStats]:
        """Logits for the token after each position.

        Args:
            tokens_bt: Token ids, an integer array `[batch, time]`.
            packed: The samples of each row; None takes a row for one sample.

        Returns:
            Logits, float32 `[batch, time, vocab]`, and the statistics of this forward pass.

        Raises:
            ValueError: The tokens are not an integer matrix, longer than `max_position_embeddings`,
                or sharded over Explicit mesh axes; or `packed` has another shape than they.
        """
        act_nd, stats = self.hidden(tokens_bt, packed)
        return self.logits(act_nd).reshape(*tokens_bt.shape, -1), stats

    def hidden(
        self, tokens_bt: jax.Array, packed: Packed | None = None
    ) -> tuple[jax.Array, ModelStats]:
        """What the head reads: activations behind the last norm, `[batch * time, hidden]`.

        Args, statistics and errors are those of `__call__`.
        """
        check_tokens(tokens_bt, self.config.max_position_embeddings)
        if packed is not None:
            check_packed(packed, tokens_bt)
        batch = tokens_bt.shape[0]

        def run(layer: Any, act_nd: jax.Array, _: None) -> tuple[jax.Array, LayerStats]:
            return layer(act_nd, batch, packed)

        act_nd = self.embed(tokens_bt.reshape(-1))
        firsts = []
        for layer in self.first_layers:
            act_nd, measured = run_layer(layer, run, act_nd, None, self.execution)
            firsts.append(measured)
        act_nd, rest = scan_layers(self.layers, run, act_nd, None, self.execution)
        return self.norm(act_nd), _collect(firsts, rest)

    def logits(self, act_nd: jax.Array) -> jax.Array:
        """The head: `[n, hidden]` to float32 `[n, vocab]`, accumulated and left in float32."""
        kernel_dv = self._head().astype(act_nd.dtype)
        return jnp.dot(act_nd, kernel_dv, preferred_element_type=jnp.float32)

    def loss(self, act_nd: jax.Array, target_n: jax.Array) -> jax.Array:
        """Mean cross-entropy of predicting `target_n` from `[n, hidden]`, without all logits."""
        return head_loss(act_nd, self._head(), target_n, self.execution)

    def weighted_loss(
        self,
        tokens_bt: jax.Array,
        targets_bt: jax.Array,
        weight_bt: jax.Array,
        packed: Packed | None = None,
    ) -> tuple[jax.Array, jax.Array, ModelStats]:
        """Sums, so that micro-batches add up to the mean over the tokens of all of them.

        Args:
            tokens_bt: What the model reads, an integer array `[batch, time]`.
            targets_bt: What it should predict at each position, of the same shape.
            weight_bt: How much each target counts, float32 of the same shape: 0 for padding, and
                for what the user said. No gradient reaches the weights.
            packed: The samples of each row; None takes a row for one sample.

        Returns:
            The weighted sum of the cross-entropies in nats, the sum of the weights, both float32
            scalars, and the statistics of the forward pass, `hits` among them. Loads of experts
            count every position, padding included.

        Raises:
            ValueError: As `__call__`, or targets or weights have another shape than the tokens.
        """
        for name, value_bt in (("targets_bt", targets_bt), ("weight_bt", weight_bt)):
            if value_bt.shape != tokens_bt.shape:
                raise ValueError(
                    f"{name} must have the tokens' shape {list(tokens_bt.shape)}, got "
                    f"{list(value_bt.shape)}."
                )
        act_nd, stats = self.hidden(tokens_bt, packed)
        weight_n = weight_bt.astype(jnp.float32).reshape(-1)
        total, hits = weighted_head_loss(
            act_nd, self._head(), targets_bt.reshape(-1), weight_n, self.execution
        )
        return total, weight_n.sum(), stats._replace(hits=hits)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of at most `length` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no init_cache")

    def decode(
        self, tokens_bt: jax.Array, cache: Cache, start_b: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Runs new tokens behind those in the cache: prefill with many, decoding with one.

        Args:
            tokens_bt: New ids `[batch, new]`; what fills up a shorter row is written behind its
                end, where the row's own next tokens replace it before anything reads it.
            cache: What `init_cache` or the last call returned.
            start_b: The position of each row's first new token.

        Returns:
            Activations behind the last norm, `[batch * new, hidden]`, and the cache.

        Raises:
            ValueError: The model has adapters that drop inputs.
        """
        check_drops_nothing(self)
        position_bt = start_b[:, None] + jnp.arange(tokens_bt.shape[1])[None]
        first = len(self.first_layers)

        def run(layer: Any, carry: tuple[jax.Array, Cache], index: jax.Array):
            act_nd, cache = carry
            return layer.decode(act_nd, cache, index, position_bt), None

        carry = (self.embed(tokens_bt.reshape(-1)), cache)
        for index, layer in enumerate(self.first_layers):
            carry, _ = run_layer(layer, run, carry, jnp.int32(index), self.execution)
        index_l = jnp.arange(first, self.config.num_hidden_layers, dtype=jnp.int32)
        (act_nd, cache), _ = scan_layers(self.layers, run, carry, index_l, self.execution)
        return self.norm(act_nd), cache

    def _head(self) -> jax.Array:
        """The head `[d, v]`, float32."""
        if self.lm_head is None:
            return self.embed.embedding[...].T
        return self.lm_head.kernel[...]


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


def next_token_loss(model: LanguageModel, tokens_bt: jax.Array) -> tuple[jax.Array, ModelStats]:
    """Mean cross-entropy of predicting each token from those before it.

    Args:
        model: A `LanguageModel`.
        tokens_bt: Integer array `[batch, time + 1]`: one column more than the model reads.

    Returns:
        The loss in nats per predicted token, a float32 scalar, and the forward pass's statistics.
    """
    act_nd, stats = model.hidden(tokens_bt[:, :-1])
    return model.loss(act_nd, tokens_bt[:, 1:].reshape(-1)), stats


# --------------------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------------------


class ParameterCounts(NamedTuple):
    """Sizes of a model, in parameters.

    Attributes:
        total: Every trained parameter.
        body: Parameters without the embedding and the head.
        active: Parameters of the body that one token passes through.
        router_bias: Balance biases, which are not trained and not in the other counts.
    """

    total: int
    body: int
    active: int
    router_bias: int


def count_parameters(model: LanguageModel) -> ParameterCounts:
    """Counts a model's parameters; the model may be abstract, from `nnx.eval_shape`."""
    total = body = unused = router_bias = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        size = variable.size
        if isinstance(variable, RouterBias):
            router_bias += size
        if not isinstance(variable, nnx.Param):
            continue
        total += size
        if path[0] not in ("embed", "lm_head"):
            body += size
        if "experts" in path:
            experts, chosen = model.config.n_routed_experts, model.config.num_experts_per_tok
            unused += size // experts * (experts - chosen)
    return ParameterCounts(total, body, body - unused, router_bias)
