"""One run against an ordinary training loop, and against itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.moonlight.data.batches import Span, train_batches, validation_windows
from examples.moonlight.model.language_model import next_token_loss
from examples.scaling_law.models import make_model
from examples.scaling_law.protocol import STEPS_PER_CALL, VALIDATION_WINDOWS, Run
from examples.scaling_law.training import learning_rates, train
from muon_jax import MultiHead, muon
from tests.scaling_law.small import RUN, make_corpus

pytestmark = pytest.mark.one_stack

CORPUS = make_corpus()

# Measured: 2e-7 for AdamW. bfloat16 Newton-Schulz rounds at a change of the last float32 bit.
SAME_LOSS = {"adamw": 2e-6, "muon": 2e-4}


def without_seconds(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "seconds"}


def ordinary_loss(run: Run, optimizer: optax.GradientTransformation) -> float:
    """The final loss of a loop as users write it, with the rate inside of the optimizer."""
    model = make_model(run, jax.random.key(run.seed))
    graphdef, params = nnx.split(model)
    state = optimizer.init(params)

    def loss_fn(params: nnx.State, tokens_bt: jax.Array) -> jax.Array:
        return next_token_loss(nnx.merge(graphdef, params), tokens_bt)[0]

    @jax.jit
    def step(params: nnx.State, state, tokens_bt: jax.Array):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, tokens_bt), state, params)
        return optax.apply_updates(params, updates), state

    batches = train_batches(
        {"": CORPUS.study.train},
        [Span(1, {"": 1.0})],
        sequence_length=run.sequence_length,
        batch_size=run.batch,
        seed=run.seed,
    )
    for _ in range(run.steps):
        params, state = step(params, state, jnp.asarray(next(batches), jnp.int32))
    windows = validation_windows(
        {"": CORPUS.study.validation.astype(np.int32)},
        sequence_length=run.sequence_length,
        batch_size=32,
        count=VALIDATION_WINDOWS,
    )[""]
    return float(np.mean([jax.jit(loss_fn)(params, tokens_bt) for tokens_bt in windows]))


@pytest.mark.parametrize(
    ("name", "per_group"), [("adamw", None), ("muon", None), ("muon", 1)], ids=str
)
def test_a_run_is_an_ordinary_training_with_a_schedule(name: str, per_group: int | None):
    run = RUN.replace(optimizer=name, heads_per_group=per_group)
    heads = "joint" if per_group is None else {"self_attn": MultiHead(heads=2, head_dim=4)}
    rates = jnp.asarray(learning_rates(run))
    optimizers = {
        "adamw": optax.adamw(lambda step: rates[step], b1=0.9, b2=0.95, weight_decay=0.1),
        "muon": muon(lambda step: rates[step], weight_decay=0.1, heads=heads),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizers[name])
    record = train(run, CORPUS)
    assert record["val_loss"] == pytest.approx(ordinary_loss(run, optimizer), abs=SAME_LOSS[name])
    assert record["val_loss"] < np.log(256) - 1


def test_the_same_run_is_the_same_record_and_another_seed_is_not():
    first, again = (train(RUN, CORPUS) for _ in range(2))
    other = train(RUN.replace(seed=1), CORPUS)
    assert without_seconds(first) == without_seconds(again)
    assert other["val_loss"] != first["val_loss"]
    assert other["curve"][0] != first["curve"][0]


def test_optimizers_start_from_the_same_weights_and_data():
    curves = [train(RUN.replace(optimizer=name), CORPUS)["curve"] for name in ("adamw", "muon")]
    assert curves[0][0] == curves[1][0]
    assert curves[0][-1] != curves[1][-1]


def test_tuning_runs_read_the_tuning_files():
    swapped = CORPUS._replace(tuning=CORPUS.study, study=CORPUS.tuning)
    study, tuning = train(RUN, CORPUS), train(RUN.replace(part="tuning"), swapped)
    assert tuning["val_loss"] == study["val_loss"]
    assert train(RUN.replace(part="tuning"), CORPUS)["val_loss"] != study["val_loss"]


def test_every_option_of_muon_changes_the_run():
    changes = (
        {},
        {"update_rms": 0.4},
        {"scale": "baseline"},
        {"scale": "update_norm"},
        {"ns_steps": 1},
        {"ns_coeffs": "dion"},
        {"muon_too": ("embed",)},
        {"weight_decay": 0.0},
    )
    run = RUN.replace(layers=1, head_dim=16, tokens=20 * 2 * 16)
    found = [train(run.replace(**change), CORPUS) for change in changes]
    losses = [record["val_loss"] for record in found]
    assert len(set(losses)) == len(changes)


def test_update_norm_has_the_update_rms_that_it_aims_at():
    # Decay adds to what Muon returns: weights of 0.02 and a decay of 0.1 add 1% at most.
    run = RUN.replace(scale="update_norm", update_rms=0.4, weight_decay=0.0)
    assert train(run, CORPUS)["update_rms"]["muon"] == pytest.approx(0.4, rel=1e-3)


def test_what_is_watched_is_measured_on_the_way():
    run = RUN.replace(watch=2, family="moe", part="distinct")
    record = train(run, CORPUS)
    assert record["epochs"] == round(run.trained_tokens / len(CORPUS.distinct.train), 4)
    first, last = record["watched"]
    assert (first["step"], last["step"]) == (STEPS_PER_CALL, run.steps)
    assert last["val_loss"] == record["val_loss"]
    assert last["svd_entropy"] == record["svd_entropy"]
    assert first["svd_entropy"].keys() >= {"Router", "Experts", "SharedExperts"}
    assert len(last["mlp_rms"]) == run.layers
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_a_run_that_diverges_has_no_loss():
    record = train(RUN.replace(optimizer="adamw", learning_rate=1e38), CORPUS)
    assert record["val_loss"] is None and record["curve"][-1] is None
    json.dumps(record, allow_nan=False)


def test_the_rate_rises_from_the_first_step_and_falls_to_a_tenth():
    run = RUN.replace(tokens=200 * 2 * 16, learning_rate=1.0)
    rates = learning_rates(run)
    assert len(rates) == 200
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == 1.0 and (np.diff(rates[10:]) < 0).all()
    place = 189 / 190
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * place)) / 2
    assert rates[-1] == pytest.approx(expected, rel=1e-5)


def test_more_than_four_epochs_are_refused():
    run = RUN.replace(tokens=4 * len(CORPUS.study.train) + 2000)
    with pytest.raises(ValueError, match=r"read the 4,000 bytes .* 4\.\d times.*--data"):
        train(run, CORPUS)
