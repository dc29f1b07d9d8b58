"""A fine-tuning of two processes: stopped together, gone on with by one, merged by two."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.finetune import export, sft
from examples.finetune.args import Args
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.storage import kept_steps
from tests.finetune import sft_processes, sft_toy

pytestmark = [pytest.mark.one_stack, pytest.mark.processes]

ROOT = Path(__file__).parents[2]

# Of this process, but for its devices.
FLAGS = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "device" not in f)

# What Muon's bfloat16 makes of sums in another order, as where a batch is split.
TOLERANCE = 1e-3


def start(program: str, *words: object) -> subprocess.CompletedProcess:
    """Two processes of one device each."""
    return subprocess.run(
        [sys.executable, "-m", program, *map(str, words), "--local_processes", "2"],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FLAGS,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "1000",
        },
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def words(args: Args) -> list[str]:
    """The flags in which arguments differ from the defaults."""
    flags = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value != field.default and field.name != "processes":
            flags += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def losses(run: Path) -> list[float]:
    """Of every step, and of every validation."""
    kinds = ((metrics.TRAIN, "loss"), (metrics.VALIDATION, "val_loss"))
    return [
        record[name]
        for kind, name in kinds
        for record in metrics.read_metrics(run / metrics.FILE, kind)
    ]


def test_they_stop_at_one_step_and_one_goes_on(tmp_path: Path):
    """The signal comes to the second process, and the first saves; losses are those of one."""
    ask = sft_toy.arguments(tmp_path, split_dataset_ratio=0.2)
    whole = dataclasses.replace(
        ask,
        output_dir=tmp_path / "whole",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
    )
    sft.finetune(whole)
    run = ask.output_dir
    ended = start("tests.finetune.sft_processes", *words(ask))
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert f"stopped after step {sft_processes.STOPPED};" in ended.stdout.splitlines()[-1]
    assert kept_steps(run, "checkpoint-") == [2, sft_processes.STOPPED]
    sft.finetune(dataclasses.replace(whole, output_dir=run, resume_from_checkpoint=run))
    np.testing.assert_allclose(losses(run), losses(tmp_path / "whole"), rtol=TOLERANCE)

    one = export.Args(run / "checkpoint-3", merge_lora=True, output_dir=tmp_path / "one")
    export.export(one)
    asked = ("--adapters", run / "checkpoint-3", "--merge_lora", "true", "--mesh", "tensor=2")
    ended = start("examples.finetune.export", *asked, "--output_dir", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
