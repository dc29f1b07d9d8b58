"""Heads split out of kernels of two axes, on a mesh: the bits of one device, wherever it cuts.

Four devices of a tensor axis hold whole query heads (8) and halves of key heads (2); of two axes,
two devices each, the first leaves key heads whole and the second cuts their columns. Each head is
of Hadamard rows, so that all sums are exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from muon_jax import GroupedQuery, muon, opt_state_shardings, split_heads
from tests.checkers import hadamard_rows

pytestmark = pytest.mark.bits

D, HEADS, KV, WIDTH, LAYERS = 32, 8, 2, 8, 2
COUNTS = {"q_proj": HEADS, "k_proj": KV, "v_proj": KV, "o_proj": HEADS}
STRUCTURE = {"attn": GroupedQuery(heads=HEADS, kv_heads=KV, head_dim=WIDTH)}
# Powers of two, so that nothing is rounded where XLA fuses products with sums.
KEYWORDS = {"weight_decay": 2.0**-3, "update_scale": lambda fan_in, fan_out: 0.25}


def kernels(seed):
    """Kernels of two axes, and what they are when every head has an axis of its own."""
    flat, apart = {}, {}
    for number, (name, count) in enumerate(COUNTS.items()):
        heads = hadamard_rows((LAYERS, count, D, WIDTH), seed + number)
        if name == "o_proj":
            heads = heads.swapaxes(2, 3)
            flat[name] = {"kernel": heads.reshape(LAYERS, count * WIDTH, D)}
        else:
            heads = heads.swapaxes(1, 2)
            flat[name] = {"kernel": heads.reshape(LAYERS, D, count * WIDTH)}
        apart[name] = {"kernel": heads}
    return {"layers": {"attn": flat}}, {"layers": {"attn": apart}}


def train(tx, params, gradients):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for factor in (1.0, 0.5, 2.0):
        updates, state = update(jax.tree.map(lambda g, f=factor: g * f, gradients), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


@functools.cache
def alone(per_group):
    """Three steps on one device."""
    tx = muon(2.0**-4, heads=split_heads(STRUCTURE, per_group), **KEYWORDS)
    params, _ = train(tx, *(jax.tree.map(jnp.asarray, kernels(seed)[0]) for seed in (0, 10)))
    return jax.tree.map(np.asarray, params)


def test_heads_split_by_hand_have_the_same_bits():
    tx = muon(2.0**-4, heads="per_head", **KEYWORDS)
    params, _ = train(tx, *(jax.tree.map(jnp.asarray, kernels(seed)[1]) for seed in (0, 10)))
    for expected, actual in zip(jax.tree.leaves(params), jax.tree.leaves(alone(1)), strict=True):
        np.testing.assert_array_equal(actual, np.asarray(expected).reshape(actual.shape))


def sharded(lengths, names, axes, kind):
    mesh = jax.make_mesh(lengths, names, axis_types=(kind,) * len(lengths))
    specs = {
        name: {"kernel": P(None, axes) if name == "o_proj" else P(None, None, axes)}
        for name in COUNTS
    }
    return mesh, {"layers": {"attn": specs}}


@pytest.mark.parametrize(
    ("lengths", "names", "axes", "kind", "per_group"),
    [
        ((2, 4), ("data", "tensor"), "tensor", AxisType.Auto, 1),
        ((2, 4), ("data", "tensor"), "tensor", AxisType.Explicit, 4),
        ((2, 2, 2), ("data", "a", "b"), ("b", "a"), AxisType.Auto, 1),
        ((8,), ("tensor",), "tensor", AxisType.Auto, 2),
        ((8,), ("data",), None, AxisType.Auto, 1),
    ],
)
def test_a_mesh_has_the_bits_of_one_device(lengths, names, axes, kind, per_group):
    mesh, specs = sharded(lengths, names, axes, kind)
    tx = muon(
        2.0**-4,
        heads=split_heads(STRUCTURE, per_group),
        mesh=mesh,
        param_specs=specs,
        **KEYWORDS,
    )
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    params, gradients = (jax.device_put(kernels(seed)[0], shardings) for seed in (0, 10))
    params, state = train(tx, params, gradients)
    for actual, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(alone(per_group)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(actual), expected)
    for x, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(opt_state_shardings(tx, params)), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    # The state is shaped as the parameters are, and shared out over all devices.
    assert {x.shape for x in jax.tree.leaves(state) if x.ndim} == {
        x.shape for x in jax.tree.leaves(params)
    }
    assert all(
        x.addressable_shards[0].data.size * 8 == x.size for x in jax.tree.leaves(state) if x.ndim
    )
