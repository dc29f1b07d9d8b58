"""A small causal transformer on plain dicts, its layers one stack under a loop."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Params = dict[str, Any]

CHARACTERS = 128  # ASCII
HEADS = 4


def init(key: jax.Array, width: int, length: int, layers: int) -> Params:
    """Float32 parameters; a kernel `[layers, in, out]` has a standard deviation of 1/sqrt(in)."""
    keys = iter(jax.random.split(key, 9))

    def normal(*shape: int, std: float) -> Float[Array, "..."]:
        return std * jax.random.normal(next(keys), shape)

    def kernel(rows: int, columns: int) -> Params:
        return {"kernel": normal(layers, rows, columns, std=rows**-0.5)}

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {
        "embed": normal(CHARACTERS, width, std=0.5),
        "positions": {"embedding": normal(length, width, std=0.5)},
        "layers": {
            "attention": {name: kernel(width, width) for name in names},
            "mlp": {"up": kernel(width, 4 * width), "down": kernel(4 * width, width)},
            "norm_1": {"scale": jnp.ones((layers, width))},
            "norm_2": {"scale": jnp.ones((layers, width))},
        },
        "norm": {"scale": jnp.ones(width)},
        "head": {"kernel": normal(width, CHARACTERS, std=width**-0.5)},
    }


def loss_of(
    params: Params, text: Int[Array, "batch length+1"]
) -> tuple[Float[Array, ""], Float[Array, "layers heads"]]:
    """The mean cross-entropy in nats, and the largest attention logit of each head."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    before, after = text[:, :-1], text[:, 1:]
    length = before.shape[1]
    x = params["embed"][before] + params["positions"]["embedding"][None, :length]

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, jax.Array]:
        y = _normed(x, p["norm_1"]["scale"])
        q, k, v = (
            (y @ p["attention"][name]["kernel"]).reshape(*y.shape[:2], HEADS, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(y.shape)
        x = x + mixed @ p["attention"]["o_proj"]["kernel"]
        y = _normed(x, p["norm_2"]["scale"])
        x = x + jax.nn.gelu(y @ p["mlp"]["up"]["kernel"]) @ p["mlp"]["down"]["kernel"]
        return x, jnp.max(jnp.where(causal, logits, -jnp.inf), axis=(0, 2, 3))

    x, max_logits = jax.lax.scan(layer, x, params["layers"])
    logits = _normed(x, params["norm"]["scale"]) @ params["head"]["kernel"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, after).mean()
    return loss, max_logits


def _normed(x: Float[Array, "batch length width"], scale: Float[Array, "width"]) -> jax.Array:
    rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x / rms * scale[None, None]
