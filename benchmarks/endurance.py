"""Hurt a training run, and count what it lost: `python -m benchmarks.endurance`.

A small run of the Moonlight example is killed at random moments of its whole life (imports,
compilation, steps, saving, results), its newest checkpoint is damaged, it is started twice, its
disk fills up. After each, what is there is compared with what was there, and every run is taken to
its end and compared, bit for bit, with one that nothing happened to.

Counted are four faults, of which none should be: lost (less than the newest whole checkpoint that
was seen is left), silent (the program ended without saying why, or how to go on), hung (it did not
end), and different (it ended with other losses or weights than the run that nothing happened to).
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.damage import DAMAGE
from benchmarks.harness import environment, write_json
from examples.moonlight.run_folder import metrics, seal
from examples.moonlight.run_folder.checkpoint import CHECKPOINTS, kept_steps

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 60, 10
FAULTS = ("lost", "silent", "hung", "different")

# How a process is ended: each signal in its turn, with seconds between.
ENDINGS = {
    "SIGKILL": [signal.SIGKILL],
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Kills, damages, doubles and starves a training run.

    Attributes:
      kills: at how many random moments a process is ended.
      seed: of the moments.
      patience: seconds after which a process that should have ended counts as hung.
      disk: whether to fill a disk, and make one read-only, which takes Linux and root.
      output: where the JSON goes.
    """

    kills: int = 25
    seed: int = 0
    patience: float = 120.0
    disk: bool = True
    output: Path = Path("runs/benchmarks/endurance.json")


class Trial:
    """A run in a folder of its own, of which every process is watched.

    Args:
      folder: made.
      shared: where the text and the caches lie that all runs share.
    """

    def __init__(self, folder: Path, shared: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.run = folder / "run"
        self.checkpoints = self.run / CHECKPOINTS
        self.shared = shared
        self.newest = 0  # the newest step that was ever seen to be there, whole

    def start(self) -> "Process":
        """Starts the run, or goes on with it."""
        command = [
            *(sys.executable, "-m", "examples.moonlight.train", "--resume"),
            *("--output-dir", self.run, "--data", self.shared / "text.txt"),
            *("--cache-dir", self.shared / "corpus", "--steps", STEPS, "--batch-size", 2),
            *("--sequence-length", 32, "--eval-windows", 8, "--eval-every", EVERY),
            *("--checkpoint-every", EVERY, "--steps-per-call", 3),
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
    restored = ocp.StandardCheckpointer().restore(
        (trial.checkpoints / str(STEPS) / "model").absolute()
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)]


class Report:
    """What happened, and what of it was a fault.

    Args:
      folder: where the runs lie; what is taken down does not name it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.rows: list[dict[str, Any]] = []

    def add(self, group: str, what: str, faults: list[str], note: str) -> None:
        """Takes down one trial."""
        note = note.replace(f"{self._folder}/", "")
        self.rows.append({"group": group, "what": what, "faults": faults, "note": note})

    def table(self) -> Table:
        """How often each thing was done, and how often each fault came of it."""
        table = Table(title="what a run was put through, and how often it failed", box=None)
        for column in ("", "times", *FAULTS):
            table.add_column(column, justify="left" if not column else "right")
        for group in dict.fromkeys(row["group"] for row in self.rows):
            rows = [row for row in self.rows if row["group"] == group]
            count = Counter(fault for row in rows for fault in row["faults"])
            table.add_row(group, str(len(rows)), *(str(count[fault]) for fault in FAULTS))
        return table

    @property
    def faults(self) -> list[dict[str, Any]]:
        """The trials that had one."""
        return [row for row in self.rows if row["faults"]]


def kill(args: Args, folder: Path, reference: tuple[Any, ...], life: float, report: Report) -> None:
    """Ends processes at random moments; each run that comes to its end is compared."""
    draw = random.Random(args.seed)
    trial, runs = Trial(folder / "killed-0", folder), 0
    for i in track(range(args.kills), description="killing"):
        name = [*ENDINGS][i % len(ENDINGS)]
        moment = draw.uniform(0, life)
        process = trial.start()
        process.wait_until(lambda p=process, m=moment: time.monotonic() - p.started > m, life)
        before = process.text.rstrip().splitlines()[-1:] or ["(nothing printed yet)"]
        ended = process.ended
        for number in [] if ended else ENDINGS[name]:
            process.send(number)
            time.sleep(draw.uniform(0, 0.5) if len(ENDINGS[name]) > 1 else 0)
        code = process.wait(args.patience)
        faults = ["hung"] if code is None else []
        if max(whole_steps(trial), default=0) < trial.newest:
            faults.append("lost")
        # Before the program's first line it has begun nothing, and has no handlers either.
        begun = "corpus" in process.text
        says = "goes on" in process.last_line or "nothing left to train" in process.text
        done = (trial.run / "results.json").exists()
        if name != "SIGKILL" and begun and not says and not done:
            faults.append("silent")
        if name in ("SIGTERM", "SIGINT") and "stopped after step" in process.last_line:
            said = int(process.last_line.split("step ")[1].split(";")[0].split(",")[0])
            faults += ["lost"] if max(whole_steps(trial), default=0) < said else []
        note = f"{moment:.1f} s, step {trial.newest}, exit {code}; {before[0].strip()[:60]}"
        report.add(f"ended by {name}", name, faults, note)
        if done:
            _compare(trial, reference, report, "runs that were killed until their end")
            runs += 1
            trial = Trial(folder / f"killed-{runs}", folder)
    trial.finish(args.patience)
    _compare(trial, reference, report, "runs that were killed until their end")


def damage(args: Args, folder: Path, reference: tuple[Any, ...], report: Report) -> None:
    """Damages the newest checkpoint in every way, and goes on."""
    source = Trial(folder / "stopped", folder)
    process = source.start()
    process.wait_until(lambda: source.newest >= 3 * EVERY, args.patience)
    process.send(signal.SIGKILL)
    process.wait(args.patience)
    for kind in track(DAMAGE, description="damaging"):
        trial = Trial(folder / f"damaged: {kind}", folder)
        shutil.copytree(source.run, trial.run)
        older, newest = kept_steps(trial.checkpoints)[-2:]
        for step in kept_steps(trial.checkpoints)[:-2]:
            shutil.rmtree(trial.checkpoints / str(step))
        DAMAGE[kind](trial.checkpoints / str(newest))
        process = trial.finish(args.patience)
        faults = []
        if f"The checkpoint of step {newest} is damaged" not in process.text:
            faults.append("silent")
        if f"continuing after step {older}" not in process.text:
            faults.append("lost")
        faults += _different(trial, reference)
        line = [line for line in process.text.splitlines() if "is damaged" in line][:1]
        report.add("newest checkpoint damaged", kind, faults, *line or [""])


def start_twice(args: Args, folder: Path, reference: tuple[Any, ...], report: Report) -> None:
    """Starts a second process on the folder of one that is under way, and paused meanwhile.

    On a fast machine it would else have ended before the second has imported anything.
    """
    trial = Trial(folder / "twice", folder)
    first = trial.start()
    first.wait_until(lambda: trial.newest > 0, args.patience)
    first.send(signal.SIGSTOP)
    second = trial.start()
    code = second.wait(args.patience)
    first.send(signal.SIGCONT)
    faults = [] if code and "is in use by process" in second.last_line else ["silent"]
    faults += ["hung"] if code is None or first.wait(args.patience) != 0 else []
    faults += _different(trial, reference)
    report.add("started twice", "a second --resume", faults, second.last_line)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[str], None]]:
    """Mounts a disk of a few megabytes; yields what changes its options."""
    folder.mkdir(parents=True)

    def mount(options: str) -> None:
        _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))

    mount(f"size={megabytes}m")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def starve(
    args: Args, folder: Path, reference: tuple[Any, ...], reference_step: Path, report: Report
) -> None:
    """Fills the disk, and makes it read-only, under a run; then mends it, and goes on."""
    checkpoint = sum(path.stat().st_size for path in reference_step.rglob("*"))
    enough = 50 * checkpoint // 2**20 + 50
    for what, cause in {"full": "no space left", "read-only": "read-only file system"}.items():
        size = 5 * checkpoint // 2 // 2**20 if what == "full" else enough
        with small_disk(folder / f"disk-{what}", size) as change:
            trial = Trial(folder / f"disk-{what}" / "on", folder)
            place = str(trial.checkpoints)
            process = trial.start()
            if what == "read-only":
                # A file that is open for writing keeps its disk from becoming read-only: this
                # folder alone becomes one that is.
                process.wait_until(lambda t=trial: t.newest >= EVERY, args.patience)
                _mount("--bind", place, place)
                _mount("-o", "remount,bind,ro", place)
            code = process.wait(args.patience)
            faults = ["hung"] if code is None else []
            faults += [] if code and cause in process.last_line.lower() else ["silent"]
            faults += ["lost"] if max(whole_steps(trial), default=0) < trial.newest else []
            note = process.last_line
            if what == "read-only":
                subprocess.run(["umount", place], check=True)
            change(f"size={enough}m")
            trial.finish(args.patience)
            faults += _different(trial, reference)
            report.add("disk full or read-only", what, faults, note)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _compare(trial: Trial, reference: tuple[Any, ...], report: Report, group: str) -> None:
    report.add(group, trial.run.parent.name, _different(trial, reference), "")


def _different(trial: Trial, reference: tuple[Any, ...]) -> list[str]:
    try:
        return [] if outcome(trial) == reference else ["different"]
    except (OSError, ValueError):
        return ["different"]


def main(args: Args) -> int:
    """Runs all trials, prints the table, writes every row; 1 if there is a fault."""
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = Report(folder)
        text = "".join(f"line {i} holds {i * i % 101}\n" for i in range(20_000))
        (folder / "text.txt").write_text(text)
        with console.status("a run that nothing happens to"):
            Trial(folder / "first", folder).finish(10 * args.patience)  # fills the caches
            trial = Trial(folder / "reference", folder)
            started = time.monotonic()
            process = trial.finish(args.patience)
            life = time.monotonic() - started
        if process.wait(0) != 0:
            console.print(process.text, markup=False)
            return 1
        reference = outcome(trial)
        console.print(f"its whole life takes {life:.1f} s")
        record = {"environment": environment("jax", "orbax-checkpoint"), "life_seconds": life}
        record |= {"args": {"kills": args.kills, "seed": args.seed, "steps": STEPS, "every": EVERY}}
        trials = [
            lambda: kill(args, folder, reference, life, report),
            lambda: start_twice(args, folder, reference, report),
            lambda: damage(args, folder, reference, report),
        ]
        if args.disk:
            last = trial.checkpoints / str(STEPS)
            trials.append(lambda: starve(args, folder, reference, last, report))
        for hurt in trials:
            hurt()
            write_json(args.output, record | {"trials": report.rows})  # also if it is cut short
    console.print(report.table())
    for row in report.faults:
        console.print(row, markup=False)
    console.print(f"{len(report.rows)} trials, {len(report.faults)} with a fault: {args.output}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
