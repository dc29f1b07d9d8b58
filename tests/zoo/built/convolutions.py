"""Convolutional models, written on the zoo's leaves: residual networks and diffusion's."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.built.blocks import (
    IMAGES,
    Built,
    attention,
    convolve,
    cross_entropy,
    linear,
    norm,
)


def over_batch(part, x):
    """BatchNorm of the batch at hand."""
    axes = tuple(range(x.ndim - 1))
    x = (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5)
    gain, bias = (part[name].reshape((1,) * (x.ndim - 1) + (-1,)) for name in ("scale", "bias"))
    return x * gain + bias


def over_groups(part, x, groups=32):
    """GroupNorm."""
    y = x.reshape(*x.shape[:-1], groups, -1)
    axes = (1, 2, 4)
    y = (y - y.mean(axes, keepdims=True)) / jnp.sqrt(y.var(axes, keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * part["scale"].reshape(1, 1, 1, -1)
    return y + part["bias"].reshape(1, 1, 1, -1)


def largest(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


def residual_stages(stages, layer, x):
    """The bottlenecks of Hugging Face's ResNets."""
    for number, stage in enumerate(stages.many()):
        for at, block in enumerate((stage / "layers").many()):
            stride = 2 if number and not at else 1
            one, two, three = (block / "layer").many()
            y = jax.nn.relu(layer(two, jax.nn.relu(layer(one, x)), stride))
            x = layer(block / "shortcut", x, stride) if at == 0 else x
            x = jax.nn.relu(x + layer(three, y))
    return x


def resnet(p, images, labels):
    """Hugging Face's ResNet-50."""

    def layer(part, x, stride=1):
        return over_batch(part / "normalization", convolve(part / "convolution", x, stride))

    x = largest(jax.nn.relu(layer(p / "resnet/embedder/embedder", images, 2)))
    x = residual_stages(p / "resnet/encoder/stages", layer, x)
    return cross_entropy(linear(p / "classifier/1", x.mean((1, 2))), labels)


def bonsai_resnet50(p, images, labels):
    x = jax.nn.relu(over_batch(p / "stem/bn", convolve(p / "stem/conv", images, 2)))
    x = largest(x)
    for number, stage in enumerate(p.many("layer{}")):
        for at, block in enumerate((stage / "blocks").many()):
            stride, y = 2 if number and not at else 1, x
            for i in range(3):
                y = convolve(block / f"conv{i}", y, stride if i == 1 else 1)
                y = over_batch(block / f"bn{i}", y)
                y = jax.nn.relu(y) if i < 2 else y
            if at == 0:
                down = block / "downsample"
                x = over_batch(down / "bn", convolve(down / "conv", x, stride))
            x = jax.nn.relu(x + y)
    return cross_entropy(linear(p / "fc", x.mean((1, 2))), labels)


def densenet(p, images, labels):
    x = largest(jax.nn.relu(over_batch(p / "init_bn", convolve(p / "init_conv", images, 2))))
    for stage in (p / "blocks/layers").many():
        if "conv/kernel" in stage:
            x = convolve(stage / "conv", jax.nn.relu(over_batch(stage / "bn", x)))
            x = x.reshape(2, x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
            continue
        norms, convolutions = (stage / "bn_layers").many(), (stage / "conv_layers").many()
        for i in range(0, len(norms), 2):
            y = x
            for bn, conv in zip(norms[i : i + 2], convolutions[i : i + 2], strict=True):
                y = convolve(conv, jax.nn.relu(over_batch(bn, y)))
            x = jnp.concatenate([x, y], axis=-1)
    x = jax.nn.relu(over_batch(p / "final_bn", x)).mean((1, 2))
    return cross_entropy(linear(p / "linear", x), labels)


def convnext(p, images, labels):
    e = p / "embedding_layer/layers"
    x = norm(e / "1", convolve(e / "0", images, 4))
    for stage in (p / "stages").many():
        down = stage / "downsample_layers"
        if "0/scale" in down:
            x = convolve(down / "1", norm(down / "0", x), 2)
        for layer in (stage / "layers").many():
            y = norm(layer / "norm", convolve(layer / "dwconv", x, groups=x.shape[-1]))
            y = linear(layer / "pwconv2", jax.nn.gelu(linear(layer / "pwconv1", y)))
            x = x + y * layer["gamma"][None, None, None]
    return cross_entropy(linear(p / "head", norm(p / "norm", x.mean((1, 2)))), labels)


# --- Stable Diffusion -----------------------------------------------------------------------------


def _resnet(part, x, time=None):
    y = convolve(part / "conv1", jax.nn.silu(over_groups(part / "norm1", x)))
    if time is not None:
        y = y + linear(part / "time_emb_proj", jax.nn.silu(time))[:, None, None]
    y = convolve(part / "conv2", jax.nn.silu(over_groups(part / "norm2", y)))
    return y + (convolve(part / "conv_shortcut", x) if "conv_shortcut/kernel" in part else x)


def _widened(part, x):
    return convolve(part / "conv", x.repeat(2, axis=1).repeat(2, axis=2))


def _cross(part, x, text, heads=8):
    """A transformer block on an image, which attends to the text."""
    kept, names = x, "to_q to_k to_v to_out_0"
    x = convolve(part / "proj_in", over_groups(part / "norm", x))
    y, block = x.reshape(2, -1, x.shape[-1]), part / "transformer_blocks_0"
    y = y + attention(block / "attn1", norm(block / "norm1", y), names, heads)
    y = y + attention(block / "attn2", norm(block / "norm2", y), names, heads, text)
    a, b = jnp.split(linear(block / "ff/net_0/proj", norm(block / "norm3", y)), 2, axis=-1)
    y = y + linear(block / "ff/net_2", a * jax.nn.gelu(b))
    return kept + convolve(part / "proj_out", y.reshape(x.shape))


def _stage(part, x, time, text, skips=None, kept=None):
    """The residual blocks of one resolution, each with its attention, if there is any."""
    attentions = part.many("attentions_{}")
    for i, block in enumerate(part.many("resnets_{}")):
        if skips is not None:
            x = jnp.concatenate([x, skips.pop()], axis=-1)
        x = _resnet(block, x, time)
        if attentions:
            x = _cross(attentions[i], x, text)
        if kept is not None:
            kept.append(x)
    return x


def unet(p, noisy, at, text, noise):
    angles = at[:, None] * jnp.exp(-jnp.arange(160) / 16.0)[None]
    time = linear(
        p / "time_embedding/linear_1", jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
    )
    time = linear(p / "time_embedding/linear_2", jax.nn.silu(time))
    x = convolve(p / "conv_in", noisy)
    skips = [x]
    for part in p.many("down_blocks_{}"):
        x = _stage(part, x, time, text, kept=skips)
        if "downsamplers_0/conv/kernel" in part:
            x = convolve(part / "downsamplers_0/conv", x, 2)
            skips.append(x)
    middle = p / "mid_block"
    x = _cross(middle / "attentions_0", _resnet(middle / "resnets_0", x, time), text)
    x = _resnet(middle / "resnets_1", x, time)
    for part in p.many("up_blocks_{}"):
        x = _stage(part, x, time, text, skips)
        if "upsamplers_0/conv/kernel" in part:
            x = _widened(part / "upsamplers_0", x)
    x = convolve(p / "conv_out", jax.nn.silu(over_groups(p / "conv_norm_out", x)))
    return jnp.mean((x - noise) ** 2)


def vae(p, images, noise):
    """An autoencoder with a normal distribution between its halves."""

    def middle(part, x):
        x, a = _resnet(part / "resnets_0", x), part / "attentions_0"
        y = over_groups(a / "group_norm", x).reshape(2, -1, x.shape[-1])
        x = x + attention(a, y, "query key value proj_attn", 1).reshape(x.shape)
        return _resnet(part / "resnets_1", x)

    def end(part, x):
        return convolve(part / "conv_out", jax.nn.silu(over_groups(part / "conv_norm_out", x)))

    e, d = p / "encoder", p / "decoder"
    x = convolve(e / "conv_in", images)
    for part in e.many("down_blocks_{}"):
        x = _stage(part, x, None, None)
        if "downsamplers_0/conv/kernel" in part:
            x = convolve(part / "downsamplers_0/conv", x, 2)
    mean, spread = jnp.split(convolve(p / "quant_conv", end(e, middle(e / "mid_block", x))), 2, -1)
    x = mean + jnp.exp(spread / 2) * noise
    x = middle(d / "mid_block", convolve(d / "conv_in", convolve(p / "post_quant_conv", x)))
    for part in d.many("up_blocks_{}"):
        x = _stage(part, x, None, None)
        if "upsamplers_0/conv/kernel" in part:
            x = _widened(part / "upsamplers_0", x)
    divergence = (mean**2 + jnp.exp(spread) - spread).mean()
    return jnp.mean((end(d, x) - images) ** 2) + divergence


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


NOISY = (_floats(2, 32, 32, 4), _floats(2), _floats(2, 8, 768), _floats(2, 32, 32, 4))
BUILT = {
    "resnet": Built(resnet, IMAGES),
    "bonsai_resnet50": Built(bonsai_resnet50, IMAGES),
    "bonsai_densenet121": Built(densenet, IMAGES, depth=None),
    "bonsai_convnext": Built(convnext, IMAGES),
    "unet": Built(unet, NOISY, otherwise={r"^conv_out/kernel$": "adam"}),
    "vae": Built(
        vae,
        (_floats(2, 64, 64, 3), _floats(2, 8, 8, 4)),
        otherwise={r"^decoder/conv_out/kernel$": "adam"},
    ),
}
