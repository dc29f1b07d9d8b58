"""Training as two processes: one's losses, whoever dies in between, and whoever goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.moonlight.common.processes.launcher import _free_port
from examples.moonlight.common.processes.watch import LOST
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.folder import CHECKPOINTS
from examples.moonlight.run_folder.storage import kept_steps
from examples.moonlight.train import train
from tests.checkers import relative_error
from tests.moonlight import toy

pytestmark = [pytest.mark.one_stack, pytest.mark.processes]

ROOT = Path(__file__).parents[2]
STEPS = 12

# Sums in another order, after twelve steps of Muon, which rounds its momentum to bfloat16: of the
# losses, and of each weight's norm (6.1e-3 was seen with JAX 0.12).
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-4, 1e-2

SETTINGS = {
    "steps": STEPS,
    "batch_size": 8,
    "eval_windows": 8,
    "steps_per_call": 2,
    "max_to_keep": 10,
}


def two_processes(folder: Path, *, hurt: str = "") -> list[subprocess.Popen[str]]:
    """Starts `--resume` as two processes, of one device each."""
    args = toy.arguments(folder, **SETTINGS)
    flags = {
        "--output-dir": args.output_dir,
        "--data": args.data[0],
        "--cache-dir": args.cache_dir,
        "--prompt": args.prompt,
        "--mesh": "data=2",
        "--coordinator": f"localhost:{_free_port()}",
        "--processes": 2,
    }
    for name in (*SETTINGS, "sequence_length", "eval_every", "checkpoint_every"):
        flags[f"--{name.replace('_', '-')}"] = getattr(args, name)
    command = [sys.executable, "-m", "tests.moonlight.toy_processes", "--resume"]
    command += [str(word) for pair in flags.items() for word in pair]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "1000",
        "HURT": hurt,
        # The time-out is asked for here: else each process finds out whether it may be.
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")
        + " --xla_cpu_collective_timeout_seconds=60",
    }
    return [
        subprocess.Popen(
            [*command, "--process", str(i)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def finish(started: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """The exit codes, what each printed, and their errors."""
    try:
        texts = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [p.returncode for p in started], [text[0] for text in texts], [text[1] for text in texts]


def records(folder: Path) -> list[dict]:
    lines = (folder / "run" / metrics.FILE).read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


def assert_close(ours: Path, theirs: Path) -> None:
    """Checks that two runs have the same losses and weights, to rounding."""
    for mine, other in zip(records(ours), records(theirs), strict=True):
        assert (mine["kind"], mine["step"]) == (other["kind"], other["step"])
        name = "loss" if "loss" in mine else "val_loss"
        assert abs(mine[name] - other[name]) < LOSS_TOLERANCE
    models = [toy.restore(folder / "run").model for folder in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) < WEIGHT_TOLERANCE


@pytest.fixture(scope="module", name="killed")
def _killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, of which the second died in the second save.

    `run` goes on in a test; `left` is a copy of how it was left.
    """
    folder = tmp_path_factory.mktemp("killed")
    codes, texts, errors = finish(two_processes(folder, hurt="1:SIGKILL:save"))
    assert codes == [LOST, -signal.SIGKILL], errors
    assert errors[0].splitlines()[-1] == "process 1 was lost: all processes end"
    assert [texts[1], errors[1]] == ["", ""]
    assert kept_steps(folder / "run" / CHECKPOINTS) == [4]
    shutil.copytree(folder / "run", folder / "left")
    return folder


def test_one_dies_in_a_save_and_another_mesh_goes_on_to_where_one_device_would_be(
    tmp_path: Path, killed: Path
):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    shutil.copytree(killed / "left", together / "run")
    data = (str(killed / "corpus.txt"),)  # as the run was told
    mesh = "data=4,tensor=2"
    train(toy.arguments(together, **SETTINGS, data=data, mesh=mesh, resume=True), toy.CONFIG)
    results = train(toy.arguments(alone, **SETTINGS), toy.CONFIG)
    assert_close(together, alone)
    assert results["meshes"] == {"1": "one device"}
    ours = json.loads((together / "run" / "results.json").read_text())
    assert ours["meshes"] == {"1": "data=2", "5": mesh}


def test_a_death_and_a_signal_to_one_and_the_same_go_on_bit_for_bit(tmp_path: Path, killed: Path):
    assert finish(two_processes(tmp_path))[0] == [0, 0]
    codes, texts, errors = finish(two_processes(killed, hurt="1:SIGTERM:5"))
    assert codes == [128 + signal.SIGTERM] * 2, errors
    assert "continuing after step 4" in texts[0] and texts[1] == ""
    assert texts[0].splitlines()[-1] == (
        "stopped after step 6; the same command with --resume goes on"
    )
    assert kept_steps(killed / "run" / CHECKPOINTS) == [4, 6]
    assert finish(two_processes(killed))[0] == [0, 0]
    assert records(killed) == records(tmp_path)
    toy.assert_same_state(killed / "run", tmp_path / "run")
