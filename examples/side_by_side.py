"""Trainings side by side, each in a process with one thread and a core of its own."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.one_thread import cores, one_thread_environment
from examples.xla_flags import check_flags


@contextlib.contextmanager
def side_by_side(
    jobs: int, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes to submit trainings to; an exception, or the end of this process, ends them.

    Args:
        jobs: The number of processes.
        start: A function that each process calls once.
        *arguments: What it is called with.

    Raises:
        RuntimeError: A process ended without a word, for want of memory for example.
        ValueError: `XLA_FLAGS` has flags that the installed jaxlib does not know.
    """
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for core in cores(jobs):
        free.put(core)
    with (
        _environment(),
        ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_begin, initargs=(free, start, arguments)
        ) as pool,
    ):
        try:
            yield pool
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenExecutor):
                # XLA ends a process that is given a flag it does not know.
                check_flags(os.environ["XLA_FLAGS"])
            raise


def _begin(free: Any, start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Takes a core, and ends with the process that started this one."""
    core = free.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if start is not None:
        start(*arguments)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What processes started meanwhile inherit: JAX reads it when it is imported."""
    before = dict(os.environ)
    os.environ.update(one_thread_environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def progress_bar() -> Progress:
    """How many are done, for how long, and what the field `left` of the task says."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=rich.get_console(),
    )
