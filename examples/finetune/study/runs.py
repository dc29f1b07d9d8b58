"""Trains what is missing of the study, side by side: each finished run is a line, found again."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from examples.finetune.study.protocol import Run, Study, from_json
from examples.scaling_law.store import Store
from examples.side_by_side import progress_bar, side_by_side

FIELDS = ("key", "loss", "exact")

# Pre-trained weights, beside the records: made again where they are missing.
BASES = "bases"


def open_store(folder: Path) -> Store:
    """The records of a folder."""
    return Store(folder, from_json, FIELDS)


def chosen_rate(store: Store, runs: Sequence[Run]) -> float:
    """The rate with the lowest loss on the tuning questions, in the mean of their seeds.

    Raises:
        RuntimeError: A run diverged at each of the rates.
    """
    losses = tuning_losses(store, runs)
    whole = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not whole:
        raise RuntimeError(f"every rate of {runs[0].cell} diverged: {sorted(losses)}")
    return min(whole, key=lambda rate: whole[rate])


def tuning_losses(store: Store, runs: Sequence[Run]) -> dict[float, float | None]:
    """The mean loss of each rate over its seeds; None where one of them diverged."""
    by_rate: dict[float, list[float | None]] = {}
    for run in runs:
        by_rate.setdefault(run.learning_rate, []).append(store[run.key()]["loss"])
    return {
        rate: None if None in losses else statistics.mean(x for x in losses if x is not None)
        for rate, losses in by_rate.items()
    }


def run_study(study: Study, folder: Path, jobs: int) -> Store:
    """Trains what is missing, and returns all records.

    Called again after a kill it goes on: half a line is taken off, and that run is repeated.

    Raises:
        RuntimeError: A process ended without a word, or every run of a cell diverged.
    """
    store = open_store(folder)
    bases = study.bases()
    there = (folder / BASES / f"{run.key()}.npz" for run in bases)
    without = [run for run, path in zip(bases, there, strict=True) if not path.exists()]
    _finish(store, bases, folder, jobs, "pre-training", again=without)
    cells = study.cells()
    _finish(store, [run for cell in cells for run in study.tuning(cell)], folder, jobs, "tuning")
    reported = [
        run
        for cell in cells
        for run in study.reported(cell, chosen_rate(store, study.tuning(cell)))
    ]
    _finish(store, reported, folder, jobs, "reported")
    return store


def _finish(
    store: Store,
    runs: Sequence[Run],
    folder: Path,
    jobs: int,
    title: str,
    again: Sequence[Run] = (),
) -> None:
    left = [run for run in runs if run.key() not in store or run in again]
    if not left:
        return
    started = time.perf_counter()
    with progress_bar() as bar, side_by_side(min(jobs, len(left))) as pool:
        task = bar.add_task(title, total=len(left), left="")
        futures: dict[Future, Run] = {pool.submit(_train, run, folder / BASES): run for run in left}
        done = 0
        while futures:
            finished, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in finished:
                run, record = futures.pop(future), future.result()
                if run.key() not in store:
                    store.append(record)
                done += 1
                seconds = (time.perf_counter() - started) / done * (len(left) - done)
                bar.update(task, advance=1, left=f"about {seconds / 60:.0f} min left")
                bar.console.print(_line(run, record), highlight=False, soft_wrap=True)


def _train(run: Run, bases: Path) -> dict:
    from examples.finetune.study.training import train

    return train(run, bases)


def _line(run: Run, record: dict) -> str:
    what = f"pre-training with {run.pretrained_by}"
    if run.tuner is not None:
        what = (
            f"{run.tuner}, {run.pretrained_by} -> {run.optimizer}, rate {run.learning_rate:g}, "
            f"seed {run.seed}"
        )
    if record["loss"] is None:
        return f"{what:<56} diverged"
    return f"{what:<56} loss {record['loss']:.4f}  exact {record['exact']:.1%}"
