"""Numbers that are not finite: never saved, named by step, and left out if the user says so."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.storage import kept_steps
from examples.moonlight.train import train
from examples.moonlight.training import loop, steps
from examples.moonlight.training.nonfinite import Skipped, guard, unwrap, wrap
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

# A token that only the tests' own batches hold.
POISON = 299
TOKENS = np.random.default_rng(0).integers(0, POISON, (3, 1, 2, 17)).astype(np.int32)


@pytest.fixture(autouse=True)
def _poisonous(monkeypatch):
    """The loss of a batch whose first token is POISON is NaN, and so are its gradients."""
    real = steps.next_token_loss

    def loss(model, tokens_bt):
        value, stats = real(model, tokens_bt)
        return value * jnp.where(tokens_bt[0, 0] == POISON, jnp.nan, 1.0), stats

    monkeypatch.setattr(steps, "next_token_loss", loss)


def assert_same(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_update_that_is_left_out_changes_nothing():
    schedule = optax.constant_schedule(0.5)
    optimizer = guard(optax.sgd(schedule, momentum=0.9), "skip")
    graphdef, state = toy.split(toy.CONFIG, optimizer)
    take = jax.jit(
        steps.make_train_steps(graphdef, optimizer, schedule, bias_rate=1e-3, on_nonfinite="skip")
    )
    poisoned = TOKENS.copy()
    poisoned[1, 0, 0, 0] = POISON
    ours, measured, _ = take(state, poisoned, 0, 3)
    theirs, _, _ = take(state, TOKENS[[0, 2, 1]], 0, 2)
    inner, skipped = unwrap(ours.opt_state)
    assert skipped == Skipped(total=1, in_a_row=0)
    assert_same((ours.params, ours.bias, inner), (*theirs[:2], unwrap(theirs.opt_state)[0]))
    assert measured.grads_finite.tolist() == [True, False, True]
    assert measured.state_finite.all()
    assert unwrap(take(state, poisoned, 0, 2)[0].opt_state)[1] == Skipped(total=1, in_a_row=1)


def test_what_a_checkpoint_holds_does_not_depend_on_the_choice():
    params = {"w": jnp.ones((4, 3))}
    plain = optax.adamw(1.0)
    state = plain.init(params)
    assert wrap(state, "stop", Skipped()) is state
    wrapped = wrap(state, "skip", Skipped(total=5, in_a_row=2))
    reference = guard(plain, "skip").init(params)
    assert jax.tree.structure(wrapped) == jax.tree.structure(reference)
    assert [x.dtype for x in jax.tree.leaves(wrapped)] == [
        x.dtype for x in jax.tree.leaves(reference)
    ]
    inner, skipped = unwrap(wrapped)
    assert inner is state and skipped == (5, 2)
    _, after = guard(plain, "skip").update({"w": jnp.full((4, 3), jnp.inf)}, wrapped, params)
    assert unwrap(after)[1] == (6, 3)


@pytest.fixture(name="poison_step")
def _poison_step(monkeypatch):
    """Puts POISON in front of the batches of some steps, counted from 1."""
    poisoned: set[int] = set()
    real = loop.Run._call

    def call(self, state, step, count, buffer_sabt):
        take = self.programs.train_steps

        def poison(state, tokens_sabt, *rest):
            tokens_sabt = tokens_sabt.copy()
            for i in range(count):
                if step + i + 1 in poisoned:
                    tokens_sabt[i, 0, 0, 0] = POISON
            return take(state, tokens_sabt, *rest)

        programs = self.programs._replace(train_steps=poison)
        copy = loop.dataclasses.replace(self, programs=programs)
        return real(copy, state, step, count, buffer_sabt)

    monkeypatch.setattr(loop.Run, "_call", call)
    return poisoned


def lines(run: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (run / metrics.FILE).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_run_stops_before_it_saves_and_goes_on_without_the_update(tmp_path: Path, poison_step):
    run = tmp_path / "run"
    poison_step.add(6)
    arguments = functools.partial(toy.arguments, tmp_path, max_to_keep=1, checkpoint_every=2)
    message = r"step 6: the gradient is not finite \(loss nan, .*of step 4, is finite: .*--on-nonf"
    with pytest.raises(FloatingPointError, match=message) as error:
        train(arguments(), toy.CONFIG)
    assert f"--branch-from {run}@4 --learning-rate" in str(error.value)
    assert kept_steps(run / "checkpoints") == [4]
    failed = lines(run)[-1]
    assert (failed["step"], failed["loss"], failed["finite"]) == (6, None, False)
    # What was advised goes on.
    results = train(arguments(resume=True, on_nonfinite="skip"), toy.CONFIG)
    assert results["skipped_updates"] == 1
    assert math.isfinite(results["final_val_loss"])
    recorded = [line for line in lines(run) if line["kind"] == "train"]
    assert [line["step"] for line in recorded] == list(range(1, 13))
    assert [line["step"] for line in recorded if line.get("finite") is False] == [6]


def test_many_in_a_row_end_a_run_that_leaves_them_out(tmp_path: Path, poison_step, monkeypatch):
    poison_step.update(range(5, 13))
    monkeypatch.setattr(loop, "MOST_IN_A_ROW", 4)
    message = "step 8: the gradients of the last 4 steps were not finite, and were left out"
    with pytest.raises(FloatingPointError, match=message) as error:
        train(toy.arguments(tmp_path, on_nonfinite="skip"), toy.CONFIG)
    assert "--on-nonfinite skip" not in str(error.value)  # that is what was done
    assert kept_steps(tmp_path / "run" / "checkpoints") == [4]


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, on_nonfinite: str):
    # Beyond float32: the weights after the first update are not finite, its loss is.
    message = "step 1: the gradient is finite, and the weights or moments after it are not"
    args = toy.arguments(
        tmp_path,
        learning_rate=1e25,
        weight_decay=1e20,
        warmup_steps=0,
        checkpoint_every=1,
        on_nonfinite=on_nonfinite,
    )
    with pytest.raises(FloatingPointError, match=message):
        train(args, toy.CONFIG)
    assert not kept_steps(tmp_path / "run" / "checkpoints")


def test_a_validation_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch):
    real = loop.compile_programs

    def compile_programs(*args, **kwargs):
        programs = real(*args, **kwargs)
        return programs._replace(validate=lambda *_: jnp.full(2, jnp.nan))

    monkeypatch.setattr("examples.moonlight.train.compile_programs", compile_programs)
    with pytest.raises(FloatingPointError, match="step 4: the validation loss is not finite"):
        train(toy.arguments(tmp_path), toy.CONFIG)
    assert not kept_steps(tmp_path / "run" / "checkpoints")
