"""Models that ask: DETR of images, Perceiver IO of text, SAM of points."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.built.blocks import (
    IDS,
    IMAGES,
    Built,
    along_last,
    attention,
    cross_entropy,
    linear,
    norm,
)
from tests.zoo.built.convolutions import largest, residual_stages
from tests.zoo.built.decoders import positions, through

PROJECTIONS = "q_proj k_proj v_proj out_proj"


def convolve_torch(part, x, stride=1):
    """PyTorch's convolution: channels first, and weights of [out, in, *window]."""
    weight = part["weight"]
    edge = weight.shape[-1] // 2
    y = lax.conv_general_dilated(x, weight, (stride, stride), [(edge, edge)] * 2)
    return y + part["bias"].reshape(1, -1, 1, 1) if "bias" in part else y


def detr(p, images, labels, boxes):
    """Its batch norms are frozen, and no parameters; each query has its label and its box."""

    def layer(part, x, stride=1):
        x = convolve_torch(part / "convolution", x, stride)
        return x * jnp.full((1, x.shape[1], 1, 1), 0.9) + jnp.full((1, x.shape[1], 1, 1), 0.1)

    m = p / "model"
    backbone = m / "backbone/conv_encoder/model"
    x = jax.nn.relu(layer(backbone / "embedder/embedder", images.transpose(0, 3, 1, 2), 2))
    x = largest(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    x = residual_stages(backbone / "encoder/stages", layer, x)
    x = convolve_torch(m / "input_projection", x).reshape(2, 256, -1).swapaxes(1, 2)
    place = jnp.sin(jnp.arange(x.shape[1])[:, None] * jnp.arange(256)[None] * 0.01)[None]
    query = m["query_position_embeddings/weight"][None]

    def asked(part, x, memory, at, others):
        """Attention of which queries and keys, but not values, know their place."""
        q, k, v, out = (part / name for name in PROJECTIONS.split())
        shape = (2, -1, 8, 32)
        q, k = linear(q, x + at).reshape(shape), linear(k, memory + others).reshape(shape)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, linear(v, memory).reshape(shape))
        return linear(out, y.reshape(2, -1, 256))

    def feed_forward(part, x):
        y = linear(part / "fc2", jax.nn.relu(linear(part / "fc1", x)))
        return norm(part / "final_layer_norm", x + y)

    def encode(part, x):
        y = asked(part / "self_attn", x, x, place, place)
        return feed_forward(part, norm(part / "self_attn_layer_norm", x + y))

    memory = through((m / "encoder/layers").many(), encode, x)

    def decode(part, x):
        y = asked(part / "self_attn", x, x, query, query)
        x = norm(part / "self_attn_layer_norm", x + y)
        y = asked(part / "encoder_attn", x, memory, query, place)
        return feed_forward(part, norm(part / "encoder_attn_layer_norm", x + y))

    x = through((m / "decoder/layers").many(), decode, jnp.zeros((2, 100, 256)))
    x = norm(m / "decoder/layernorm", x)
    box, layers = x, (p / "bbox_predictor/layers").many()
    for part in layers[:-1]:
        box = jax.nn.relu(linear(part, box))
    box = jax.nn.sigmoid(linear(layers[-1], box))
    return (
        cross_entropy(linear(p / "class_labels_classifier", x), labels)
        + jnp.abs(box - boxes).mean()
    )


def perceiver(p, ids):
    """Latents that attend to the words, to themselves, and are asked at each place."""

    def layer(part, x, memory=None, heads=8, is_added=True):
        own = part / "attention/self"
        y, other = norm(own / "layernorm1", x), memory
        if memory is not None:
            other = norm(own / "layernorm2", memory)
        y = attention(own, y, "query key value ../output/dense", heads, other)
        x = x + y if is_added else y
        h = jax.nn.gelu(linear(part / "mlp/dense1", norm(part / "layernorm", x)))
        return x + linear(part / "mlp/dense2", h)

    m = p / "perceiver"
    table = m["input_preprocessor/embeddings/weight"]
    words = table[ids] + positions(m["input_preprocessor/position_embeddings/weight"], ids)
    x = jnp.broadcast_to(m["embeddings/latents"][None], (2, 256, 1280))
    x = layer(m / "encoder/cross_attention", x, words)
    x = through((m / "encoder/self_attends").many(), layer, x)
    asked = m["decoder/output_position_encodings/position_embeddings"][None, :8]
    asked = jnp.broadcast_to(asked, (2, 8, 768))
    y = layer(m / "decoder/decoding_cross_attention", asked, x, is_added=False)
    return cross_entropy(along_last(y @ table.T, p["embedding_decoder/bias"]), ids)


LABELS = jax.ShapeDtypeStruct((2, 100), jnp.int32)
BOXES = jax.ShapeDtypeStruct((2, 100, 4), jnp.float32)
BUILT = {
    "detr": Built(detr, (IMAGES[0], LABELS, BOXES)),
    "perceiver": Built(perceiver, IDS),
}
