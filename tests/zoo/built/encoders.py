"""Encoders: BERT and its kin, and vision transformers."""

import jax
import jax.numpy as jnp

from tests.zoo.built.blocks import (
    IDS,
    IMAGES,
    Built,
    along_last,
    attend,
    attention,
    convolve,
    cross_entropy,
    linear,
    norm,
    split,
)
from tests.zoo.built.decoders import positions, through

LABELS = (*IDS, jax.ShapeDtypeStruct((2,), jnp.int32))


def embedded(p, ids):
    """Words, positions and, where there are any, types of tokens."""
    x = p["word_embeddings/embedding"][ids] + positions(p["position_embeddings/embedding"], ids)
    if "token_type_embeddings/embedding" in p:
        x = x + p["token_type_embeddings/embedding"][ids * 0]
    return norm(p / "LayerNorm", x)


def bert_block(heads):
    def block(part, x):
        y = attention(part / "attention/self", x, "query key value ../output/dense", heads)
        x = norm(part / "attention/output/LayerNorm", x + y)
        y = linear(part / "output/dense", jax.nn.gelu(linear(part / "intermediate/dense", x)))
        return norm(part / "output/LayerNorm", x + y)

    return block


def bert(p, ids, labels):
    """Masked words, and whether one sentence follows the other."""
    x = embedded(p / "bert/embeddings", ids)
    x = through((p / "bert/encoder/layer").many(), bert_block(12), x)
    pooled = jnp.tanh(linear(p / "bert/pooler/dense", x[:, 0]))
    t = p / "cls/predictions/transform"
    y = norm(t / "LayerNorm", jax.nn.gelu(linear(t / "dense", x)))
    logits = y @ p["bert/embeddings/word_embeddings/embedding"].T
    logits = logits + p["cls/predictions/bias"][None, None]
    follows = linear(p / "cls/seq_relationship", pooled)
    return cross_entropy(logits, ids) + cross_entropy(follows, labels)


def _roberta(p, ids):
    x = embedded(p / "roberta/embeddings", ids)
    return through((p / "roberta/encoder/layer").many(), bert_block(12), x)


def roberta_cls(p, ids, labels):
    x = jnp.tanh(linear(p / "classifier/dense", _roberta(p, ids)[:, 0]))
    return cross_entropy(linear(p / "classifier/out_proj", x), labels)


def roberta_mlm(p, ids):
    h = p / "lm_head"
    x = norm(h / "layer_norm", jax.nn.gelu(linear(h / "dense", _roberta(p, ids))))
    logits = linear(h / "decoder", x) + h["bias"][None, None]
    return cross_entropy(logits, ids)


def electra(p, ids, replaced):
    x = linear(p / "electra/embeddings_project", embedded(p / "electra/embeddings", ids))
    x = through((p / "electra/encoder/layer").many(), bert_block(4), x)
    d = p / "discriminator_predictions"
    logits = linear(d / "dense_prediction", jax.nn.gelu(linear(d / "dense", x)))[..., 0]
    return jnp.mean(jax.nn.softplus(logits) - logits * replaced)


def albert(p, ids, labels):
    """One layer, twelve times."""
    a = p / "albert"
    x = linear(a / "encoder/embedding_hidden_mapping_in", embedded(a / "embeddings", ids))
    layer = a / "encoder/albert_layer_groups/0/albert_layers/0"
    for _ in range(12):
        y = attention(layer / "attention", x, "query key value dense", 64)
        x = norm(layer / "attention/LayerNorm", x + y)
        y = linear(layer / "ffn_output", jax.nn.gelu(linear(layer / "ffn", x)))
        x = norm(layer / "full_layer_layer_norm", x + y)
    pooled = jnp.tanh(linear(a / "pooler", x[:, 0]))
    h = p / "predictions"
    y = norm(h / "LayerNorm", jax.nn.gelu(linear(h / "dense", x)))
    logits = y @ a["embeddings/word_embeddings/embedding"].T + h["bias"][None, None]
    order = linear(p / "sop_classifier/classifier", pooled)
    return cross_entropy(logits, ids) + cross_entropy(order, labels)


def distilbert_cls(p, ids, labels):
    def block(part, x):
        y = attention(part / "attention", x, "q_lin k_lin v_lin out_lin", 12)
        x = norm(part / "sa_layer_norm", x + y)
        y = linear(part / "ffn/lin2", jax.nn.gelu(linear(part / "ffn/lin1", x)))
        return norm(part / "output_layer_norm", x + y)

    d = p / "distilbert"
    x = through((d / "transformer/layer").many(), block, embedded(d / "embeddings", ids))
    x = jax.nn.relu(linear(p / "pre_classifier", x[:, 0]))
    return cross_entropy(linear(p / "classifier", x), labels)


def deberta(p, ids, heads=12):
    """Attention to words and to distances, which have vectors, and keys and queries of the same."""
    d = p / "deberta"
    table = norm(d / "encoder/LayerNorm", d["encoder/rel_embeddings/weight"])
    at = jnp.arange(8)[:, None] - jnp.arange(8)[None] + 256

    def block(part, x):
        own = part / "attention/self"
        q, k, v = (split(linear(own / f"{n}_proj", x), heads) for n in ("query", "key", "value"))
        far_q, far_k = (linear(own / f"{n}_proj", table) for n in ("query", "key"))
        far_q, far_k = (z.reshape(512, heads, -1) for z in (far_q, far_k))
        by_key = jnp.einsum("bqhd,rhd->bhqr", q, far_k)
        by_query = jnp.einsum("bkhd,rhd->bhkr", k, far_q)
        there = jnp.broadcast_to(at[None, None], (2, heads, 8, 8))
        bias = jnp.take_along_axis(by_key, there, axis=-1)
        bias = bias + jnp.take_along_axis(by_query, there, axis=-1).swapaxes(2, 3)
        y = linear(part / "attention/output/dense", attend(q, k, v, bias))
        x = norm(part / "attention/output/LayerNorm", x + y)
        y = linear(part / "output/dense", jax.nn.gelu(linear(part / "intermediate/dense", x)))
        return norm(part / "output/LayerNorm", x + y)

    words = d["embeddings/word_embeddings/weight"]
    x = through((d / "encoder/layer").many(), block, norm(d / "embeddings/LayerNorm", words[ids]))
    t = p / "cls/predictions/transform"
    y = norm(t / "LayerNorm", jax.nn.gelu(linear(t / "dense", x)))
    return cross_entropy(along_last(y @ words.T, p["cls/predictions/bias"]), ids)


# --- Vision ---------------------------------------------------------------------------------------


def patches(part, images):
    """[batch, height, width, channels] to [batch, tokens, width], by a convolution."""
    x = convolve(part, images, part["kernel"].shape[0], "VALID")
    return x.reshape(x.shape[0], -1, x.shape[-1])


def with_class(x, token):
    token = token.reshape(1, 1, -1)
    return jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1])), x], axis=1)


def _after(name):
    """The projection behind attention, which these models keep in a module beside it."""
    return f"query key value ../{name}"


def vit(p, images, labels):
    def block(part, x):
        y = norm(part / "layernorm_before", x)
        x = x + attention(part / "attention/attention", y, _after("output/dense"), 12)
        y = linear(part / "intermediate/dense", norm(part / "layernorm_after", x))
        return x + linear(part / "output/dense", jax.nn.gelu(y))

    e = p / "vit/embeddings"
    x = with_class(patches(e / "patch_embeddings/projection", images), e["cls_token"])
    x = through((p / "vit/encoder/layer").many(), block, x + e["position_embeddings"])
    return cross_entropy(linear(p / "classifier", norm(p / "vit/layernorm", x)[:, 0]), labels)


def beit(p, images, labels, masked):
    """With a learned bias for each relative position, and images of which patches are masked."""

    def block(part, x):
        y, a = norm(part / "layernorm_before", x), part / "attention/attention"
        at = (jnp.arange(197)[:, None] - jnp.arange(197)[None]) % 732
        bias = a["relative_position_bias/relative_position_bias_table"][at]
        y = attention(a, y, _after("output/dense"), 12, bias=bias.transpose(2, 0, 1)[None])
        x = x + part["lambda_1"][None, None] * y
        y = linear(part / "intermediate/dense", norm(part / "layernorm_after", x))
        y = linear(part / "output/dense", jax.nn.gelu(y))
        return x + part["lambda_2"][None, None] * y

    e = p / "beit/embeddings"
    x = patches(e / "patch_embeddings/projection", images)
    x = jnp.where(masked[..., None], e["mask_token"], x)
    x = through((p / "beit/encoder/layer").many(), block, with_class(x, e["cls_token"]))
    x = norm(p / "beit/pooler/layernorm", x[:, 1:].mean(1))
    return cross_entropy(linear(p / "classifier", x), labels)


def dinov2(p, images, labels, masked):
    def block(part, x):
        y = norm(part / "norm1", x)
        y = attention(part / "attention/attention", y, _after("output/dense"), 12)
        x = x + part["layer_scale1/lambda1"][None, None] * y
        y = jax.nn.gelu(linear(part / "mlp/fc1", norm(part / "norm2", x)))
        return x + part["layer_scale2/lambda1"][None, None] * linear(part / "mlp/fc2", y)

    e = p / "dinov2/embeddings"
    x = patches(e / "patch_embeddings/projection", images)
    x = jnp.where(masked[..., None], e["mask_token"][None], x)
    x = with_class(x, e["cls_token"]) + e["position_embeddings"]
    x = norm(p / "dinov2/layernorm", through((p / "dinov2/encoder/layer").many(), block, x))
    x = jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=-1)
    return cross_entropy(linear(p / "classifier", x), labels)


def clip(p, images, ids):
    """Two towers, whose outcomes are compared in one batch."""

    def block(heads, **options):
        def run(part, x):
            y, names = norm(part / "layer_norm1", x), "q_proj k_proj v_proj out_proj"
            x = x + attention(part / "self_attn", y, names, heads, **options)
            y = linear(part / "mlp/fc1", norm(part / "layer_norm2", x))
            return x + linear(part / "mlp/fc2", y * jax.nn.sigmoid(1.702 * y))

        return run

    v, t = p / "vision_model", p / "text_model"
    x = with_class(
        patches(v / "embeddings/patch_embedding", images), v["embeddings/class_embedding"]
    )
    x = norm(v / "pre_layrnorm", x + v["embeddings/position_embedding/embedding"][None])
    x = norm(v / "post_layernorm", through((v / "encoder/layers").many(), block(12), x)[:, 0])
    y = t["embeddings/token_embedding/embedding"][ids]
    y = y + positions(t["embeddings/position_embedding/embedding"], ids)
    y = through((t / "encoder/layers").many(), block(8, causal=True), y)
    y = norm(t / "final_layer_norm", y)[jnp.arange(2), ids.argmax(-1)]
    x, y = linear(p / "visual_projection", x), linear(p / "text_projection", y)
    x, y = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))
    logits = x @ y.T * jnp.exp(p["logit_scale"])
    return cross_entropy(logits, jnp.arange(2)) + cross_entropy(logits.T, jnp.arange(2))


def _masked(tokens):
    return (*IMAGES, jax.ShapeDtypeStruct((2, tokens), jnp.bool_))


REPLACED = (*IDS, jax.ShapeDtypeStruct((2, 8), jnp.float32))
BUILT = {
    "bert": Built(bert, LABELS),
    "roberta_cls": Built(roberta_cls, LABELS),
    "roberta_mlm": Built(roberta_mlm),
    "electra": Built(electra, REPLACED),
    "albert": Built(albert, LABELS),
    "deberta": Built(deberta),
    "distilbert_cls": Built(distilbert_cls, LABELS),
    "vit": Built(vit, IMAGES),
    "beit": Built(beit, _masked(196)),
    "dinov2": Built(dinov2, _masked(256)),
    "clip": Built(clip, (IMAGES[0], *IDS), otherwise={r"_projection/kernel$": "adam"}),
}
