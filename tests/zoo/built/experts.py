"""Mixtures of experts."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.built.blocks import (
    Built,
    along_last,
    attend,
    attention,
    cross_entropy,
    linear,
    norm,
    rotate,
    split,
)
from tests.zoo.built.decoders import scanned, through, with_heads


def gates(logits, many):
    """The weights of the best experts, those of all others being zero."""
    best, at = lax.top_k(jax.nn.softmax(logits), many)
    weights = best / best.sum(-1, keepdims=True)
    return (jax.nn.one_hot(at, logits.shape[-1]) * weights[..., None]).sum(-2)


def dense_experts(part, x, weights):
    """All experts on all tokens, and then the weighted sum."""
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, part["wi_0"]))
    h = h * jnp.einsum("btd,edf->btef", x, part["wi_1"])
    return jnp.einsum("bted,bte->btd", jnp.einsum("btef,efd->bted", h, part["wo"]), weights)


def dispatched_experts(part, x, weights, capacity=4):
    """Each expert on the tokens that were sent to it, up to a capacity."""
    chosen = weights > 0
    place = jax.nn.one_hot(jnp.cumsum(chosen, axis=1) * chosen - 1, capacity)
    h = jnp.einsum("btd,btec->ebcd", x, place)
    a, b = (jnp.einsum("ebcd,edf->ebcf", h, part[name]) for name in ("wi_0", "wi_1"))
    y = jnp.einsum("ebcf,efd->ebcd", jax.nn.silu(a) * b, part["wo"])
    return jnp.einsum("ebcd,btec->btd", y, place * weights[..., None])


def sorted_experts(x, weights, many, run):
    """Tokens sorted by their expert, for products of ragged groups: `run(rows, sizes, owner)`."""
    flat = x.reshape(-1, x.shape[-1])
    best, at = lax.top_k(weights.reshape(-1, weights.shape[-1]), many)
    order = jnp.argsort(at.reshape(-1))
    owner = at.reshape(-1)[order]
    sizes = jnp.bincount(owner, length=weights.shape[-1])
    y = run(flat[order // many], sizes, owner) * best.reshape(-1)[order][:, None]
    return jnp.zeros_like(flat).at[order // many].add(y).reshape(x.shape)


def moe_ffn(p, ids):
    def block(part, x):
        x = x + with_heads(part / "attn", norm_of(x))
        f, y = part / "ffn", norm_of(x)
        return x + dense_experts(f, y, gates(linear(f / "router", y), 2))

    def norm_of(x):
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    x = through((p / "layers").many(), block, p["embed/embedding"][ids])
    return cross_entropy(linear(p / "lm_head", x), ids)


def maxtext_mixtral_scanned(p, ids):
    def block(part, x):
        y = norm(part / "pre_self_attention_layer_norm", x)
        x = x + with_heads(part / "self_attention", y)
        m, y = part / "MoeBlock_0", norm(part / "post_self_attention_layer_norm", x)
        return x + dispatched_experts(m, y, gates(linear(m / "gate", y), 2))

    d = p / "decoder"
    x = scanned(block, (d / "layers").below(axis=1), p["token_embedder/embedding"][ids])
    return cross_entropy(linear(d / "logits_dense", norm(d / "decoder_norm", x)), ids)


def _latent_attention(part, x, heads=128, plain=128, rotary=64):
    """Queries, keys and values from vectors of low rank; a part of the keys is one for all."""
    q = jnp.einsum(
        "btr,rhk->bthk", norm(part / "q_norm", linear(part / "wq_a", x)), part["wq_b/kernel"]
    )
    low, shared = jnp.split(linear(part / "wkv_a", x), [512], axis=-1)
    kv = jnp.einsum("btr,rhk->bthk", norm(part / "kv_norm", low), part["wkv_b/kernel"])
    k, v = jnp.split(kv, [plain], axis=-1)
    q = jnp.concatenate([q[..., :plain], rotate(q[..., plain:])], axis=-1)
    shared = jnp.broadcast_to(rotate(shared[:, :, None]), (*k.shape[:3], rotary))
    y = attend(q, jnp.concatenate([k, shared], axis=-1), v, causal=True)
    return jnp.einsum("bthk,hkd->btd", split(y, heads), part["out/kernel"])


def maxtext_deepseek(p, ids):
    def feed_forward(part, x):
        h = jax.nn.silu(linear(part / "wi_0", x)) * linear(part / "wi_1", x)
        return linear(part / "wo", h)

    def block(part, x):
        y = norm(part / "pre_self_attention_layer_norm", x)
        x = x + _latent_attention(part / "self_attention", y)
        y = norm(part / "post_self_attention_layer_norm", x)
        if "mlp/wo/kernel" in part:
            return x + feed_forward(part / "mlp", y)
        moe = part / "DeepSeekMoeBlock_0"
        routed, gate = moe / "MoeBlock_0", moe / "MoeBlock_0/gate"
        # The bias chooses, and takes no part in the weights.
        scores = jax.nn.sigmoid(y @ gate["kernel"])
        _, at = lax.top_k(along_last(scores, gate["bias"]), 8)
        chosen = jax.nn.one_hot(at, 256).sum(-2)
        weights = scores * chosen / (scores * chosen).sum(-1, keepdims=True)

        def run(rows, sizes, owner):
            h = jax.nn.silu(lax.ragged_dot(rows, routed["wi_0"], sizes))
            h = h * lax.ragged_dot(rows, routed["wi_1"], sizes)
            return lax.ragged_dot(h, routed["wo"], sizes)

        return x + sorted_experts(y, weights, 8, run) + feed_forward(moe / "shared_experts", y)

    d = p / "decoder"
    layers = d.many("dense_layers_{}") + d.many("moe_layers_{}")
    x = through(layers, block, p["token_embedder/embedding"][ids])
    return cross_entropy(linear(d / "logits_dense", norm(d / "decoder_norm", x)), ids)


def bonsai_gpt_oss(p, ids, heads=64, kv_heads=8):
    """Attention with a sink for each head, and experts whose gates and inputs alternate."""

    def attention_with_sinks(part, x):
        q = rotate(split(linear(part / "q_proj", x), heads))
        k = rotate(split(linear(part / "k_proj", x), kv_heads))
        v = split(linear(part / "v_proj", x), kv_heads)
        k, v = (jnp.repeat(z, heads // kv_heads, axis=2) for z in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        sinks = jnp.broadcast_to(part["sinks"][None, :, None, None], (*scores.shape[:3], 1))
        scores = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1))[..., :-1]
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        return linear(part / "o_proj", y.reshape(*x.shape[:2], -1))

    def block(part, x):
        x = x + attention_with_sinks(part / "self_attn", norm(part / "input_layernorm", x))
        y, e = norm(part / "post_attention_layernorm", x), part / "mlp/experts"
        weights = gates(linear(part / "mlp/router/linear", y), 4)

        def run(rows, sizes, owner):
            h = lax.ragged_dot(rows, e["gate_up_proj"], sizes) + e["gate_up_proj_bias"][owner]
            h = jax.nn.silu(h[:, ::2]) * (h[:, 1::2] + 1)
            return lax.ragged_dot(h, e["down_proj"], sizes) + e["down_proj_bias"][owner]

        return x + sorted_experts(y, weights, 4, run)

    m = p / "model"
    x = through((m / "layers").many(), block, m["embed_tokens/embedding"][ids])
    return cross_entropy(linear(p / "lm_head", norm(m / "norm", x)), ids)


def _list_of_experts(moe, names, many, heads, kv_heads):
    """PyTorch's: each expert a module of its own."""
    gate, down, up = names.split()

    def block(part, x):
        y, names = norm(part / "input_layernorm", x), "q_proj k_proj v_proj o_proj"
        a = part / "self_attn"
        if "q_norm/weight" in a:
            q = norm(a / "q_norm", linear(a / "q_proj", y))
            k = norm(a / "k_norm", linear(a / "k_proj", y))
            q, k, v = (split(z, heads) for z in (q, k, linear(a / "v_proj", y)))
            x = x + linear(a / "o_proj", attend(rotate(q), rotate(k), v, causal=True))
        else:
            options = {"kv_heads": kv_heads, "turn": rotate, "causal": True}
            x = x + attention(a, y, names, heads, **options)
        y, m = norm(part / "post_attention_layernorm", x), part / moe
        weights = gates(linear(m / "gate", y), many)
        for number, e in enumerate((m / "experts").many()):
            h = jax.nn.silu(linear(e / gate, y)) * linear(e / up, y)
            x = x + linear(e / down, h) * weights[..., number, None]
        return x

    def loss(p, ids):
        m = p / "model"
        x = through((m / "layers").many(), block, m["embed_tokens/weight"][ids])
        return cross_entropy(linear(p / "lm_head", norm(m / "norm", x)), ids)

    return loss


BUILT = {
    "moe_ffn": Built(moe_ffn),
    "maxtext_mixtral_scanned": Built(maxtext_mixtral_scanned),
    "maxtext_deepseek": Built(maxtext_deepseek),
    "bonsai_gpt_oss": Built(bonsai_gpt_oss),
    "mixtral_torch": Built(_list_of_experts("block_sparse_moe", "w1 w2 w3", 2, 32, 8)),
    "olmoe": Built(_list_of_experts("mlp", "gate_proj down_proj up_proj", 8, 16, 16)),
}
