"""Text from a model: the plainest sampler there is.

Every token costs a forward pass over the whole window, which needs no cache and compiles once. It
serves the end of a training run; long texts want the generator with a latent cache.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer


def sample_text(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    window: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continues a prompt until a window of tokens is full.

    Args:
        graphdef: Static half of a model with `model(tokens_bt) -> (logits_btv, stats)`.
        state: The other half, everything in it.
        tokenizer: Turns text into the model's tokens and back.
        prompt: Text to continue; at least one token and fewer than `window`.
        window: Tokens in all, prompt included; one compilation per window size.
        temperature: Divides the logits, > 0; below 1 the likely becomes likelier.
        seed: Seed of the draws.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: The temperature is not positive, or `encode_prompt` refuses the prompt.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    ids = encode_prompt(tokenizer, prompt, window)
    # What lies behind the position being drawn does not matter: attention is causal.
    tokens = jnp.zeros(window, jnp.int32).at[: len(ids)].set(jnp.array(ids, jnp.int32))
    tokens = _fill(graphdef, state, tokens, len(ids), temperature, jax.random.key(seed))
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def encode_prompt(tokenizer: Tokenizer, prompt: str, window: int) -> list[int]:
    """The prompt's tokens, if a window has room for them and at least one more.

    Raises:
        ValueError: The prompt is empty or fills the window.
    """
    ids = tokenizer.encode(prompt).ids
    if not 0 < len(ids) < window:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; it needs at least 1 and fewer than the window's "
            f"{window}"
        )
    return ids


@functools.partial(jax.jit, static_argnums=0)
def _fill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens_t: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Draws tokens `start`, `start + 1`, ... of the window, each from all before it."""
    model = nnx.merge(graphdef, state)

    def draw(position: jax.Array, tokens_t: jax.Array) -> jax.Array:
        logits_btv, _ = model(tokens_t[None])
        logits_v = logits_btv[0, position - 1] / temperature
        token = jax.random.categorical(jax.random.fold_in(key, position), logits_v)
        return tokens_t.at[position].set(token)

    return jax.lax.fori_loop(start, tokens_t.shape[0], draw, tokens_t)
