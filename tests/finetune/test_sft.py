"""Fine-tuning end to end at toy size: outputs, resumption, what is trained, refusals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from examples.finetune.args import Args
from examples.finetune.base import digest
from examples.finetune.checkpoint import find_checkpoint
from examples.finetune.data.sources import hold_out, load_conversations
from examples.finetune.lora.adapters import DropoutKey
from examples.finetune.sft import finetune, main
from examples.finetune.training import loop
from examples.finetune.training.job import make_job
from examples.finetune.training.learner import make_learner
from examples.finetune.training.steps import Frozen, make_validate
from examples.finetune.training.texts import load_texts
from examples.finetune.tuned import open_checkpoint, read_adapters
from examples.moonlight.huggingface.pretrained import load_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.reading import read_folder
from examples.moonlight.run_folder.storage import kept_steps
from examples.moonlight.training.stopping import Stopped
from muon_jax import routing_report
from tests.finetune import sft_toy
from tests.moonlight.hf_toy import FAMILIES

# Where a run has a process of its own: as here, on one device.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device" not in f),
}

# Sums of float32 losses and gradients in another order; measured 7e-8.
SPLIT_TOLERANCE = 1e-6

# A step of bfloat16, in which Muon's update is rounded; measured 4e-3.
SPLIT_WEIGHTS = 2e-2

# What such steps make of the losses and gradients after them; measured 9e-5.
LATER_TOLERANCE = 1e-3


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished toy run with LoRA; its run is in `run`."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(sft_toy.arguments(folder, split_dataset_ratio=0.2, save_total_limit=2, eval_steps=3))
    return folder


@pytest.fixture(name="during")
def _during(monkeypatch) -> Callable[[int, Callable[[], object]], None]:
    """Has something happen while a run takes a step."""
    events: dict[int, Callable[[], object]] = {}
    real = loop.Run._step

    def step(self, state, step):
        if step + 1 in events:
            events.pop(step + 1)()
        return real(self, state, step)

    monkeypatch.setattr(loop.Run, "_step", step)
    return events.__setitem__


def records(run: Path) -> list[dict]:
    """Every record of a run but its speed."""
    lines = (run / metrics.FILE).read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if record["kind"] == metrics.TRAIN]


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Checks that two checkpoints hold the same files of weights and of optimizer state."""
    trees = [digest(read_adapters(find_checkpoint(path), Execution())) for path in (ours, theirs)]
    assert trees[0] == trees[1]


def test_a_run_leaves_everything_it_promises(whole: Path):
    run = whole / "run"
    steps = metrics.read_metrics(run / metrics.FILE, metrics.TRAIN)
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert all(np.isfinite(list(record.values())[1:]).all() for record in steps)
    validations = metrics.read_metrics(run / metrics.FILE, metrics.VALIDATION)
    assert [record["step"] for record in validations] == [2, 3, 4, 6]
    results = json.loads((run / "results.json").read_text())
    losses = {record["step"]: record["val_loss"] for record in validations}
    lowest = min(losses, key=losses.__getitem__)
    assert results["best"] == {"step": lowest, "val_loss": losses[lowest]}
    best = min((2, 4, 6), key=losses.__getitem__)  # of those that are saved
    assert results["last_model_checkpoint"] == str(run / "checkpoint-6")
    assert results["best_model_checkpoint"] == str(run / f"checkpoint-{best}")
    assert len(kept_steps(run, "checkpoint-")) == 2
    assert {6, best} <= {*kept_steps(run, "checkpoint-")}
    assert matplotlib.image.imread(run / "loss.png").std() > 0.05
    assert list((run / "tensorboard").iterdir())


def test_args_json_holds_every_argument_and_the_model(whole: Path):
    text = (whole / "run" / "args.json").read_text()
    assert (whole / "run" / "checkpoint-6" / "args.json").read_text() == text
    found = json.loads(text)
    asked = sft_toy.arguments(whole, split_dataset_ratio=0.2, save_total_limit=2, eval_steps=3)
    for name, value in dataclasses.asdict(asked).items():
        if name not in ("torch_dtype", "processes"):
            assert found[name] == json.loads(json.dumps(value, default=str)), name
    assert found["torch_dtype"] == "float32"
    assert found["base"]["folder"] == str((whole / "qwen2").resolve())


def test_a_checkpoint_holds_the_adapters_and_their_state_alone(whole: Path):
    folder = whole / "run" / "checkpoint-6"
    job = make_job(sft_toy.arguments(whole, output_dir=whole / "other"))
    learner = make_learner(job, 6)
    paths = jax.tree_util.tree_leaves_with_path(learner.abstract.params)
    assert all(
        "lora_a" in (name := jax.tree_util.keystr(path)) or "lora_b" in name for path, _ in paths
    )
    # Momentum of Muon: one number for each of the factors'.
    assert sum(x.size for x in jax.tree.leaves(learner.abstract.opt_state)) < 1.1 * learner.trained
    adapters = read_adapters(find_checkpoint(folder), Execution())
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == learner.trained
    assert learner.trained < 0.3 * learner.counts.total
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adapters))


def test_the_validation_is_of_the_model_that_is_decoded(whole: Path):
    """Adapters merged, and nothing dropped."""
    job = make_job(sft_toy.arguments(whole, split_dataset_ratio=0.2, output_dir=whole / "other"))
    rows = load_texts(job, Console(quiet=True)).validation
    opened = open_checkpoint(find_checkpoint(whole / "run" / "checkpoint-6"), Execution())
    frozen = Frozen(nnx.State({}), nnx.State({}), opened.bias)
    sums = jax.jit(make_validate(opened.graphdef))(opened.params, frozen, rows)
    [*_, last] = metrics.read_metrics(whole / "run" / metrics.FILE, metrics.VALIDATION)
    assert last["val_loss"] == pytest.approx(float(sums.loss / sums.weight), rel=1e-6)
    assert last["val_token_acc"] == pytest.approx(float(sums.hits / sums.weight))
    # Every answer's tokens count, its end among them, and nothing else.
    assert float(sums.weight) == sum(
        len(answer) + 1
        for conversation in held_out(job)
        for role, answer in conversation.messages
        if role == "assistant"
    )


def held_out(job):
    loaded = load_conversations(job.args.dataset, seed=job.args.data_seed)
    return hold_out(loaded.conversations, job.args.split_dataset_ratio, seed=job.args.data_seed)[1]


def test_dropout_differs_by_step_and_micro_batch():
    keys = nnx.State({"key": DropoutKey(jax.random.key_data(jax.random.key(0))[None])})
    frozen = Frozen(keys, nnx.State({}), nnx.State({}))
    found = {
        tuple(np.ravel(*jax.tree.leaves(frozen.at(jnp.int32(step), jnp.int32(micro)).dropout)))
        for step in range(3)
        for micro in range(3)
    }
    assert len(found) == 9


def test_a_stopped_run_goes_on_the_same(tmp_path: Path, whole: Path, during):
    shutil.copytree(whole / "qwen2", tmp_path / "qwen2")
    ask = sft_toy.arguments(tmp_path, split_dataset_ratio=0.2, save_total_limit=2, eval_steps=3)
    during(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"^stopped after step 3$"):
        finetune(ask)
    run = tmp_path / "run"
    assert kept_steps(run, "checkpoint-") == [2, 3]
    finetune(dataclasses.replace(ask, resume_from_checkpoint=run))
    assert records(run) == records(whole / "run")
    assert_same_checkpoint(run / "checkpoint-6", whole / "run" / "checkpoint-6")


def test_a_run_goes_back_to_a_checkpoint_and_ends_the_same(tmp_path: Path, whole: Path):
    for name in ("qwen2", "run"):
        shutil.copytree(whole / name, tmp_path / name)
    run = tmp_path / "run"
    first = kept_steps(run, "checkpoint-")[0]
    again = finetune(
        sft_toy.arguments(
            tmp_path,
            split_dataset_ratio=0.2,
            save_total_limit=2,
            eval_steps=3,
            resume_from_checkpoint=run / f"checkpoint-{first}",
        )
    )
    assert records(run) == records(whole / "run")
    assert again["last_model_checkpoint"] == str(run / "checkpoint-6")


@pytest.mark.one_stack
def test_a_killed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path, whole: Path):
    shutil.copytree(whole / "qwen2", tmp_path / "qwen2")
    sft_toy.write_sums(tmp_path / "sums.jsonl")
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "examples.finetune.sft", "--model", tmp_path / "qwen2"),
        *("--dataset", tmp_path / "sums.jsonl", "--split_dataset_ratio", "0.2"),
        *("--output_dir", run, "--gradient_accumulation_steps", "4", "--learning_rate", "1e-3"),
        *("--max_steps", "6", "--save_steps", "2", "--save_total_limit", "2", "--unroll", "false"),
        *("--eval_steps", "3"),
    ]
    # What the first process compiled the second one loads.
    environment = ENVIRONMENT | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        # While the second checkpoint is written: steps are recorded that none has yet.
        while not (kept_steps(run, "checkpoint-") and [*run.glob(".saving-*")]):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "results.json").exists()
    again = [*map(str, command), "--resume_from_checkpoint", str(run)]
    subprocess.run(again, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert kept_steps(run, "checkpoint-") == kept_steps(whole / "run", "checkpoint-")
    np.testing.assert_array_equal(losses_of(run), losses_of(whole / "run"))


def test_other_settings_are_refused_with_both_values(whole: Path):
    ask = sft_toy.arguments(
        whole, split_dataset_ratio=0.2, lora_rank=4, resume_from_checkpoint=whole / "run"
    )
    with pytest.raises(ValueError, match=r"lora_rank was 8 and is now 4\. Ask for the same"):
        finetune(ask)
    other = sft_toy.write_sums(whole / "other.jsonl", 41)
    with pytest.raises(ValueError, match=r"data was '[0-9a-f]{16}' and is now '[0-9a-f]{16}'"):
        finetune(dataclasses.replace(ask, lora_rank=8, dataset=(str(other),)))


def test_a_finished_run_is_only_shown_again(whole: Path):
    run = whole / "run"
    before = (run / "results.json").read_bytes(), (run / metrics.FILE).read_bytes()
    finetune(
        sft_toy.arguments(whole, split_dataset_ratio=0.2, resume_from_checkpoint=whole / "run")
    )
    assert ((run / "results.json").read_bytes(), (run / metrics.FILE).read_bytes()) == before


def test_adapters_do_not_meet_another_base(tmp_path: Path, whole: Path, during):
    shutil.copytree(whole / "qwen2", tmp_path / "qwen2")
    ask = sft_toy.arguments(tmp_path, max_steps=2, save_steps=1)
    during(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        finetune(ask)
    sft_toy.replace_weights(tmp_path / "qwen2", "qwen2", seed=1)
    with pytest.raises(ValueError, match="the adapters were trained beside the weights"):
        finetune(dataclasses.replace(ask, resume_from_checkpoint=tmp_path / "run"))


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_in_full_everything_is_trained_but_the_routers_bias(tmp_path: Path, optimizer: str):
    # One layer of experts behind the dense one, and a threshold that every head is above.
    options = "qk_clip_tau=1e-3" if optimizer == "muonclip" else None
    ask = sft_toy.arguments(
        tmp_path,
        "deepseek_v3",
        tuner_type="full",
        optimizer=optimizer,
        optim_args=options,
        max_steps=2,
        packing=True,
        max_length=64,
    )
    finetune(ask)
    _, params, bias = load_pretrained(tmp_path / "deepseek_v3")
    model = read_folder(tmp_path / "run" / "checkpoint-2", {"params": params, "router_bias": bias})
    logits = [record["max_attention_logit"] for record in records(tmp_path / "run")]
    # A step of QK-Clip brings them down to the threshold.
    assert (logits[1] < 0.1 * logits[0]) == (optimizer == "muonclip")
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), model["params"], params)
    assert all(jax.tree.leaves(changed))
    for ours, theirs in zip(*map(jax.tree.leaves, (model["router_bias"], bias)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_every_split_of_a_batch_gives_the_same_update(tmp_path: Path):
    """Of samples of unequal lengths, so that micro-batches count unequally many tokens."""

    def trained(micro: int, accumulation: int):
        ask = sft_toy.arguments(
            tmp_path,
            output_dir=tmp_path / f"{micro}x{accumulation}",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            lora_dropout=0.0,
            max_steps=3,
        )
        finetune(ask)
        measured = [(record["loss"], record["grad_norm"]) for record in records(ask.output_dir)]
        checkpoint = find_checkpoint(ask.output_dir)
        return measured, jax.tree.leaves(read_adapters(checkpoint, Execution()))

    (measured, first), *others = (trained(*split) for split in ((1, 16), (4, 4), (16, 1)))
    for other, weights in others:
        np.testing.assert_allclose(measured[0], other[0], rtol=SPLIT_TOLERANCE)
        np.testing.assert_allclose(measured, other, rtol=LATER_TOLERANCE)
        for a, b in zip(first, weights, strict=True):
            np.testing.assert_allclose(a, b, atol=SPLIT_WEIGHTS * np.abs(a).max())


def test_a_mesh_has_the_losses_of_one_device(tmp_path: Path):
    """Of adapters beside attention, a dense MLP and shared experts, and of routed experts."""
    losses = []
    for name, changes in {
        "one": {"per_device_train_batch_size": 4},
        "mesh": {"mesh": "data=2,expert=2,tensor=2"},
    }.items():
        ask = sft_toy.arguments(
            tmp_path,
            "deepseek_v3",
            output_dir=tmp_path / name,
            lora_dropout=0.0,
            learning_rate=1e-4,
            max_steps=3,
            **changes,
        )
        finetune(ask)
        losses.append([record["loss"] for record in records(ask.output_dir)])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=SPLIT_TOLERANCE)
    np.testing.assert_allclose(losses[0], losses[1], rtol=LATER_TOLERANCE)


def test_each_factor_is_a_matrix_and_a_may_go_to_adamw(tmp_path: Path):
    for options, group in ((None, "muon"), ("lora_a=adamw", "adam")):
        ask = sft_toy.arguments(tmp_path, "deepseek_v3", optim_args=options)
        learner = make_learner(make_job(ask), 6)
        report = routing_report(
            learner.abstract.params, muon_weight_dimension_numbers=learner.roles
        )
        assert len(report.rows) == 28
        for row in report.rows:
            assert row.optimizer == (group if "lora_a" in row.path else "muon"), row
            stacked = 2 if row.path.startswith("layers") else 1
            assert row.optimizer == "adam" or row.matrices[0] == (stacked, *row.shape[-2:]), row


def test_a_resumed_run_stays_with_the_step_of_its_base(tmp_path: Path):
    base = tmp_path / "pretrained"
    for step in (4, 8):
        (base / "checkpoints" / str(step)).mkdir(parents=True)
    config = dataclasses.asdict(FAMILIES["deepseek_v3"])
    (base / "settings.json").write_text(json.dumps({"config": config}))
    ask = Args(model=str(base), output_dir=tmp_path / "run")
    assert make_job(ask).base.checkpoint == 8
    (tmp_path / "run").mkdir()
    record = {"base": {"folder": str(base.resolve()), "checkpoint": 4}}
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    asked = dataclasses.replace(ask, resume_from_checkpoint=tmp_path / "run")
    assert make_job(asked).base.checkpoint == 4


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, message in (
        ([], "no --model is given, and the small one that `make train` makes is not in runs/"),
        (["--model", "Qwen/Qwen2.5-7B-Instruct"], "`hf download Qwen/Qwen2.5-7B-Instruct --local"),
        (["--model", "there", "--lora_rnak", "3"], "did you mean --lora_rank?"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
