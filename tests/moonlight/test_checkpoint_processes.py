"""Two processes write their shards into one checkpoint, and read them on any mesh."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from examples.moonlight.run_folder import seal, storage
from tests.moonlight import checkpoint_worker as worker

pytestmark = [pytest.mark.one_stack, pytest.mark.processes]

TIMEOUT = 120  # seconds; about 12 are needed where nothing else runs
ROOT = Path(__file__).parents[2]


def run_processes(folder: Path, scene: str) -> list[tuple[int, str]]:
    """Runs a scene as two processes: the exit codes, and what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={worker.DEVICES}",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.moonlight.checkpoint_worker", address]
    logs = [folder / f"{scene}-{number}.log" for number in range(worker.PROCESSES)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, log in enumerate(logs):
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        [*command, str(number), str(folder), scene],
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=ROOT,
                    )
                )
        deadline = time.monotonic() + TIMEOUT
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (code, log.read_text(errors="replace")[-6000:])
        for code, log in zip(codes, logs, strict=True)
    ]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have restored what this one wrote, and saved what it reads."""
    folder = tmp_path_factory.mktemp("processes")
    with worker.opened(folder / "of_one") as (checkpoints, _):
        worker.save(checkpoints, 8, worker.make_mesh((1, 8)), 1.0)
    results = run_processes(folder, "whole_life")
    assert [code for code, _ in results] == [0, 0], "\n".join(text for _, text in results)
    return folder


def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(worker.PROCESSES)]


def test_one_process_goes_on_with_what_two_have_saved(folder: Path, tmp_path: Path):
    assert sorted(path.name for path in (folder / "of_two").iterdir()) == ["2"]
    shutil.copytree(folder / "of_two", tmp_path / "of_two")
    target = worker.placed(0, worker.make_mesh((4, 2)))
    with worker.opened(tmp_path / "of_two") as (checkpoints, _):
        restored = checkpoints.restore(model=target, optimizer=target)
    assert (restored.step, restored.progress) == (2, {"at": 2})
    # Of the moment of the save, whatever the steps behind it did to the same memory.
    for tree in (restored.model, restored.optimizer):
        worker.assert_holds(tree, 2)
        assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(
            lambda x: x.sharding, target
        )


def test_a_process_reads_and_digests_its_own(folder: Path):
    total = 2 * sum(x.nbytes for x in worker.values(0).values())
    for each in found(folder):
        # Two devices of four: half of the large array, which is in eight pieces.
        assert 0.45 * total < each["read"] < 0.6 * total
    first, second = ({*each["digested"]} for each in found(folder))
    assert not first & second
    assert all("process_1" in name for name in second)
    assert any("ocdbt.process_1/d/" in name for name in second)
    sealed = seal.read_seal(folder / "of_two" / "2")["files"]
    assert {f".saving-2/{name}" for name in sealed} <= first | second
    assert {*storage.files(folder / "of_two" / "2")} == {*sealed, storage.SEAL}


def test_damage_is_every_process_s(folder: Path):
    first, second = (each["said"] for each in found(folder))
    assert "The checkpoint of step 4 is damaged: model/ocdbt.process_1/d/" in first
    assert "Going back to step 3" in first
    assert second == ""


def test_what_one_process_alone_cannot_see_is_no_damage(folder: Path):
    for each in found(folder):
        assert "OSError" in each["hidden"]
        assert "process 1 finds that x is missing, and process 0 does not" in each["hidden"]
    first, second = (each["apart"] for each in found(folder))
    assert first.startswith("ElsewhereFailed: process 1: process 1 does not see what process 0")
    assert "where all hosts see the same folder" in first
    assert second.startswith("RuntimeError: process 1 does not see what process 0 wrote")


def test_the_first_process_enters_a_run_for_all(folder: Path):
    for number, each in enumerate(found(folder)):
        assert "steps is 0 in process 0 and 1 in process 1" in each["settings"]
        assert each["run"] == "entered"
        name = "FileExistsError: " if number == 0 else "ElsewhereFailed: process 0: "
        assert each["again"].startswith(name)
    assert json.loads((folder / "run" / "settings.json").read_text()) == {"steps": 1}


def test_a_process_that_dies_in_a_save_leaves_what_was_there(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "of_two", tmp_path / "of_two")
    (_, log), (code, _) = run_processes(tmp_path, "one_fails")
    assert code == -signal.SIGKILL, log
    for number in range(worker.PROCESSES):
        failed, steps, kept = json.loads((tmp_path / f"failed-{number}.json").read_text())
        assert failed.startswith("ThreadsLeft: the checkpoint of step 6 could not be written")
        assert steps == kept == [2, 5]
    assert storage.kept_steps(tmp_path / "of_two") == [2, 5]
    with worker.opened(tmp_path / "of_two") as (checkpoints, _):
        target = worker.placed(0, worker.make_mesh((1, 8)))
        restored = checkpoints.restore(model=target, optimizer=target)
    assert restored.step == 5
    worker.assert_holds(restored.model, 5)
    assert sorted(path.name for path in (tmp_path / "of_two").iterdir()) == ["2", "5"]
