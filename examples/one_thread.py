"""Processes of one thread and one core: how small trainings run side by side on a CPU."""

import os


def available_cores() -> int:
    """How many cores this process may use."""
    return len(_allowed()) or os.cpu_count() or 1


def cores(jobs: int) -> list[int | None]:
    """A core for each job; None, which lets it wander, where there are too few or no say in it."""
    allowed = _allowed()
    return list(allowed[:jobs]) if len(allowed) >= jobs else [None] * jobs


def _allowed() -> list[int]:
    """The cores to choose from; none where the system does not let a process choose."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def one_thread_environment() -> dict[str, str]:
    """Environment variables, this process's own included, that keep JAX on one CPU thread."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false",
    }
