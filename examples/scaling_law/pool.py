"""Runs side by side, each in a process with one thread of its own.

Matrices of these sizes do not fill two cores: two processes are about twice as fast as one with
two threads. Longest runs first, so that none is left alone at the end.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from examples.scaling_law.corpus import load_corpus
from examples.scaling_law.models import flops_of
from examples.scaling_law.protocol import Run
from examples.scaling_law.store import Record, Store
from examples.side_by_side import progress_bar, side_by_side

_Train = Callable[[Run], Future[Record]]

# A core of an AMD EPYC server, with a run on the other one. Fitted to the committed runs, whose
# seconds they give to within 4% in sum; only budgets and the order of runs depend on them.
_FLOPS_PER_SECOND = 35e9
_SECONDS_PER_STEP = 1e-3
_SECONDS_PER_RUN = 3.0

# Fields that a run's description names where they are not the default.
_NAMED = (
    *("family", "scale", "update_rms", "weight_decay", "ns_coeffs", "ns_steps"),
    "heads_per_group",
)

# How often runs are asked for that other processes have claimed.
_POLL_SECONDS = 1.0


def estimate(run: Run) -> float:
    """Seconds that a run takes on one core, to within a factor of two on most machines."""
    flops = flops_of(run)
    computing = (flops.whole + flops.newton_schulz) / _FLOPS_PER_SECOND
    return _SECONDS_PER_RUN + run.steps * _SECONDS_PER_STEP + computing


class Pool:
    """Trains runs and keeps their records.

    Args:
        store: Where records go, and where finished runs are found.
        data: The texts, as for `load_corpus`.
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

        Other processes may do the same in the same folder: each run is trained by one of them, and
        all return when all runs are there. Whoever is killed gives up the runs that it had begun.

        Raises:
            RuntimeError: A process ended without a word, for want of memory for example, or
                something removed records while this went on.
            ValueError: `XLA_FLAGS` has flags that the installed jaxlib does not know.
        """
        missing = sorted(self.missing(runs), key=estimate, reverse=True)
        if missing:
            self._train(missing, title)
        return {run: self._store[run.key(self._corpus.hash)] for run in runs}

    def _train(self, runs: list[Run], title: str) -> None:
        total = sum(map(estimate, runs))
        started, done = time.perf_counter(), 0.0
        with progress_bar() as bar, self._trainer(len(runs)) as train:
            task = bar.add_task(title, total=len(runs), left="")
            for run, ours in self._finished(runs, train):
                done += estimate(run)
                seconds = (time.perf_counter() - started) * (total - done) / done
                bar.update(task, advance=1, left=_duration(seconds))
                record = self._store[run.key(self._corpus.hash)]
                loss = record["val_loss"]
                bar.console.print(
                    f"{describe(run):<58} "
                    f"{'diverged' if loss is None else f'{loss:.4f}'}  {record['seconds']:.0f} s"
                    f"{'' if ours else ', by another process'}",
                    highlight=False,
                    soft_wrap=True,
                )

    def _finished(self, runs: list[Run], train: _Train) -> Iterator[tuple[Run, bool]]:
        """Each run once its record is in the store, and whether it was trained here.

        A run is claimed from before it starts until its record is on disk. What others have claimed
        is asked for again, until they have finished it or are gone.
        """
        slots = 1 if self._accelerator else self._jobs
        left = list(runs)
        training: dict[Future[Record], tuple[Run, contextlib.ExitStack]] = {}
        with contextlib.ExitStack() as claims:
            while left or training:
                for run in list(left):
                    if len(training) == slots:
                        break
                    claim, key = contextlib.ExitStack(), run.key(self._corpus.hash)
                    if claim.enter_context(self._store.claim(key)):
                        claims.push(claim)
                        left.remove(run)
                        training[train(run)] = run, claim
                        continue
                    claim.close()
                    if key in self._store:
                        left.remove(run)
                        yield run, False
                if training:
                    waiting = _POLL_SECONDS if left and len(training) < slots else None
                    finished, _ = wait(training, waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        run, claim = training.pop(future)
                        self._store.append(future.result())
                        claim.close()
                        yield run, True
                elif left:
                    time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _trainer(self, runs: int) -> Iterator[_Train]:
        """What starts a run, here or in a process of its own."""
        if self._accelerator:
            yield self._train_on_accelerator
            return
        jobs = min(self._jobs, runs)
        with side_by_side(jobs, _start, self._data) as pool:
            yield lambda run: pool.submit(_train_here, run)

    def _train_on_accelerator(self, run: Run) -> Future[Record]:
        from examples.scaling_law.training import train

        future: Future[Record] = Future()
        future.set_result(train(run, self._corpus))
        return future


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
    for name in _NAMED:
        if getattr(run, name) != Run.__dataclass_fields__[name].default:
            words.append(f"{name} {getattr(run, name)}")
    return ", ".join([*words, *(f"{name} to Muon" for name in run.muon_too)])


# --------------------------------------------------------------------------------------------------
# In a process of its own
# --------------------------------------------------------------------------------------------------

_corpus: Any = None


def _start(data: Path | None) -> None:
    """Reads the corpus, once."""
    global _corpus
    _corpus = load_corpus(data, tell=lambda _: None)  # the pool has told it


def _train_here(run: Run) -> Record:
    from examples.scaling_law.training import train

    return train(run, _corpus)


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"
