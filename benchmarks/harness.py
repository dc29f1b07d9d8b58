"""What every benchmark needs: fair timing, and a record of the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console

from examples.one_thread import available_cores

# Programs that run beside this one; torch's threads, which wait for each other, suffer most.
BUSY = 0.5

# Columns of a table in a file or a pipe, which have no width of their own.
ELSEWHERE = 120

Name = TypeVar("Name", bound=str)
Built = TypeVar("Built")


def make_console() -> Console:
    """Where a benchmark prints: as wide as the terminal, or as the variable COLUMNS says."""
    asked_for = os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty()
    return Console(width=None if asked_for else ELSEWHERE)


def wall_clock(call: Callable[[], Any]) -> float:
    """The seconds that a call takes; it blocks until its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmups: int = 1,
    clocks: Mapping[str, Callable[[Callable[[], Any]], float]] | None = None,
) -> dict[str, list[float]]:
    """Time several functions in turns, so that a change of the machine's speed hits all alike.

    Args:
      functions: name -> a call that blocks until its work is done.
      repeats: how often each is timed.
      warmups: how often each is called before.
      clocks: name -> what makes the call and returns its seconds; `wall_clock` for the others.

    Returns:
      name -> seconds of each call.
    """
    for call in functions.values():
        for _ in range(warmups):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, call in functions.items():
            clock = (clocks or {}).get(name, wall_clock)
            seconds[name].append(clock(call))
    return seconds


def attempt_each(
    builders: Mapping[Name, Callable[[], Built]], run: Callable[[Built], Any]
) -> tuple[dict[Name, Built], dict[Name, str]]:
    """Build each, and run it once: what one of them cannot do does not stop the others.

    Args:
      builders: name -> makes what is to be measured.
      run: what is tried with it, which warms it up as well.

    Returns:
      Those that ran, by name, and what the others said.
    """
    built: dict[Name, Built] = {}
    failed: dict[Name, str] = {}
    for name, build in builders.items():
        try:
            made = build()
            run(made)
        except Exception as error:  # out of memory, a kernel that there is not, no torch
            failed[name] = describe(error)
        else:
            built[name] = made
    return built, failed


def describe(error: BaseException) -> str:
    """An error's type and the first line that it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300] if said else 'nothing'}"


def check_known(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, naming what there is, where anything else was asked for."""
    known = [*known]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")


def load_average(console: Console) -> float:
    """How many other programs run, which is said where it matters: torch's threads wait longest."""
    load = os.getloadavg()[0]
    if load > BUSY:
        console.print(f"load average {load:.1f}: what else runs here will be in the figures")
    return load


def limit_threads(count: int) -> None:
    """Keeps this process, and whatever threads it starts from now on, to `count` processors.

    Raises:
      ValueError: there are not as many, or the system can't.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--threads needs Linux: leave it out to use all processors")
    there = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(there):
        raise ValueError(f"--threads must be between 1 and {len(there)}, got {count}")
    os.sched_setaffinity(0, there[:count])


def median(seconds: list[float]) -> float:
    """The median, in the unit given."""
    return statistics.median(seconds)


def environment(*packages: str) -> dict[str, Any]:
    """Commit, device, processor and versions, for the record; "not installed" is one, too."""
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": available_cores(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, readable and stable in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _commit() -> str:
    root = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else "not a git checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
