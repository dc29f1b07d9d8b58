"""Whole models, by the libraries that people build them with: a golden table for each."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from muon_jax import by_use, muon
from tests.use.use_programs import data, ids, mean_square, read, verdicts

IN_OUT, HEADS_OUT, HEADS_IN = ((0,), (1,)), ((0,), (1, 2)), ((0, 1), (2,))
B, T, D, V = 2, 7, 12, 9


def module_roles(make, *batch, loss=None):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return read(loss or (lambda model, *batch: mean_square(model(*batch))), model, *batch)


class Transformer(nnx.Module):
    def __init__(self, rngs, heads=4):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((T, D)))
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, 3 * D, rngs=rngs)
        self.down = nnx.Linear(3 * D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x) + self.position[...][None]
        x = x + self.attention(self.norm(x))
        x = x + self.dropout(self.down(nnx.gelu(self.up(self.norm(x)))))
        return self.head(x)


TRANSFORMER = {
    "attention/key/bias": "elementwise",
    "attention/key/kernel": HEADS_OUT,
    "attention/out/bias": "vector",
    "attention/out/kernel": HEADS_IN,
    "attention/query/bias": "elementwise",
    "attention/query/kernel": HEADS_OUT,
    "attention/value/bias": "elementwise",
    "attention/value/kernel": HEADS_OUT,
    "down/bias": "vector",
    "down/kernel": IN_OUT,
    "embed/embedding": "embedding",
    "head/bias": "vector",
    "head/kernel": "head",
    "norm/bias": "vector",
    "norm/scale": "vector",
    "position": "elementwise",
    "up/bias": "vector",
    "up/kernel": IN_OUT,
}


def test_nnx_transformer():
    assert module_roles(Transformer, ids(B, T)) == TRANSFORMER


def test_nnx_optimizer_takes_what_a_module_was_read_as():
    """Its parameters are wrapped in one way in `init` and in another in `update`."""
    tokens = jnp.zeros((B, T), jnp.int32)

    def loss(model, tokens):
        return mean_square(model(tokens))

    def step():
        model = Transformer(nnx.Rngs(0))
        roles = by_use(loss, model, tokens)
        tx = muon(1e-3, muon_weight_dimension_numbers=roles)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx.grad(loss)(model, tokens))
        return nnx.state(optimizer)

    assert jax.eval_shape(step)


class Vision(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.group_norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.grouped = nnx.Conv(8, 12, (1, 1), feature_group_count=4, rngs=rngs)
        self.up = nnx.ConvTranspose(12, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.classify = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.batch_norm(self.stem(x)))
        x = self.grouped(nnx.relu(self.group_norm(self.depthwise(x))))
        return self.classify(nnx.relu(self.up(x)).mean((1, 2)))


def test_nnx_convolutions():
    found = module_roles(Vision, data(B, 8, 8, 3))
    matrices = {name: role for name, role in found.items() if not name.endswith(("bias", "scale"))}
    assert matrices == {
        "stem/kernel": ((0, 1, 2), (3,)),
        "depthwise/kernel": "elementwise",
        "grouped/kernel": ((2,), 3, (3, 3, 3, 3)),
        "up/kernel": ((0, 1, 2), (3,)),
        "classify/kernel": "head",
    }
    assert {found[name] for name in found if name not in matrices} == {"vector"}


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(D, D, rngs=rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.tanh(layer(x))

        return self.head(run(x, self.layers))


def test_nnx_scan():
    assert module_roles(Scanned, data(B, D)) == {
        "layers/kernel": ((1,), (2,)),
        "layers/bias": "elementwise",
        "head/kernel": "head",
        "head/bias": "vector",
    }


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell])
def test_nnx_recurrent_cells(cell):
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(cell(D, 8, rngs=rngs))
            self.head = nnx.Linear(8, V, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x))

    found = module_roles(Recurrent, data(B, T, D))
    kernels = {role for name, role in found.items() if name.endswith("kernel") and "rnn" in name}
    assert kernels == {IN_OUT}
    assert found["head/kernel"] == "head"


def test_nnx_low_rank_adapters():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs)
            self.head = nnx.Linear(D, V, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.tanh(self.layer(x)))

    found = module_roles(Adapted, data(B, D))
    assert [role for name, role in found.items() if not name.endswith("bias")] == [
        "head", IN_OUT, IN_OUT, IN_OUT,
    ]  # fmt: skip


# --- Linen ----------------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(nn.Dense(3 * D)(nn.RMSNorm()(x)))), None


class Linen(nn.Module):
    axis: int | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D)
        x = embed(tokens)
        block = nn.remat(Block) if self.remat else Block
        if self.axis is None:
            for _ in range(2):
                x, _ = block()(x)
        else:
            stack = nn.scan(
                block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
            )
            x, _ = stack(name="blocks")(x, None)
        x = nn.Conv(D, (3,))(x)
        return embed.attend(x)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_linen_transformer(axis, remat):
    model = Linen(axis, remat)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, T), jnp.int32))

    def loss(params, tokens):
        return mean_square(model.apply({"params": params}, tokens))

    found = read(loss, variables["params"], ids(B, T))

    def moved(*axes):
        return tuple(a + (axis is not None and a >= axis) for a in axes)

    expected = {
        "query/kernel": (moved(0), moved(1, 2)),
        "key/kernel": (moved(0), moved(1, 2)),
        "value/kernel": (moved(0), moved(1, 2)),
        "out/kernel": (moved(0, 1), moved(2)),
        "Dense_0/kernel": (moved(0), moved(1)),
        "Dense_1/kernel": (moved(0), moved(1)),
        "Conv_0/kernel": ((0, 1), (2,)),
        "Embed_0/embedding": "embedding",
    }
    kernels = {name: r for name, r in found.items() if name.endswith(("kernel", "embedding"))}
    assert len(kernels) == (14 if axis is None else 8)
    for name, role in kernels.items():
        assert role == expected["/".join(name.split("/")[-2:])], name
    rest = {r for name, r in found.items() if name not in kernels}
    assert rest == {"vector", "elementwise"}


# --- Equinox and Haiku ----------------------------------------------------------------------------


def test_equinox():
    model = eqx.nn.MLP(D, 5, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x):
        return mean_square(jax.vmap(eqx.combine(params, static))(x))

    found = verdicts(by_use(loss, params, data(B, D)))
    kernels = [role for name, role in found.items() if name.endswith("weight")]
    assert kernels == [((1,), (0,)), ((1,), (0,)), "head"]


def test_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 5])(x)))
    params = model.init(jax.random.key(0), jnp.ones((B, D)))
    found = read(lambda p, x: mean_square(model.apply(p, x)), params, data(B, D))
    assert [role for name, role in found.items() if name.endswith("w")] == [IN_OUT, "head"]


@pytest.mark.parametrize("core", [hk.VanillaRNN, hk.LSTM, hk.GRU])
def test_haiku_recurrent_cores(core):
    def apply(x):
        core_ = core(8)
        y, _ = hk.dynamic_unroll(core_, x, core_.initial_state(B), time_major=False)
        return hk.Linear(V)(y)

    model = hk.without_apply_rng(hk.transform(apply))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((B, T, D)))
    found = read(lambda p, x: mean_square(model.apply(p, x)), params, data(B, T, D))
    assert found.pop("linear/w") == "head"
    matrices = [role for name, role in found.items() if "/b" not in name]
    assert matrices and {*matrices} == {IN_OUT}


@pytest.mark.parametrize("cell", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_equinox_recurrent_cells(cell):
    key = jax.random.key(0)
    params, static = eqx.partition(
        (cell(D, 8, key=key), eqx.nn.Linear(8, V, key=key)), eqx.is_inexact_array
    )

    def loss(params, x):
        cell, head = eqx.combine(params, static)

        def step(state, x):
            state = jax.vmap(cell)(x, state)
            return state, state[0] if isinstance(state, tuple) else state

        start = jnp.zeros((B, 8))
        start = (start, start) if isinstance(cell, eqx.nn.LSTMCell) else start
        _, y = jax.lax.scan(step, start, x.swapaxes(0, 1))
        return mean_square(jax.vmap(jax.vmap(head))(y))

    found = verdicts(by_use(loss, params, data(B, T, D)))
    assert found["0/weight_ih"] == found["0/weight_hh"] == ((1,), (0,))
    assert found["1/weight"] == "head"


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        down = nn.relu(nn.Conv(8, (3, 3), 2)(x))
        low = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3), 2)(down)))
        up = nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2))(low))
        up = nn.ConvTranspose(6, (2, 2), (2, 2))(jnp.concatenate([up, down], axis=-1))
        return nn.Conv(3, (1, 1))(jnp.concatenate([nn.relu(up), x], axis=-1))


def test_linen_unet():
    model, window = UNet(), ((0, 1, 2), (3,))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((B, 8, 8, 3)))["params"]
    found = read(lambda p, x: mean_square(model.apply({"params": p}, x)), params, data(B, 8, 8, 3))
    assert {name: role for name, role in found.items() if name.endswith("kernel")} == {
        "Conv_0/kernel": window,
        "Conv_1/kernel": window,
        "ConvTranspose_0/kernel": window,
        "ConvTranspose_1/kernel": window,
        "Conv_2/kernel": "head",
    }
