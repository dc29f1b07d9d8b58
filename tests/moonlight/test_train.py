"""Training end to end at toy size: outputs, resumption, settings, accumulation, refusals."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from rich.console import Console

from examples.moonlight import generate
from examples.moonlight.common.files import write_atomically
from examples.moonlight.model.language_model import ModelStats, merge_stats, next_token_loss
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.storage import kept_steps
from examples.moonlight.train import train
from examples.moonlight.training import steps as training_steps
from examples.moonlight.training.steps import StepMetrics, make_train_steps
from tests.moonlight import toy

# Of a run whose experts have no capacity.
MEASURED = [name for name in StepMetrics._fields if name != "dropped_share"]
RECORDED = [name for name in MEASURED if not name.endswith("_finite")]

ROOT = Path(__file__).resolve().parents[2]

# Sums of float32 gradients in another order; measured 2e-7.
ACCUMULATION_TOLERANCE = 2e-6


@pytest.fixture(scope="module", name="finished")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished toy run; its run is in `run`."""
    folder = tmp_path_factory.mktemp("finished")
    train(toy.arguments(folder), toy.CONFIG)
    return folder


def records(run: Path) -> list[dict]:
    """Every record of a run but its speed."""
    lines = (run / metrics.FILE).read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


def test_a_run_leaves_everything_it_promises(finished: Path):
    run = finished / "run"
    steps = metrics.read_metrics(run / metrics.FILE, metrics.TRAIN)
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        "kind",
        "step",
        "tokens",
        "tokens_per_second",
        *RECORDED,
    }
    assert all(np.isfinite(list(record.values())[1:]).all() for record in steps)
    validations = metrics.read_metrics(run / metrics.FILE, metrics.VALIDATION)
    assert [record["step"] for record in validations] == [4, 8, 12]

    results = json.loads((run / "results.json").read_text())
    assert results["final_val_loss"] == validations[-1]["val_loss"]
    assert results["best_val_loss"] == min(record["val_loss"] for record in validations)
    assert results["final_val_loss_per_byte"] < results["final_val_loss"]
    assert results["tokens"] == 12 * 2 * 16
    assert results["settings"]["corpus"]
    assert results["sample"].startswith("line ")
    assert matplotlib.image.imread(run / "loss.png").std() > 0.05
    assert list((run / "tensorboard").iterdir())


def test_training_learns(finished: Path):
    losses = [
        record["loss"] for record in metrics.read_metrics(finished / "run" / metrics.FILE, "train")
    ]
    assert losses[0] == pytest.approx(np.log(300), abs=0.1)
    assert losses[-1] < losses[0] - 0.1


def test_a_finished_run_is_only_drawn_again(finished: Path):
    run = finished / "run"
    before = (run / "results.json").read_bytes(), (run / metrics.FILE).read_bytes()
    (run / "loss.png").unlink()
    results = train(toy.arguments(finished, resume=True), toy.CONFIG)
    assert results == json.loads(before[0])
    assert ((run / "results.json").read_bytes(), (run / metrics.FILE).read_bytes()) == before
    assert (run / "loss.png").stat().st_size > 5000


def test_a_run_killed_after_its_last_checkpoint_gets_its_results(finished: Path):
    run = finished / "run"
    before = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    again = train(toy.arguments(finished, resume=True), toy.CONFIG)
    for name in ("final_val_loss", "best_val_loss", "sample", "tokens", "settings", "meshes"):
        assert again[name] == before[name]


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path: Path, finished: Path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "run" / "settings.json", run)
    recorded = (finished / "run" / metrics.FILE).read_text().splitlines(keepends=True)
    (run / metrics.FILE).write_text("".join(recorded[:2]) + recorded[2][:9])
    train(toy.arguments(tmp_path, resume=True), toy.CONFIG)
    assert records(run) == records(finished / "run")


def test_both_optimizers_train(tmp_path: Path, finished: Path, capsys):
    train(toy.arguments(tmp_path, optimizer="adamw", compute_dtype="bfloat16"), toy.CONFIG)
    losses = [record["loss"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    said = capsys.readouterr().out
    # What is said is what is drawn: a mean of steps, of which there are fewer than 25 here.
    assert f"step     12  training {np.mean(losses):.4f}  validation " in said
    assert f"training loss {np.mean(losses):.4f} nats per token, the mean of the last 12" in said
    muon_step, adamw_step = records(finished / "run")[0], records(tmp_path / "run")[0]
    assert muon_step["loss"] == pytest.approx(adamw_step["loss"], abs=0.01)
    # Adam's first update is sign(g) wherever the gradient is not tiny; Muon's RMS is 0.2.
    assert 0.8 < adamw_step["update_rms_muon"] <= 1.1
    assert muon_step["update_rms_muon"] == pytest.approx(0.2, rel=0.2)
    assert muon_step["update_rms_adam"] == pytest.approx(adamw_step["update_rms_adam"], rel=0.05)


@pytest.fixture(name="start")
def _start(tmp_path: Path) -> Iterator[Callable[[Path, int], subprocess.Popen]]:
    """Starts toy runs, and ends those that a failing test leaves behind."""
    # One compilation for all processes; every one of them would otherwise wait seconds for its own.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device" not in f),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes: list[subprocess.Popen] = []

    def start(folder: Path, steps: int) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, toy.__file__, str(folder), str(steps)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def kill_when(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before it was killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.one_stack
def test_a_killed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path, start):
    steps = 42
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        toy.write_corpus(folder / "corpus.txt")
    run = killed / "run"
    checkpoints = run / "checkpoints"

    def saving() -> bool:
        """Whether a checkpoint is half-written, its steps are recorded, and an earlier is whole."""
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        return 0 < sum(name.isdecimal() for name in names) < len(names)

    process = start(killed, steps)
    deadline = time.monotonic() + 240
    while not saving():
        assert process.poll() is None, f"ended before it was killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    recorded = metrics.read_metrics(run / metrics.FILE, metrics.TRAIN)[-1]["step"]
    assert recorded > kept_steps(checkpoints)[-1]

    process = start(killed, steps)
    train(toy.to_be_killed(whole, steps), toy.CONFIG)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert records(run) == records(whole / "run")
    train_steps = [record["step"] for record in records(run) if record["kind"] == "train"]
    assert train_steps == list(range(1, steps + 1))
    # Two micro-batches a step: the position counts batches.
    assert toy.restore(run).progress["data"] == {"next_index": 2 * steps}
    toy.assert_same_state(run, whole / "run")


@pytest.fixture(scope="module", name="program")
def _program() -> tuple[Callable, Callable]:
    """Steps of up to four micro-batches, from a state; and from any."""
    schedule = optax.constant_schedule(0.5)
    optimizer = optax.sgd(schedule, momentum=0.9)
    graphdef, state = toy.split(toy.CONFIG, optimizer)

    def bias_rate(step: jax.Array) -> jax.Array:
        return jnp.where(step < 2, 1e-3, 0.0)

    steps = jax.jit(make_train_steps(graphdef, optimizer, schedule, bias_rate=bias_rate))
    return functools.partial(steps, state), steps


TOKENS = np.random.default_rng(0).integers(0, 300, (3, 4, 2, 17)).astype(np.int32)
ALL = np.full(3, 4, np.int32)


def assert_same(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_is_traced_once_for_a_program(monkeypatch):
    traced = []

    def counted(*args):
        traced.append(args)
        return next_token_loss(*args)

    monkeypatch.setattr(training_steps, "next_token_loss", counted)
    optimizer = optax.sgd(0.5)
    graphdef, state = toy.split(toy.CONFIG, optimizer)
    steps = make_train_steps(graphdef, optimizer, optax.constant_schedule(0.5), bias_rate=0.0)
    jax.eval_shape(steps, state, TOKENS, 0, 3, ALL)
    assert len(traced) == 1


def test_accumulated_micro_batches_equal_one_batch(program):
    take, _ = program
    parts, parts_metrics, _ = take(TOKENS, 0, 3, ALL)
    whole, whole_metrics, _ = take(TOKENS.reshape(3, 1, 8, 17), 0, 3)
    for ours, theirs in zip(
        jax.tree.leaves((parts.params, parts.opt_state, parts_metrics)),
        jax.tree.leaves((whole.params, whole.opt_state, whole_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=ACCUMULATION_TOLERANCE)
    # Loads are counted over the whole step and the bias moves once, in the steps that have a rate.
    assert_same(parts.bias, whole.bias)
    (bias,) = jax.tree.leaves(parts.bias)
    assert 0 < jnp.abs(bias).max() <= 2 * 2e-3


def test_calls_of_any_length_and_batch_compute_the_same_bits(program):
    take, steps = program
    micro = np.array([4, 2, 4], np.int32)
    once, measured, _ = take(TOKENS, 0, 3, micro)
    first_state, first, _ = take(TOKENS, 0, 1, micro)
    rest = np.roll(TOKENS, -1, axis=0)
    rest[0, 2:] = 7  # micro-batches that are not taken
    twice, second, _ = steps(first_state, rest, 1, 2, np.roll(micro, -1))
    assert_same(twice, once)
    for name in MEASURED:
        a, b, both = (getattr(m, name) for m in (first, second, measured))
        np.testing.assert_array_equal(jnp.concatenate([a[:1], b[:2]]), both)
    assert (first.loss[1:] == 0).all()
    # A step of two micro-batches is the mean of what each is alone, and the maximum.
    _, pair, _ = take(TOKENS, 0, 1, 2 * ALL // 4)
    alone = [take(np.roll(TOKENS, -i, axis=1), 0, 1, ALL // 4)[1] for i in range(2)]
    assert pair.loss[0] == pytest.approx(np.mean([one.loss[0] for one in alone]), rel=1e-6)
    assert pair.max_attention_logit[0] == max(one.max_attention_logit[0] for one in alone)
    assert steps._cache_size() <= 2


def test_statistics_are_those_of_the_micro_batches_that_were_taken():
    def stats(*values: float) -> np.ndarray:
        return np.array(values, np.float32)[:, None, None]

    merged = merge_stats(
        ModelStats(
            load_le=stats(3, 4, 0).astype(np.int32),
            dropped_l=None,
            max_logit_lh=stats(-3, -5, 0),
            hot_share_lh=stats(0.5, 0.25, 0),
            attention_rms_l=stats(3, 4, 0),
            mlp_rms_l=None,
        ),
        2,
    )
    taken = [None if x is None else x.item() for x in merged]
    assert taken == [7, None, -3, 0.375, pytest.approx(np.sqrt(12.5)), None, None]


def test_an_occupied_folder_needs_resume(finished: Path):
    with pytest.raises(FileExistsError, match="is not empty: continue that run with --resume"):
        train(toy.arguments(finished), toy.CONFIG)


def test_a_folder_that_holds_no_run_is_left_alone(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds files but no settings\.json"):
        train(toy.arguments(tmp_path, resume=True), toy.CONFIG)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer was 'muon' and is now 'adamw'"),
        ({"muon_heads": "per_head"}, "muon_heads was 'joint' and is now 'per_head'"),
        ({"learning_rate": 0.5}, "learning_rate was 0.004 and is now 0.5"),
        ({"steps": 13}, "steps was 12 and is now 13"),
        ({"seed": 1, "data_seed": 2}, "data_seed was 0 and is now 2; seed was 0 and is now 1"),
        ({"preset": "small", "learning_rate": 4e-3}, "preset was 'tiny' and is now 'small'"),
    ],
)
def test_a_run_resumes_only_with_its_own_settings(finished: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        train(toy.arguments(finished, resume=True, **changes), toy.CONFIG)


def test_a_run_from_before_heads_had_a_setting_is_resumed(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "older")
    path = tmp_path / "older" / "run" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("muon_heads") == "joint" and settings.pop("muon_heads_per_group") is None
    path.write_text(json.dumps(settings))
    again = train(toy.arguments(tmp_path / "older", resume=True), toy.CONFIG)
    assert again == json.loads((finished / "run" / "results.json").read_text())


def test_a_run_resumes_only_with_its_own_text_and_model(finished: Path, tmp_path: Path):
    corpus = tmp_path / "other.txt"
    corpus.write_text((finished / "corpus.txt").read_text() + "one line more\n")
    with pytest.raises(ValueError, match=r"corpus was '[0-9a-f]{16}' and is now"):
        train(toy.arguments(finished, resume=True, data=(str(corpus),)), toy.CONFIG)
    wider = dataclasses.replace(toy.CONFIG, intermediate_size=48)
    with pytest.raises(ValueError, match=r"config was .* and is now"):
        train(toy.arguments(finished, resume=True), wider)


def test_the_same_text_elsewhere_and_other_intervals_may_resume(finished: Path, tmp_path: Path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes((finished / "corpus.txt").read_bytes())
    again = train(
        toy.arguments(finished, resume=True, data=(str(corpus),), eval_every=5), toy.CONFIG
    )
    assert again == json.loads((finished / "run" / "results.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive, got nan"),
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"max_to_keep": 0}, "--max-to-keep must be positive, got 0"),
        ({"seed": 2**32}, r"--seed must be less than 2\*\*32, got 4294967296"),
        ({"qk_clip_threshold": 50.0}, "is muonclip's, and --optimizer is muon: give --optimizer"),
        ({"muon_heads": "groups"}, "--muon-heads-per-group N go together: give both"),
        ({"muon_heads_per_group": 2}, "--muon-heads-per-group N go together: give both"),
        (
            {"muon_heads": "groups", "muon_heads_per_group": 3},
            "3 does not divide the 2 query heads",
        ),
        ({"muon_heads": "per_head", "optimizer": "adamw"}, "adamw trains without Muon"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative, got -0.1"),
        ({"warmup_steps": 12}, r"--warmup-steps \(12\) must be fewer than --steps \(12\)"),
        ({"prompt": ""}, "the prompt has 0 tokens"),
        ({"sequence_length": 200_000}, "fewer than one window of 200000"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        train(toy.arguments(tmp_path, **changes), toy.CONFIG)
    assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_the_sample_is_what_the_command_writes(finished: Path):
    run = finished / "run"
    args = generate.Args(run, prompt=("line ",), max_length=16, prefill_chunk=1)
    [text] = generate.generate(args, Console(file=io.StringIO()))
    assert "line " + text == json.loads((run / "results.json").read_text())["sample"]


def test_the_command_line_speaks(tmp_path: Path):
    command = [sys.executable, "-m", "examples.moonlight.train"]
    helped = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0
    flags = (
        "--preset --optimizer --learning-rate --weight-decay --warmup-steps --steps --batch-size "
        "--sequence-length --gradient-accumulation --compute-dtype --seed --eval-every "
        "--checkpoint-every --max-to-keep --output-dir --data --resume --data-seed --experts"
    )
    assert all(flag in helped.stdout for flag in flags.split())
