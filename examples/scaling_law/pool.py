"""Runs side by side, each in a process with one thread of its own.

Matrices of these sizes do not fill two cores: two processes are about twice as fast as one with
two threads. Longest runs first, so that none is left alone at the end.
"""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.one_thread import cores, one_thread_environment
from examples.scaling_law.corpus import load_corpus
from examples.scaling_law.models import flops_of
from examples.scaling_law.protocol import Run
from examples.scaling_law.store import Record, Store

# A core of an AMD EPYC server, with a run on the other one. Fitted to the committed runs, whose
# seconds they give to within 4% in sum; only budgets and the order of runs depend on them.
_FLOPS_PER_SECOND = 35e9
_SECONDS_PER_STEP = 1e-3
_SECONDS_PER_RUN = 3.0


def estimate(run: Run) -> float:
    """Seconds that a run takes on one core, to within a factor of two on most machines."""
    flops = flops_of(run)
    computing = (flops.whole + flops.newton_schulz) / _FLOPS_PER_SECOND
    return _SECONDS_PER_RUN + run.steps * _SECONDS_PER_STEP + computing


class Pool:
    """Trains runs and keeps their records.

    Args:
        store: Where records go, and where finished runs are found.
        data: As for `load_corpus`.
        jobs: Runs at a time, each with a core of its own where there are as many.
        accelerator: Train in this process, on JAX's own device, one run after the other.
    """

    def __init__(self, store: Store, data: Path | None, *, jobs: int, accelerator: bool = False):
        self._store = store
        self._data = data
        self._jobs = jobs
        self._accelerator = accelerator
        self._corpus = load_corpus(data)

    @property
    def corpus_hash(self) -> str:
        """Of the text that runs read."""
        return self._corpus.hash

    def check(self, runs: Sequence[Run]) -> None:
        """Raises ValueError if the corpus is too small for one of the runs."""
        for run in runs:
            self._corpus.part(run)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those without a record, each once."""
        there = (run for run in dict.fromkeys(runs) if run.key(self._corpus.hash) in self._store)
        done = set(there)
        return [run for run in dict.fromkeys(runs) if run not in done]

    def finish(self, runs: Sequence[Run], title: str) -> dict[Run, Record]:
        """Trains what is missing and returns the records of all.

        Raises:
            RuntimeError: A process ended without a word, for want of memory for example.
        """
        missing = sorted(self.missing(runs), key=estimate, reverse=True)
        if missing:
            self._train(missing, title)
        return {run: self._store[run.key(self._corpus.hash)] for run in runs}

    def _train(self, runs: list[Run], title: str) -> None:
        total = sum(map(estimate, runs))
        started, done = time.perf_counter(), 0.0
        with _bar() as bar:
            task = bar.add_task(title, total=len(runs), left="")
            for run, record in self._results(runs):
                self._store.append(record)
                done += estimate(run)
                seconds = (time.perf_counter() - started) * (total - done) / done
                bar.update(task, advance=1, left=_duration(seconds))
                loss = record["val_loss"]
                bar.console.print(
                    f"{describe(run):<58} "
                    f"{'diverged' if loss is None else f'{loss:.4f}'}  {record['seconds']:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )

    def _results(self, runs: list[Run]) -> Iterator[tuple[Run, Record]]:
        if self._accelerator:
            from examples.scaling_law.training import train

            for run in runs:
                yield run, train(run, self._corpus)
            return
        jobs = min(self._jobs, len(runs))
        context = multiprocessing.get_context("spawn")
        free = context.SimpleQueue()
        for core in cores(jobs):
            free.put(core)
        with (
            _environment(),
            ProcessPoolExecutor(
                jobs, mp_context=context, initializer=_start, initargs=(free, self._data)
            ) as pool,
        ):
            waiting = {pool.submit(_train_here, run): run for run in runs}
            try:
                while waiting:
                    finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield waiting.pop(future), future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def describe(run: Run) -> str:
    """A run in a few words: what differs from the others."""
    words = [
        run.part,
        f"{run.layers} layers",
        run.optimizer,
        f"batch {run.batch}",
        f"rate {run.learning_rate:g}",
        f"{run.tokens:,} bytes",
        f"seed {run.seed}",
    ]
    for name in ("family", "scale", "update_rms", "weight_decay", "ns_coeffs", "ns_steps"):
        if getattr(run, name) != Run.__dataclass_fields__[name].default:
            words.append(f"{name} {getattr(run, name)}")
    return ", ".join([*words, *(f"{name} to Muon" for name in run.muon_too)])


# --------------------------------------------------------------------------------------------------
# In a process of its own
# --------------------------------------------------------------------------------------------------

_corpus: Any = None


def _start(free: Any, data: Path | None) -> None:
    """Takes a core and reads the corpus, once; and ends with the process that started it."""
    global _corpus
    core = free.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _corpus = load_corpus(data)


def _train_here(run: Run) -> Record:
    from examples.scaling_law.training import train

    return train(run, _corpus)


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


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=rich.get_console(),
    )


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"
