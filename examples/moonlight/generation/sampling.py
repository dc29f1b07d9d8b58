"""The next token from its logits: greedy, or drawn at a temperature from the likeliest.

The filters come in transformers' order, temperature, top-k, top-p, and keep what its filters keep.
A draw is a function of the seed, the row and the token's position: what else is in the batch, how
it is padded and where a text is taken up again do not change it.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; constants of a compiled program.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token, and ignores the rest.
        top_k: Draw from that many of the likeliest tokens; None is all.
        top_p: The probability, together, of the fewest likeliest of those; only they are drawn.
        seed: Seed of the draws.

    Raises:
        ValueError: A value is out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """Checks the ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature must be 0 (greedy) or a positive number, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"--top-k must be at least 1, got {self.top_k}; leave it out to keep every token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"--top-p must be above 0 and at most 1, which keeps every token; got {self.top_p}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be between 0 and 2^32 - 1, got {self.seed}")


def likeliest(logits_bv: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """The tokens that may be drawn.

    Args:
        logits_bv: Float32 `[batch, vocab]`.
        sampling: Temperature (not 0), top-k and top-p.

    Returns:
        Logits after temperature, `[batch, k]`, descending, minus infinity where top-p leaves the
        token out; and the tokens' ids.
    """
    vocab = logits_bv.shape[-1]
    k = min(sampling.top_k or vocab, vocab)
    if k == vocab and sampling.top_p == 1:  # nothing to sort for
        ids_bk = jnp.broadcast_to(jnp.arange(vocab), logits_bv.shape)
        return logits_bv / sampling.temperature, ids_bk
    logits_bk, ids_bk = jax.lax.top_k(logits_bv / sampling.temperature, k)
    if sampling.top_p < 1:
        probability_bk = jax.nn.softmax(logits_bk, axis=-1)
        likelier_bk = jnp.cumsum(probability_bk, axis=-1) - probability_bk
        logits_bk = jnp.where(likelier_bk < sampling.top_p, logits_bk, -jnp.inf)
    return logits_bk, ids_bk


def draw(
    logits_bv: jax.Array,
    sampling: Sampling,
    row_b: jax.Array,
    position_b: jax.Array,
) -> jax.Array:
    """Draws one token per row.

    Args:
        logits_bv: Float32 `[batch, vocab]`.
        sampling: Temperature, top-k, top-p and the seed.
        row_b: The number of each row's text, int32 `[batch]`.
        position_b: The positions that the drawn tokens will have, int32 `[batch]`.

    Returns:
        Token ids, int32 `[batch]`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    logits_bk, ids_bk = likeliest(logits_bv, sampling)

    def one(logits_k: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)
        return jax.random.categorical(key, logits_k)

    index_b = jax.vmap(one)(logits_bk, row_b, position_b)
    return jnp.take_along_axis(ids_bk, index_b[:, None], axis=-1)[:, 0].astype(jnp.int32)
