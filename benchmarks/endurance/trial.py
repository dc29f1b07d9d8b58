"""A small training run in a folder of its own, its processes, and what it came to."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from examples.moonlight.run_folder import metrics, seal
from examples.moonlight.run_folder.folder import CHECKPOINTS
from examples.moonlight.run_folder.storage import kept_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 10


class Trial:
    """A run in a folder of its own, of which every process is watched.

    Args:
      folder: made.
      shared: where the text and the caches lie that all runs share.
      processes: as how many it works.
    """

    def __init__(self, folder: Path, shared: Path, processes: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.run = folder / "run"
        self.checkpoints = self.run / CHECKPOINTS
        self.shared, self.processes = shared, processes
        self.newest = 0  # the newest step that was ever seen to be there, whole

    def start(self) -> "Process":
        """Starts the run, or goes on with it."""
        command = [
            *(sys.executable, "-m", "examples.moonlight.train", "--resume"),
            *("--output-dir", self.run, "--data", self.shared / "text.txt"),
            *("--cache-dir", self.shared / "corpus", "--steps", STEPS, "--batch-size", 2),
            *("--sequence-length", 32, "--eval-windows", 8, "--eval-every", EVERY),
            *("--checkpoint-every", EVERY, "--steps-per-call", 3),
            *(("--local-processes", self.processes) if self.processes > 1 else ()),
        ]
        return Process([str(part) for part in command], self)

    def look(self) -> None:
        """Takes down the newest checkpoint; by its name it is whole."""
        self.newest = max([self.newest, *kept_steps(self.checkpoints)])

    def finish(self, patience: float) -> "Process":
        """Goes on to the end."""
        process = self.start()
        process.wait(patience)
        return process


class Process:
    """One process of a run, with what it printed, and the checkpoints that were seen meanwhile."""

    def __init__(self, command: list[str], trial: Trial):
        self._trial = trial
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(trial.shared / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "COLUMNS": "1000",
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self._process.poll() is None:
            self._trial.look()
            time.sleep(0.005)

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None

    @property
    def text(self) -> str:
        """All that was printed."""
        self._log.seek(0)
        return self._log.read()

    @property
    def last_line(self) -> str:
        """What was printed last; empty where nothing was."""
        return next(iter(self.text.rstrip().splitlines()[-1:]), "")

    def wait(self, patience: float) -> int | None:
        """The exit code; None if it had to be killed after that many seconds."""
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None

    def wait_until(self, condition: Callable[[], bool], patience: float) -> None:
        """Waits for a condition, the end of the process, or for so many seconds."""
        deadline = time.monotonic() + patience
        while not condition() and not self.ended and time.monotonic() < deadline:
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Sends a signal."""
        self._process.send_signal(number)

    @property
    def children(self) -> list[int]:
        """The processes that it started and that run, by their numbers at the system; on Linux."""
        listed = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [*map(int, listed.read_text().split())] if listed.exists() else []


def whole_steps(trial: Trial) -> list[int]:
    """The checkpoints whose seals hold."""
    steps = []
    for step in kept_steps(trial.checkpoints):
        try:
            seal.check(trial.checkpoints / str(step))
        except seal.Damaged:
            continue
        steps.append(step)
    return steps


def outcome(trial: Trial) -> tuple[Any, ...]:
    """What a finished run came to: each loss of each step, and the bytes of its last checkpoint."""
    records = [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for kind in (metrics.TRAIN, metrics.VALIDATION)
        for record in metrics.read_metrics(trial.run / metrics.FILE, kind)
    ]
    results = json.loads((trial.run / "results.json").read_text())
    return records, results["final_val_loss"], results["best_val_loss"], weights(trial)


def weights(trial: Trial) -> list[bytes]:
    """The arrays of the last checkpoint: Orbax' own files hold names that are drawn anew."""
    folder = (trial.checkpoints / str(STEPS) / "model").absolute()
    with ocp.StandardCheckpointer() as orbax:
        # Without a target, what several processes wrote would be read by as many devices.
        place = SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            orbax.metadata(folder).item_metadata.tree,
        )
        restored = orbax.restore(folder, target)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)]
