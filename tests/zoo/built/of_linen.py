"""Models of Flax Linen's own layers. The zoo's leaves fit, or Flax raises."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from tests.zoo.built.blocks import IDS, IMAGES, Built, cross_entropy
from tests.zoo.checker import params_of
from tests.zoo.entries import family


class TransformerBlock(nn.Module):
    """lm1b's decoder block, which has biases in its feed-forward part alone."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(x[..., 0])
        attention = nn.MultiHeadDotProductAttention(
            self.heads, use_bias=False, name="SelfAttention_0"
        )
        x = x + attention(y, mask=mask)
        return x + Mlp(self.hidden, nn.relu, name="MlpBlock_0")(nn.LayerNorm()(x))


class Mlp(nn.Module):
    hidden: int
    act: object = nn.gelu

    @nn.compact
    def __call__(self, x):
        h = self.act(nn.Dense(self.hidden)(x))
        return nn.Dense(x.shape[-1])(h)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(30000, 512)(ids) + jnp.sin(jnp.arange(512.0))[None, None]
        for i in range(6):
            x = TransformerBlock(8, 2048, name=f"encoderdecoderblock_{i}")(x)
        x = nn.LayerNorm(name="encoderdecoder_norm")(x)
        return nn.Dense(30000, name="logitdense")(x)


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return Decoder(name="decoder")(ids)


# --- ResNet ---------------------------------------------------------------------------------------


def batch_norm(name=None):
    return nn.BatchNorm(use_running_average=False, name=name)


class BottleneckResNetBlock(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(batch_norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(y)
        y = nn.Conv(4 * self.width, (1, 1), use_bias=False)(nn.relu(batch_norm()(y)))
        y = batch_norm()(y)
        if x.shape != y.shape:
            strides = {"strides": self.stride, "use_bias": False, "name": "conv_proj"}
            x = batch_norm("norm_proj")(nn.Conv(4 * self.width, (1, 1), **strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, use_bias=False, name="conv_init")(x)
        x = nn.max_pool(nn.relu(batch_norm("bn_init")(x)), (3, 3), (2, 2), "SAME")
        for stage, many in enumerate((3, 4, 6, 3)):
            for i in range(many):
                x = BottleneckResNetBlock(64 * 2**stage, 2 if stage and not i else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


# --- Vision transformer and MLP-Mixer, as big_vision names them -----------------------------------


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(12)(y, y)
        return x + Mlp(3072, name="MlpBlock_0")(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            layers = nn.scan(
                EncoderBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=12
            )
            x, _ = layers(name="encoderblock")(x, None)
        else:
            for i in range(12):
                x, _ = EncoderBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class AttentionPool(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.zeros, (1, 1, x.shape[-1]))
        probe = jnp.tile(probe, (x.shape[0], 1, 1))
        x = nn.MultiHeadDotProductAttention(12)(probe, x)
        return (x + Mlp(3072, name="MlpBlock_0")(nn.LayerNorm()(x)))[:, 0]


class VisionTransformer(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(768, (16, 16), 16, "VALID", name="embedding")(x).reshape(2, -1, 768)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, 196, 768))
        x = Encoder(self.scan, name="Transformer")(x)
        if self.scan:
            x = x.mean(1)
        else:
            x = jnp.tanh(nn.Dense(768, name="pre_logits")(AttentionPool(name="MAPHead_0")(x)))
        return nn.Dense(1000, name="head")(x)


class MixerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(Mlp(384, name="token_mixing")(y), 1, 2)
        return x + Mlp(3072, name="channel_mixing")(nn.LayerNorm()(x))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(768, (16, 16), 16, "VALID", name="stem")(x).reshape(2, -1, 768)
        for _ in range(12):
            x = MixerBlock()(x)
        return nn.Dense(1000, name="head")(nn.LayerNorm(name="pre_head_layer_norm")(x).mean(1))


# --- DiT ------------------------------------------------------------------------------------------


def modulated(x, shift, scale):
    x = nn.LayerNorm(use_bias=False, use_scale=False)(x)
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(768, (2, 2), 2, "VALID")(x).reshape(2, -1, 768)


class TimestepEmbedder(nn.Module):
    @nn.compact
    def __call__(self, at):
        angles = at[:, None] * jnp.exp(-jnp.arange(128) / 16.0)[None]
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        h = nn.silu(nn.Dense(768)(x))
        return nn.Dense(768)(h)


class LabelEmbedder(nn.Module):
    @nn.compact
    def __call__(self, labels):
        return nn.Embed(1001, 768)(labels)


class DiTBlock(nn.Module):
    @nn.compact
    def __call__(self, x, condition):
        six = jnp.split(nn.Dense(6 * 768)(nn.silu(condition)), 6, axis=-1)
        y = modulated(x, six[0], six[1])
        x = x + six[2][:, None] * nn.MultiHeadDotProductAttention(12)(y, y)
        y = modulated(x, six[3], six[4])
        return x + six[5][:, None] * Mlp(3072, name="MlpBlock_0")(y)


class FinalLayer(nn.Module):
    @nn.compact
    def __call__(self, x, condition):
        shift, scale = jnp.split(nn.Dense(2 * 768)(nn.silu(condition)), 2, axis=-1)
        return nn.Dense(16)(modulated(x, shift, scale))


class DiT(nn.Module):
    @nn.compact
    def __call__(self, noisy, at, labels):
        position = self.param("pos_embed", nn.initializers.zeros, (1, 256, 768))
        x = PatchEmbed()(noisy) + position
        condition = TimestepEmbedder()(at) + LabelEmbedder()(labels)
        for _ in range(12):
            x = DiTBlock()(x, condition)
        return FinalLayer()(x, condition)


# --- Their losses ---------------------------------------------------------------------------------


def classified(model):
    def loss(params, images, labels):
        logits, _ = model.apply({"params": params}, images, mutable=["batch_stats"])
        return cross_entropy(logits, labels)

    return loss


def next_token(params, ids):
    return cross_entropy(LanguageModel().apply({"params": params}, ids), ids)


def denoised(params, noisy, at, labels, noise):
    y = DiT().apply({"params": params}, noisy, at, labels)
    return jnp.mean((y - noise.reshape(y.shape)) ** 2)


def of_zoo(name, loss, batch, **options):
    """With the zoo's leaves as the nested dictionary that Flax takes."""
    params = traverse_util.unflatten_dict(params_of(family(name)), sep="/")
    return Built(loss, batch, params, **options)


LATENTS = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32)
NOISY = (LATENTS, jax.ShapeDtypeStruct((2,), jnp.float32), IMAGES[1], LATENTS)
MODELS = {
    "flax_lm1b": (next_token, IDS, {}),
    "flax_resnet50": (classified(ResNet()), IMAGES, {}),
    "big_vision_vit": (classified(VisionTransformer()), IMAGES, {}),
    "big_vision_vit_scan": (classified(VisionTransformer(scan=True)), IMAGES, {}),
    "big_vision_mixer": (classified(Mixer()), IMAGES, {}),
    "dit": (denoised, NOISY, {r"FinalLayer_0/Dense_1/kernel": "adam"}),
}
BUILT = {
    name: functools.partial(of_zoo, name, loss, batch, otherwise=otherwise)
    for name, (loss, batch, otherwise) in MODELS.items()
}
