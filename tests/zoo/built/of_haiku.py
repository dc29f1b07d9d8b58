"""Models of Haiku's own layers and networks."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp

from tests.zoo.built.blocks import IDS, IMAGES, Built, cross_entropy


def transformer(ids):
    x = hk.Embed(32000, 512)(ids)
    causal = jnp.tril(jnp.ones((1, 1, 8, 8)))
    for i in range(6):
        y = hk.LayerNorm(-1, True, True, name=f"layer_{i}_ln")(x)
        attention = hk.MultiHeadAttention(
            8, 64, w_init=hk.initializers.VarianceScaling(), name=f"layer_{i}_attn"
        )
        x = x + attention(y, y, y, causal)
        x = x + hk.nets.MLP([2048, 512], activation=jax.nn.gelu, name=f"layer_{i}_mlp")(x)
    return hk.Linear(32000)(x)


def built(apply, batch):
    """With parameters as Haiku makes them; a model's statistics go with the batch."""
    model = hk.transform_with_state(apply)
    params, state = jax.eval_shape(model.init, jax.random.key(0), batch[0])

    def loss(params, *batch):
        *batch, state = batch
        logits, _ = model.apply(params, state, None, batch[0])
        return cross_entropy(logits, batch[-1])

    return Built(loss, (*batch, state), params)


def resnet(x):
    return hk.nets.ResNet50(1000)(x, is_training=True)


def mobilenet(x):
    return hk.nets.MobileNetV1(num_classes=1000)(x, is_training=True)


BUILT = {
    "hk_transformer": functools.partial(built, transformer, IDS),
    "hk_resnet50": functools.partial(built, resnet, IMAGES),
    "hk_mobilenet": functools.partial(built, mobilenet, IMAGES),
}
