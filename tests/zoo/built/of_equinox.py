"""Models of Equinox's own layers."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.zoo.built.blocks import IMAGES, Built, cross_entropy


class Block(eqx.Module):
    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    ln1: eqx.nn.LayerNorm
    ln2: eqx.nn.LayerNorm

    def __init__(self, width, hidden, key):
        self.attn = eqx.nn.MultiheadAttention(12, width, key=key)
        self.mlp = eqx.nn.MLP(width, width, hidden, 1, jax.nn.gelu, key=key)
        self.ln1, self.ln2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)

    def __call__(self, x):
        y = jax.vmap(self.ln1)(x)
        x = x + self.attn(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.ln2)(x))


class VisionTransformer(eqx.Module):
    patch_embedding: eqx.nn.Conv2d
    positional_embedding: jax.Array
    cls_token: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.patch_embedding = eqx.nn.Conv2d(3, 768, 16, 16, key=key)
        self.positional_embedding = jnp.zeros((197, 768))
        self.cls_token = jnp.zeros((1, 768))
        self.blocks = [Block(768, 3072, key) for _ in range(12)]
        self.norm = eqx.nn.LayerNorm(768)
        self.head = eqx.nn.Linear(768, 1000, key=key)

    def __call__(self, image):
        x = self.patch_embedding(image.transpose(2, 0, 1)).reshape(768, -1).T
        x = jnp.concatenate([self.cls_token, x]) + self.positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


class Patches(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, image, side=4):
        rows = image.shape[0] // side
        x = image.reshape(rows, side, rows, side, 3).transpose(0, 2, 4, 1, 3)
        return jax.vmap(self.linear)(x.reshape(rows * rows, -1))


class SmallBlock(eqx.Module):
    layer_norm1: eqx.nn.LayerNorm
    layer_norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear

    def __init__(self, key):
        self.layer_norm1, self.layer_norm2 = eqx.nn.LayerNorm(512), eqx.nn.LayerNorm(512)
        self.attention = eqx.nn.MultiheadAttention(8, 512, key=key)
        self.linear1 = eqx.nn.Linear(512, 256, key=key)
        self.linear2 = eqx.nn.Linear(256, 512, key=key)

    def __call__(self, x):
        y = jax.vmap(self.layer_norm1)(x)
        x = x + self.attention(y, y, y)
        y = jax.vmap(lambda y: self.linear2(jax.nn.gelu(self.linear1(y))))
        return x + y(jax.vmap(self.layer_norm2)(x))


class SmallVisionTransformer(eqx.Module):
    patch_embedding: Patches
    positional_embedding: jax.Array
    cls_token: jax.Array
    attention_blocks: list[SmallBlock]
    mlp: eqx.nn.Sequential

    def __init__(self, key):
        self.patch_embedding = Patches(eqx.nn.Linear(48, 512, key=key))
        self.positional_embedding = jnp.zeros((65, 512))
        self.cls_token = jnp.zeros((1, 512))
        self.attention_blocks = [SmallBlock(key) for _ in range(6)]
        self.mlp = eqx.nn.Sequential([eqx.nn.LayerNorm(512), eqx.nn.Linear(512, 10, key=key)])

    def __call__(self, image):
        x = jnp.concatenate([self.cls_token, self.patch_embedding(image)])
        x = x + self.positional_embedding
        for block in self.attention_blocks:
            x = block(x)
        return self.mlp(x[0])


def built(make, batch):
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def loss(params, images, labels):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(images), labels)

    return Built(loss, batch, params)


SMALL = (jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32), IMAGES[1])
BUILT = {
    "eqx_vit": functools.partial(built, VisionTransformer, IMAGES),
    "eqx_example_vit": functools.partial(built, SmallVisionTransformer, SMALL),
}
