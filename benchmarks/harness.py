"""What every benchmark needs: fair timing, the matmul peak, and a record of the machine."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.one_thread import available_cores


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Time several functions in turns, so that a change of the machine's speed hits all alike.

    Args:
      functions: name -> a call that blocks until its work is done.
      repeats: how often each is timed.
      warmups: how often each is called before.

    Returns:
      name -> seconds of each call.
    """
    for call in functions.values():
        for _ in range(warmups):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, call in functions.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


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


def matmul_peak(size: int | None = None, repeats: int = 5) -> float:
    """FLOP/s of the fastest of several square matrix products on the default device.

    bfloat16 with float32 accumulation on accelerators, float32 on CPU: what Newton-Schulz
    multiplies there.
    """
    cpu = jax.default_backend() == "cpu"
    size = size or (2048 if cpu else 8192)
    dtype = jnp.float32 if cpu else jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    calls = {"peak": lambda: jax.block_until_ready(product(x))}
    return 2 * size**3 / min(time_interleaved(calls, repeats, warmups=2)["peak"])


def environment(*packages: str) -> dict[str, Any]:
    """Commit, device, processor and versions, for the record."""
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": available_cores(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


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
