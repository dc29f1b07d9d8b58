"""Language models that are decoders alone."""

import jax
import jax.numpy as jnp

from tests.zoo.built.blocks import (
    Built,
    Part,
    attend,
    attention,
    cross_entropy,
    linear,
    norm,
    rotate,
    split,
)


def through(layers, block, x):
    for layer in layers:
        x = block(layer, x)
    return x


def tied(x, embedding, ids):
    return cross_entropy(x @ embedding.T, ids)


def positions(table, ids, start=0):
    """Rows of learned positions, taken by index as embeddings are."""
    return table[jnp.broadcast_to(jnp.arange(ids.shape[1])[None] + start, ids.shape)]


# --- GPT and its kin ------------------------------------------------------------------------------


def gpt2(p, ids, heads=12):
    def transposed(part, x):
        return x @ part["kernel"].T + part["bias"][None, None]

    def block(part, x):
        q, k, v = jnp.split(transposed(part / "attn/c_attn", norm(part / "ln_1", x)), 3, axis=-1)
        y = attend(split(q, heads), split(k, heads), split(v, heads), causal=True)
        x = x + transposed(part / "attn/c_proj", y)
        h = jax.nn.gelu(transposed(part / "mlp/c_fc", norm(part / "ln_2", x)))
        return x + transposed(part / "mlp/c_proj", h)

    p = p / "transformer"
    x = p["wte/embedding"][ids] + positions(p["wpe/embedding"], ids)
    x = norm(p / "ln_f", through((p / "h").many(), block, x))
    return tied(x, p["wte/embedding"], ids)


def gptneo(p, ids, heads=16):
    def block(part, x):
        y = norm(part / "ln_1", x)
        names = "q_proj k_proj v_proj out_proj"
        x = x + attention(part / "attn/attention", y, names, heads, causal=True)
        return x + linear(
            part / "mlp/c_proj", jax.nn.gelu(linear(part / "mlp/c_fc", norm(part / "ln_2", x)))
        )

    p = p / "transformer"
    x = p["wte/embedding"][ids] + positions(p["wpe/embedding"], ids)
    return tied(norm(p / "ln_f", through((p / "h").many(), block, x)), p["wte/embedding"], ids)


def gptj(p, ids, heads=16):
    def block(part, x):
        y = norm(part / "ln_1", x)
        names = "q_proj k_proj v_proj out_proj"
        a = attention(part / "attn", y, names, heads, turn=rotate, causal=True)
        return x + a + linear(part / "mlp/fc_out", jax.nn.gelu(linear(part / "mlp/fc_in", y)))

    m = p / "transformer"
    x = through((m / "h").many(), block, m["wte/embedding"][ids])
    return cross_entropy(linear(p / "lm_head", norm(m / "ln_f", x)), ids)


def opt(p, ids, heads=12):
    """OPT: pre-norm, with learned positions."""
    p = p / "model/decoder"
    x = p["embed_tokens/embedding"][ids] + positions(p["embed_positions/embedding"], ids, 2)
    x = norm(p / "final_layer_norm", through((p / "layers").many(), _fairseq(heads), x))
    return tied(x, p["embed_tokens/embedding"], ids)


def xglm(p, ids, heads=16):
    """XGLM: OPT's blocks with fixed sinusoids."""
    p = p / "model"
    x = p["embed_tokens/embedding"][ids]
    x = x + jnp.sin(jnp.arange(8)[:, None] * jnp.arange(x.shape[-1])[None])[None]
    x = norm(p / "layer_norm", through((p / "layers").many(), _fairseq(heads), x))
    return tied(x, p["embed_tokens/embedding"], ids)


def _fairseq(heads):
    def block(part, x):
        y, names = norm(part / "self_attn_layer_norm", x), "q_proj k_proj v_proj out_proj"
        x = x + attention(part / "self_attn", y, names, heads, causal=True)
        y = norm(part / "final_layer_norm", x)
        return x + linear(part / "fc2", jax.nn.relu(linear(part / "fc1", y)))

    return block


def bloom(p, ids, heads=16):
    def block(part, x):
        y = norm(part / "input_layernorm", x)
        qkv = split(linear(part / "self_attention/query_key_value", y), heads)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        alibi = jnp.arange(heads)[:, None, None] * jnp.arange(8)[None, None] * 0.1
        x = x + linear(part / "self_attention/dense", attend(q, k, v, alibi[None], causal=True))
        y = norm(part / "post_attention_layernorm", x)
        h = jax.nn.gelu(linear(part / "mlp/dense_h_to_4h", y))
        return x + linear(part / "mlp/dense_4h_to_h", h)

    p = p / "transformer"
    x = norm(p / "word_embeddings_layernorm", p["word_embeddings/embedding"][ids])
    x = norm(p / "ln_f", through((p / "h").many(), block, x))
    return tied(x, p["word_embeddings/embedding"], ids)


# --- Llama and its kin ----------------------------------------------------------------------------


def _gated(part, x, names="gate_proj up_proj down_proj", act=jax.nn.silu):
    gate, up, down = (part / name for name in names.split())
    return linear(down, act(linear(gate, x)) * linear(up, x))


def _llama(heads, kv_heads=None, act=jax.nn.silu):
    """Hugging Face's names: Llama, Mistral, and Gemma, whose head is tied."""

    def block(part, x):
        y, names = norm(part / "input_layernorm", x), "q_proj k_proj v_proj o_proj"
        x = x + attention(
            part / "self_attn", y, names, heads, kv_heads=kv_heads, turn=rotate, causal=True
        )
        return x + _gated(part / "mlp", norm(part / "post_attention_layernorm", x), act=act)

    def loss(p, ids):
        m = p / "model"
        x = through((m / "layers").many(), block, m["embed_tokens/embedding"][ids])
        x = norm(m / "norm", x)
        if "lm_head/kernel" in p:
            return cross_entropy(linear(p / "lm_head", x), ids)
        return tied(x, m["embed_tokens/embedding"], ids)

    return loss


def easylm_llama(p, ids, heads=32):
    def block(part, x):
        y = norm(part / "attention_norm", x)
        x = x + attention(part / "attention", y, "wq wk wv wo", heads, turn=rotate, causal=True)
        return x + _gated(part / "feed_forward", norm(part / "ffn_norm", x), "w1 w3 w2")

    m = p / "transformer"
    x = through((m / "h").many(), block, m["wte/embedding"][ids])
    return cross_entropy(linear(p / "lm_head", norm(m / "ln_f", x)), ids)


def with_heads(part, x, turn=rotate):
    """Attention whose kernels have an axis of heads, as in Flax."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, part[f"{n}/kernel"]) for n in QKV)
    y = split(attend(turn(q), turn(k), v, causal=True), part["out/kernel"].shape[0])
    return jnp.einsum("bthk,hkd->btd", y, part["out/kernel"])


QKV = ("query", "key", "value")


def maxtext_block(part, x):
    x = x + with_heads(part / "self_attention", norm(part / "pre_self_attention_layer_norm", x))
    return x + _gated(
        part / "mlp", norm(part / "post_self_attention_layer_norm", x), "wi_0 wi_1 wo"
    )


def maxtext_llama2(p, ids):
    d = p / "decoder"
    x = through(d.many("layers_{}"), maxtext_block, p["token_embedder/embedding"][ids])
    return cross_entropy(linear(d / "logits_dense", norm(d / "decoder_norm", x)), ids)


def scanned(block, stacked, x):
    """The layers of a stack one after the other."""
    return jax.lax.scan(lambda x, layer: (block(Part(layer), x), None), x, stacked)[0]


def _maxtext_scanned(block):
    def loss(p, ids):
        d = p / "decoder"
        x = scanned(block, (d / "layers").below(axis=1), p["token_embedder/embedding"][ids])
        return cross_entropy(linear(d / "logits_dense", norm(d / "decoder_norm", x)), ids)

    return loss


def pure_jax_scan(p, ids, heads=8):
    def block(part, x):
        y = norm(Part({"scale": part["ln_1"]}), x)
        q, k, v = (split(y @ part[n], heads) for n in ("wq", "wk", "wv"))
        x = x + attend(q, k, v, causal=True) @ part["wo"]
        h = jax.nn.gelu(
            norm(Part({"scale": part["ln_2"]}), x) @ part["w1"] + part["b1"][None, None]
        )
        return x + h @ part["w2"] + part["b2"][None, None]

    names = ("wq", "wk", "wv", "wo", "w1", "w2", "b1", "b2", "ln_1", "ln_2")
    x = scanned(block, {name: p[name] for name in names}, p["tok/w"][ids])
    return cross_entropy(x @ p["output/w"], ids)


# --- Gemma in einsums -----------------------------------------------------------------------------


def _gemma_block(part, x):
    y, attn = norm(part / "pre_attention_norm", x), part / "attn"
    if "qkv_einsum/w" in attn:
        q, k, v = jnp.einsum("btd,sndh->sbtnh", y, attn["qkv_einsum/w"])
    else:
        q = jnp.einsum("btd,ndh->btnh", y, attn["q_einsum/w"])
        k, v = jnp.einsum("bsd,ckdh->cbskh", y, attn["kv_einsum/w"])
    y = split(attend(rotate(q), rotate(k), v, causal=True), q.shape[2])
    x = x + jnp.einsum("btnh,nhd->btd", y, attn["attn_vec_einsum/w"])
    mlp, y = part / "mlp", norm(part / "pre_ffw_norm", x)
    gating, down = (
        mlp[f"{name}/w" if f"{name}/w" in mlp else name] for name in ("gating_einsum", "linear")
    )
    return x + (jax.nn.gelu(y @ gating[0]) * (y @ gating[1])) @ down


def gemma_einsums(p, ids):
    """Google's Gemma, whose layers lie in a list, a numbered list, or a stack."""
    p = p / "transformer" if "transformer/final_norm/scale" in p else p
    x = p["embedder/input_embedding"][ids] * p["embedder/input_embedding"].shape[-1] ** 0.5
    if "layers/mlp/linear" in p:
        x = scanned(_gemma_block, (p / "layers").below(), x)
    else:
        x = through((p / "layers").many() or p.many("layer_{}"), _gemma_block, x)
    return tied(norm(p / "final_norm", x), p["embedder/input_embedding"], ids)


def levanter_llama(p, ids):
    def block(part, x):
        y, a = norm(Part({"weight": part["input_layernorm/weight/0"]}), x), part / "self_attn"
        q = jnp.einsum("btd,hgkd->bthgk", y, a["q_proj/weight/0"])
        k, v = (jnp.einsum("btd,hkd->bthk", y, a[f"{n}_proj/weight/0"]) for n in "kv")
        scores = jax.nn.softmax(jnp.einsum("bthgk,bshk->bhgts", q, k))
        y = jnp.einsum("bhgts,bshk->bthgk", scores, v)
        y = y.reshape(*y.shape[:2], -1, y.shape[-1])
        x = x + jnp.einsum("bthk,dhk->btd", y, a["o_proj/weight/0"])
        y = norm(Part({"weight": part["post_attention_layernorm/weight/0"]}), x)
        gate, up, down = (part[f"mlp/{n}_proj/weight/0"] for n in ("gate", "up", "down"))
        return x + (jax.nn.silu(y @ gate.T) * (y @ up.T)) @ down.T

    stacked = (p / "transformer/layers/stacked").below()
    x = scanned(block, stacked, p["embeddings/token_embeddings/weight/0"][ids])
    x = norm(Part({"weight": p["transformer/norm/weight/0"]}), x)
    return cross_entropy(x @ p["lm_head/weight/0"].T, ids)


BUILT = {
    "gpt2": Built(gpt2),
    "gptneo": Built(gptneo),
    "gptj": Built(gptj),
    "opt": Built(opt),
    "xglm": Built(xglm),
    "bloom": Built(bloom),
    "llama": Built(_llama(32)),
    "mistral": Built(_llama(32, 8)),
    "gemma": Built(_llama(16, act=jax.nn.gelu)),
    "easylm_llama": Built(easylm_llama),
    "maxtext_llama2": Built(maxtext_llama2),
    "maxtext_llama2_scanned": Built(_maxtext_scanned(maxtext_block)),
    "pure_jax_scan": Built(pure_jax_scan),
    "gemma_2b": Built(gemma_einsums),
    "gemma_2b_scan": Built(gemma_einsums),
    "gemma_7b": Built(gemma_einsums),
    "levanter_llama": Built(levanter_llama),
}
