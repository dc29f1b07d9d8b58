"""The optimizer in training loops of the libraries that people build models with.

Dicts, lists and bare arrays are in `test_laws`. Here are whole models, their own gradients, and the
chain that most people write.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from muon_jax import muon

X = jnp.arange(24.0).reshape(6, 4) / 24
WIDE, OUT = 8, 3


def linen():
    model = nn.Sequential([nn.Dense(WIDE), jnp.tanh, nn.Dense(OUT)])
    return model.init(jax.random.key(0), X)["params"], lambda p, x: model.apply({"params": p}, x)


def equinox():
    model = eqx.nn.MLP(4, OUT, WIDE, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)


def haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([WIDE, OUT])(x)))
    return model.init(jax.random.key(0), X), model.apply


def of_nnx():
    model = nnx.Sequential(
        nnx.Linear(4, WIDE, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(WIDE, OUT, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)
    return params, lambda p, x: nnx.merge(graph, p)(x)


@pytest.mark.parametrize("library", [linen, equinox, haiku, of_nnx])
def test_two_steps_in_the_usual_chain(library):
    params, apply = library()
    tx = optax.chain(optax.clip_by_global_norm(1.0), muon(0.01))

    def loss(params):
        return jnp.mean((apply(params, X) - 1.0) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    state, losses, after = tx.init(params), [], params
    for _ in range(2):
        value, after, state = step(after, state)
        losses.append(float(value))
    assert float(loss(after)) < losses[1] < losses[0]
    assert jax.tree.structure(after) == jax.tree.structure(params)
    moved = [
        np.abs(np.asarray(a - b)).max()
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)
    ]
    assert len(moved) == 4
    assert min(moved) > 1e-3
