"""What a run is put through: kills, damage, a second process, a disk that fills up."""

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.endurance.args import Args
from benchmarks.endurance.damage import DAMAGE
from benchmarks.endurance.disk import bind_read_only, small_disk, unmount
from benchmarks.endurance.report import Report
from benchmarks.endurance.trial import EVERY, Trial, outcome, whole_steps
from examples.moonlight.run_folder.storage import kept_steps

# How a process is ended: each signal in its turn, with seconds between.
ENDINGS = {
    "SIGKILL": [signal.SIGKILL],
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}


def kill(args: Args, folder: Path, reference: tuple[Any, ...], life: float, report: Report) -> None:
    """Ends processes at random moments; each run that comes to its end is compared."""
    draw = random.Random(args.seed)
    trial, runs = Trial(folder / "killed-0", folder, args.processes), 0
    for i in track(range(args.kills), description="killing"):
        name = [*ENDINGS][i % len(ENDINGS)]
        moment = draw.uniform(0, life)
        process = trial.start()
        process.wait_until(lambda p=process, m=moment: time.monotonic() - p.started > m, life)
        before = process.text.rstrip().splitlines()[-1:] or ["(nothing printed yet)"]
        ended, sent, children = process.ended, time.monotonic(), process.children
        victim = draw.choice(children) if children and name == "SIGKILL" else None
        for number in [] if ended else ENDINGS[name]:
            if victim is None:
                process.send(number)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, number)
            time.sleep(draw.uniform(0, 0.5) if len(ENDINGS[name]) > 1 else 0)
        code = process.wait(args.patience)
        took = time.monotonic() - sent
        faults = ["hung"] if code is None or _left(children) else []
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
        if children:
            who = "all" if victim is None else children.index(victim)
            note = f"process {who}, ended after {took:.1f} s; {note}"
        report.add(f"ended by {name}", name, faults, note)
        if done:
            _compare(trial, reference, report, "runs that were killed until their end")
            runs += 1
            trial = Trial(folder / f"killed-{runs}", folder, args.processes)
    trial.finish(args.patience)
    _compare(trial, reference, report, "runs that were killed until their end")


def _left(children: list[int]) -> bool:
    """Whether one of a run's processes outlives the one that started them, by a second and more."""
    deadline = time.monotonic() + 5.0
    while any(Path(f"/proc/{child}").exists() for child in children):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)
    return False


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
            process = trial.start()
            if what == "read-only":
                # A file that is open for writing keeps its disk from becoming read-only: this
                # folder alone becomes one that is.
                process.wait_until(lambda t=trial: t.newest >= EVERY, args.patience)
                bind_read_only(trial.checkpoints)
            code = process.wait(args.patience)
            faults = ["hung"] if code is None else []
            faults += [] if code and cause in process.last_line.lower() else ["silent"]
            faults += ["lost"] if max(whole_steps(trial), default=0) < trial.newest else []
            note = process.last_line
            if what == "read-only":
                unmount(trial.checkpoints)
            change(f"size={enough}m")
            trial.finish(args.patience)
            faults += _different(trial, reference)
            report.add("disk full or read-only", what, faults, note)


def _compare(trial: Trial, reference: tuple[Any, ...], report: Report, group: str) -> None:
    report.add(group, trial.run.parent.name, _different(trial, reference), "")


def _different(trial: Trial, reference: tuple[Any, ...]) -> list[str]:
    try:
        return [] if outcome(trial) == reference else ["different"]
    except (OSError, ValueError):
        return ["different"]
