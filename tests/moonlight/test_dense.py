"""The dense family: cached equals uncached, every execution equals plain, a tied head's gradient.

That it computes what Llama and Qwen2 compute is shown by `test_hf_transformers.py`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, ModelSharding, make_mesh
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import count_parameters, next_token_loss
from examples.moonlight.training.steps import TrainState, make_train_steps
from muon_jax import muon, routing_report

pytestmark = pytest.mark.one_stack

# Logits reach 27; measured 2.0e-5.
LOGITS_TOLERANCE = 1e-4
# float32 sums in another order: of the loss, measured 1.2e-7; of a gradient's largest
# entry, 2.6e-6.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 1e-5

# Every width differs from every other, so that no exchange of two goes unnoticed. Queries are
# wider than the stream.
TOY = DenseConfig(
    vocab_size=62,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=36,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=16,
    tie_word_embeddings=True,
    attention_bias=True,
)
# Programs that run once or twice are compiled fast, not well.
OPTIONS = {"xla_backend_optimization_level": 0}

TOKENS = np.random.default_rng(0).integers(0, TOY.vocab_size, (8, 13)).astype(np.int32)


def split(config: DenseConfig, execution: Execution | None = None) -> Any:
    """The model's graph, and weights that hide nothing: std 0.2, random gains and biases."""
    model = nnx.eval_shape(lambda: Dense(config, rngs=nnx.Rngs(0), execution=execution))
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
    assert not jax.tree.leaves(bias)
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        value = rng.standard_normal(leaf.shape)
        if "scale" in name:
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif "embedding" not in name:
            value *= 0.2
        return value.astype(np.float32)

    return graphdef, jax.tree_util.tree_map_with_path(draw, params), bias


class Computed(NamedTuple):
    loss: jax.Array
    logits: jax.Array
    grads: nnx.State
    stats: Any


def compute(execution: Execution | None = None) -> Computed:
    """Loss, logits and gradients of `TOKENS`, compiled once."""
    execution = execution or Execution()
    graphdef, params, bias = split(TOY, execution)

    def loss_fn(params, tokens_bt):
        model = nnx.merge(graphdef, params, bias)
        act_nd, stats = model.hidden(tokens_bt[:, :-1])
        return model.loss(act_nd, tokens_bt[:, 1:].reshape(-1)), (model.logits(act_nd), stats)

    sharding = execution.sharding
    params = jax.device_put(params, sharding.param_shardings(params))
    tokens = jax.device_put(TOKENS, sharding.place(BATCH_AXES))
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=OPTIONS)
    (loss, (logits, stats)), grads = run(params, tokens)
    return Computed(loss, logits.reshape(8, 12, -1), grads, stats)


@pytest.fixture(scope="module", name="plain")
def _plain() -> Computed:
    return compute()


def assert_same(found: Any, expected: Any, relative: float) -> None:
    """Leaf by leaf, to a share of the leaf's largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(jnp.abs(b).max())
        assert largest > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * largest)


# --- one model, run in many ways ------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        {"remat": True, "attention_block": 5, "loss_block": 7, "monitor": True},
        {"mesh": "data=2,fsdp=2,tensor=2"},
        {"mesh": "fsdp=2,expert=4", "unroll": True},
    ],
    ids=str,
)
def test_every_execution_computes_the_same(plain, run):
    mesh = run.pop("mesh", None)
    sharding = ModelSharding(None if mesh is None else make_mesh(mesh))
    found = compute(Execution(sharding=sharding, **run))
    assert float(found.loss) == pytest.approx(float(plain.loss), rel=LOSS_TOLERANCE)
    np.testing.assert_allclose(found.logits, plain.logits, rtol=0, atol=LOGITS_TOLERANCE)
    assert_same(found.grads, plain.grads, GRADIENT_TOLERANCE)
    assert_same(found.stats.max_logit_lh, plain.stats.max_logit_lh, GRADIENT_TOLERANCE)
    assert found.stats.load_le is None and found.stats.dropped_l is None
    monitored = (found.stats.hot_share_lh, found.stats.attention_rms_l, found.stats.mlp_rms_l)
    assert all((value is not None) == run.get("monitor", False) for value in monitored)


def test_cached_equals_uncached_for_ragged_rows(plain):
    """A prefill in chunks that end inside, at and behind the ends of prompts, then one by one."""
    graphdef, params, bias = split(TOY)
    model = nnx.merge(graphdef, params, bias)
    rows = TOKENS[:3, :-1]
    lengths, chunk = np.array([3, 4, 6]), 4

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def step(tokens_bt, cache, start_b):
        act_nd, cache = model.decode(tokens_bt, cache, start_b)
        return model.logits(act_nd).reshape(*tokens_bt.shape, -1), cache

    cache = model.init_cache(3, 12)
    assert {leaf.shape for leaf in cache} == {(3, 3, 12, 2, 10)}
    for start in (0, chunk):
        tokens = np.zeros((3, chunk), np.int32)  # what fills up rows is token 0, not the row's
        start_b = np.minimum(start, lengths)
        for row, (first, last) in enumerate(zip(start_b, lengths, strict=True)):
            part = rows[row, first : min(first + chunk, last)]
            tokens[row, : len(part)] = part
        logits, cache = step(tokens, cache, start_b)
        for row, (first, last) in enumerate(zip(start_b, lengths, strict=True)):
            there = min(chunk, last - first)
            np.testing.assert_allclose(
                logits[row, :there],
                plain.logits[row, first : first + there],
                rtol=0,
                atol=LOGITS_TOLERANCE,
            )
    while (lengths < rows.shape[1]).all():
        tokens = rows[np.arange(3), lengths][:, None]
        logits, cache = step(tokens, cache, lengths)
        expected = plain.logits[np.arange(3), lengths]
        np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=LOGITS_TOLERANCE)
        lengths = lengths + 1


# --- parameters -----------------------------------------------------------------------------------


def test_the_gradients_of_a_tied_matrix_add_up(plain):
    graphdef, params, bias = split(dataclasses.replace(TOY, tie_word_embeddings=False))
    tied = nnx.to_pure_dict(split(TOY)[1])
    nnx.replace_by_pure_dict(
        params, tied | {"lm_head": {"kernel": tied["embed"]["embedding"].T.copy()}}
    )

    def loss_fn(params):
        return next_token_loss(nnx.merge(graphdef, params, bias), jnp.asarray(TOKENS))[0]

    gradient = jax.jit(jax.grad(loss_fn), compiler_options=OPTIONS)
    grads, expected = (nnx.to_pure_dict(g) for g in (gradient(params), plain.grads))
    head_dv = grads.pop("lm_head")["kernel"]
    assert float(jnp.abs(head_dv).max()) > 0 and "lm_head" not in expected
    grads["embed"]["embedding"] += head_dv.T
    assert_same(grads, expected, GRADIENT_TOLERANCE)


def test_muon_trains_the_matrices_and_adamw_the_rest():
    params = split(dataclasses.replace(TOY, tie_word_embeddings=False))[1]
    rows = routing_report(params).rows
    routes = {tuple(row.path.split("/")): row.optimizer for row in rows}
    kernels = {path for path in routes if path[-1] == "kernel" and path[0] == "layers"}
    assert len(kernels) == 7 and len(routes) == 15
    assert {path for path, group in routes.items() if group == "muon"} == kernels


def test_sizes_are_those_of_the_formula():
    untied = dataclasses.replace(TOY, tie_word_embeddings=False)
    body = 3 * (32 * (60 + 20 + 20) + 100 + 60 * 32 + 3 * 32 * 36 + 2 * 32) + 32
    for config, tables in ((TOY, 1), (untied, 2)):
        counts = count_parameters(nnx.eval_shape(lambda c=config: Dense(c, rngs=nnx.Rngs(0))))
        assert counts == (body + tables * 62 * 32, body, body, 0)


def test_a_head_is_a_share_of_the_stream_unless_it_is_given():
    assert dataclasses.replace(TOY, head_dim=0, num_attention_heads=4).head_dim == 8


def test_the_training_steps_do_without_routers():
    graphdef, params, bias = split(TOY, Execution(monitor=True))
    optimizer = muon(3e-2)
    take = jax.jit(
        make_train_steps(graphdef, optimizer, lambda _: 3e-2, bias_rate=1e-3, monitor=True),
        compiler_options=OPTIONS,
    )
    state = TrainState(params, bias, optimizer.init(params))
    tokens_sabt = np.broadcast_to(TOKENS.reshape(2, 4, 13), (8, 2, 4, 13))
    state, measured, watched = take(state, tokens_sabt, jnp.int32(0), jnp.int32(8))
    losses = np.asarray(measured.loss)
    assert losses[-1] < losses[0] - 2 and (np.diff(losses) < 0).all()
    assert measured.max_violation is None and watched.stats.load_le is None
    assert not jax.tree.leaves(state.bias)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1, got 0"),
        ({"head_dim": -2}, "head_dim must be an integer >= 0, got -2"),
        ({"rope_theta": 0.0}, "rope_theta must be a positive finite number, got 0.0"),
        ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
        (
            {"num_key_value_heads": 4},
            r"num_key_value_heads \(4\) must divide num_attention_heads \(6\)",
        ),
        ({"head_dim": 0}, r"num_attention_heads \(6\) must divide hidden_size \(32\), or head_dim"),
        ({"head_dim": 5}, "head_dim must be even, because rope rotates pairs; got 5"),
    ],
)
def test_an_impossible_configuration_raises(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOY, **change)


@pytest.mark.parametrize(
    "change, run, message",
    [
        ({}, {"mesh": "tensor=4,data=2"}, "tensor = 4 does not divide num_key_value_heads = 2"),
        (
            {"intermediate_size": 35},
            {"mesh": "tensor=2,data=4"},
            "tensor = 2 does not divide intermediate_size = 35",
        ),
        ({"hidden_size": 36}, {"mesh": "fsdp=8"}, "fsdp = 8 does not divide hidden_size = 36"),
        (
            {},
            {"experts": "ragged", "expert_capacity": 1.5},
            r"expert_capacity is 1\.5, and a dense model has no experts",
        ),
    ],
)
def test_an_execution_that_does_not_fit_raises(change, run, message):
    mesh = run.pop("mesh", None)
    execution = Execution(sharding=ModelSharding(None if mesh is None else make_mesh(mesh)), **run)
    config = dataclasses.replace(TOY, **change)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Dense(config, rngs=nnx.Rngs(0), execution=execution))
