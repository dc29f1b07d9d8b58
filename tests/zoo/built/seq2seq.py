"""Models of two halves: an encoder, and a decoder that attends to it; and speech."""

import jax
import jax.numpy as jnp

from tests.zoo.built.blocks import (
    IDS,
    Built,
    Part,
    attention,
    convolve,
    cross_entropy,
    linear,
    norm,
)
from tests.zoo.built.decoders import positions, scanned, through, tied
from tests.zoo.built.encoders import LABELS

OTHER = jax.ShapeDtypeStruct((2, 8), jnp.int32)
PROJECTIONS = "q_proj k_proj v_proj out_proj"


def _gated(part, x):
    return linear(part / "wo", jax.nn.gelu(linear(part / "wi_0", x)) * linear(part / "wi_1", x))


# --- T5 -------------------------------------------------------------------------------------------


def _buckets(table, of_heads_first=False):
    """A bias for each bucket of distances and head: [1, heads, 8, 8]."""
    at = jnp.clip(jnp.arange(8)[:, None] - jnp.arange(8)[None], 0, 31)
    if of_heads_first:
        return jnp.einsum("hn,qkn->hqk", table, jax.nn.one_hot(at, 32))[None]
    return table[at].transpose(2, 0, 1)[None]


def t5(p, ids, targets, heads=8):
    """Hugging Face's: the first block of each half holds the table of distances."""

    def half(part, x, memory):
        bias = part / "block/0/layer/0/SelfAttention/relative_attention_bias"
        bias, is_decoder = _buckets(bias["embedding"]), memory is not None
        for block in (part / "block").many():
            first, *_, last = layers = (block / "layer").many()
            y = norm(first / "layer_norm", x)
            options = {"bias": bias, "causal": is_decoder}
            x = x + attention(first / "SelfAttention", y, "q k v o", heads, **options)
            if is_decoder:
                y, cross = norm(layers[1] / "layer_norm", x), layers[1] / "EncDecAttention"
                x = x + attention(cross, y, "q k v o", heads, memory)
            x = x + _gated(last / "DenseReluDense", norm(last / "layer_norm", x))
        return norm(part / "final_layer_norm", x)

    shared = p["shared/embedding"]
    memory = half(p / "encoder", shared[ids], None)
    return cross_entropy(
        linear(p / "lm_head", half(p / "decoder", shared[targets], memory)), targets
    )


def _t5x_layer(memory, bias, feed_forward, heads=12):
    names, cross = "query key value out", "encoder_decoder_attention"

    def layer(part, x):
        own = "attention" if memory is None else "self_attention"
        y = norm(part / f"pre_{own}_layer_norm", x)
        table = part["relpos_bias/rel_embedding"] if bias is None else bias
        options = {"bias": _buckets(table, of_heads_first=True), "causal": memory is not None}
        x = x + attention(part / own, y, names, heads, **options)
        if memory is not None:
            y = norm(part / "pre_cross_attention_layer_norm", x)
            x = x + attention(part / cross, y, names, heads, memory)
        return x + feed_forward(part / "mlp", norm(part / "pre_mlp_layer_norm", x))

    return layer


def t5x(p, ids, targets, feed_forward=_gated):
    """T5 as t5x has it: layers in a numbered list, or scanned along axis 1."""

    def half(name, x, memory):
        part = p / name
        if part.many("layers_{}"):
            bias = part["relpos_bias/rel_embedding"]
            x = through(part.many("layers_{}"), _t5x_layer(memory, bias, feed_forward), x)
        else:
            layer = _t5x_layer(memory, None, feed_forward)
            x = scanned(layer, (part / name).below(axis=1), x)
        return norm(part / f"{name}_norm", x)

    embedding = p["token_embedder/embedding"]
    memory = half("encoder", embedding[ids], None)
    x = half("decoder", embedding[targets], memory)
    if "decoder/logits_dense/kernel" not in p:
        return tied(x, embedding, targets)
    return cross_entropy(linear(p / "decoder/logits_dense", x), targets)


def _switch(part, x, capacity=4):
    """One expert for each token, by a product with where it goes; else a plain layer."""
    if "wi/kernel" in part:
        return linear(part / "wo", jax.nn.relu(linear(part / "wi", x)))
    gates = jax.nn.softmax(linear(part / "router/router_weights/w", x))
    chosen = jax.nn.one_hot(gates.argmax(-1), gates.shape[-1])
    place = (jnp.cumsum(chosen, axis=1) * chosen - 1).astype(jnp.int32)
    place = jax.nn.one_hot(place, capacity)
    h = jnp.einsum("btd,btec->ebcd", x, place)
    h = jax.nn.relu(jnp.einsum("ebcd,edf->ebcf", h, part["expert/wi/kernel"]))
    y = jnp.einsum("ebcf,efd->ebcd", h, part["expert/wo/kernel"])
    return jnp.einsum("ebcd,btec->btd", y, place * (gates * chosen)[..., None])


def t5x_switch(p, ids, targets):
    return t5x(p, ids, targets, _switch)


# --- BART, Whisper and Wav2Vec2 -------------------------------------------------------------------


def _fairseq(heads, memory=None, post=False):
    """A layer of fairseq's, with its norms before or behind what they are for."""

    def around(part, x, function):
        return norm(part, x + function(x)) if post else x + function(norm(part, x))

    def layer(part, x):
        def own(x):
            causal = memory is not None
            return attention(part / "self_attn", x, PROJECTIONS, heads, causal=causal)

        def cross(x):
            return attention(part / "encoder_attn", x, PROJECTIONS, heads, memory)

        def feed_forward(x):
            return linear(part / "fc2", jax.nn.gelu(linear(part / "fc1", x)))

        x = around(part / "self_attn_layer_norm", x, own)
        if memory is not None:
            x = around(part / "encoder_attn_layer_norm", x, cross)
        return around(part / "final_layer_norm", x, feed_forward)

    return layer


def bart_cls(p, ids, labels):
    def half(part, memory=None):
        x = p["model/shared/embedding"][ids] + positions(part["embed_positions/embedding"], ids, 2)
        x = norm(part / "layernorm_embedding", x)
        return through((part / "layers").many(), _fairseq(16, memory, post=True), x)

    x = half(p / "model/decoder", half(p / "model/encoder"))[:, -1]
    h = p / "classification_head"
    return cross_entropy(linear(h / "out_proj", jnp.tanh(linear(h / "dense", x))), labels)


def whisper(p, sound, ids):
    e, d = p / "model/encoder", p / "model/decoder"
    x = jax.nn.gelu(convolve(e / "conv1", sound))
    x = jax.nn.gelu(convolve(e / "conv2", x, 2)) + e["embed_positions/embedding"][None]
    x = norm(e / "layer_norm", through((e / "layers").many(), _fairseq(6), x))
    y = d["embed_tokens/embedding"][ids] + positions(d["embed_positions/embedding"], ids)
    y = norm(d / "layer_norm", through((d / "layers").many(), _fairseq(6, x), y))
    return tied(y, d["embed_tokens/embedding"], ids)


def wav2vec2(p, sound, masked, labels):
    """A stack of convolutions, a weight-normed one for positions, and an encoder."""
    w = p / "wav2vec2"
    x = sound[..., None]
    for number, part in enumerate((w / "feature_extractor/conv_layers").many()):
        x = convolve(part / "conv", x, 2 if number else 5, "VALID")
        x = jax.nn.gelu(norm(part / "layer_norm", x))
    x = linear(w / "feature_projection/projection", norm(w / "feature_projection/layer_norm", x))
    x = jnp.where(masked[..., None], w["masked_spec_embed"][None, None], x)
    e = w / "encoder"
    conv = e / "pos_conv_embed/conv"
    v, g = conv["weight_v"], conv["weight_g"]
    kernel = g * v / jnp.sqrt((v * v).sum((0, 1), keepdims=True))
    window = Part({"kernel": kernel.transpose(2, 1, 0), "bias": conv["bias"]})
    x = x + jax.nn.gelu(convolve(window, x, groups=16))

    def layer(part, x):
        x = x + attention(part / "attention", norm(part / "layer_norm", x), PROJECTIONS, 16)
        y = linear(part / "feed_forward/intermediate_dense", norm(part / "final_layer_norm", x))
        return x + linear(part / "feed_forward/output_dense", jax.nn.gelu(y))

    x = norm(e / "layer_norm", through((e / "layers").many(), layer, x))
    return cross_entropy(linear(p / "lm_head", x), labels)


SOUND = jax.ShapeDtypeStruct((2, 3000, 80), jnp.float32)
WAVES = (
    jax.ShapeDtypeStruct((2, 3000), jnp.float32),
    jax.ShapeDtypeStruct((2, 9), jnp.bool_),
    jax.ShapeDtypeStruct((2, 9), jnp.int32),
)
BUILT = {
    "t5": Built(t5, (*IDS, OTHER)),
    "t5x_t5": Built(t5x, (*IDS, OTHER)),
    "t5x_t5_scanned": Built(t5x, (*IDS, OTHER)),
    "t5x_switch": Built(t5x_switch, (*IDS, OTHER)),
    "bart_cls": Built(bart_cls, LABELS),
    "whisper": Built(whisper, (SOUND, *IDS)),
    "wav2vec2": Built(wav2vec2, WAVES, otherwise={r"conv_layers/0/conv/kernel": "muon 0>2"}),
}
