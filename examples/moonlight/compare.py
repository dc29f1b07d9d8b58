"""Muon against AdamW, as declared here before any run.

    python -m examples.moonlight.compare

1. AdamW trains once at every rate of `GRID`, with the first seed. Its best rate by final validation
   loss is the rate of both optimizers: Muon's update RMS is matched to AdamW's, so it gets no
   search of its own.
2. Both optimizers train with each of `SEEDS` at that rate. A seed fixes the initial weights and the
   order of the data, and both optimizers see the same.
3. Compared are the final validation losses, whichever is ahead.

Each run is `examples.moonlight.train` in a process of its own with one thread, two at a time: on
two cores that is faster than one after the other with two threads. Call it again to continue;
finished runs are kept.
"""

import concurrent.futures
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import rich
import tyro
from rich.table import Table

from examples.moonlight.common.files import write_atomically
from examples.moonlight.common.program import run_program
from examples.moonlight.data.tokenized import load_corpus
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.folder import RESULTS
from examples.moonlight.training.args import RECIPES
from examples.moonlight.training.plots import draw_comparison
from examples.one_thread import cores, one_thread_environment

PRESET = "tiny"
GRID = (2e-3, 4e-3, 8e-3, 16e-3)
SEEDS = (0, 1, 2)
OPTIMIZERS = ("muon", "adamw")


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares Muon with AdamW on the tiny preset; rates and seeds are fixed in the file."""

    output_dir: Path = Path("runs/compare")
    """Folder of the comparison; every run has its own inside."""
    steps: int = RECIPES[PRESET].steps
    """Optimizer steps of every run."""
    data: Path | None = None
    """Text to train on; left out, the Python standard library's own source."""
    cache_dir: Path = Path("runs/corpus")
    """Where tokenized corpora are cached."""
    jobs: int = 2
    """Runs at a time, each on one core."""


class Run(NamedTuple):
    """One training."""

    optimizer: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.optimizer}-{self.learning_rate:g}-seed{self.seed}"


def compare(args: Args) -> dict[str, Any]:
    """Runs what is still missing and returns what `compare.json` holds.

    Raises:
        ValueError: `jobs` or `steps` is not positive.
        RuntimeError: A run failed; the message ends with what it last printed.
    """
    for name in ("jobs", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    # Before the runs, so that the first two don't both train the tokenizer.
    vocab_size = MoonlightConfig.preset(PRESET).vocab_size
    corpus = load_corpus(args.data, vocab_size=vocab_size, cache_dir=args.cache_dir)

    grid = [Run("adamw", rate, SEEDS[0]) for rate in GRID]
    losses = {run: r["final_val_loss"] for run, r in _finish(grid, args).items()}
    best_rate = min(grid, key=losses.__getitem__).learning_rate
    if best_rate in (GRID[0], GRID[-1]):
        rich.print(f"[bold]AdamW's best rate, {best_rate:g}, is at the edge of the grid[/bold]")
    runs = [Run(optimizer, best_rate, seed) for seed in SEEDS for optimizer in OPTIMIZERS]
    results = _finish(runs, args)

    summary = {
        "corpus": corpus.corpus_hash,
        "steps": args.steps,
        "seeds": SEEDS,
        "adamw_grid": {f"{run.learning_rate:g}": losses[run] for run in grid},
        "learning_rate": best_rate,
        "optimizers": {
            optimizer: _summarize([results[run] for run in runs if run.optimizer == optimizer])
            for optimizer in OPTIMIZERS
        },
        "versions": results[runs[0]]["versions"],
        "device": results[runs[0]]["device"],
    }
    muon, adamw = (summary["optimizers"][name]["final_val_loss"] for name in OPTIMIZERS)
    summary["muon_minus_adamw"] = [m - a for m, a in zip(muon, adamw, strict=True)]
    curves = {
        optimizer: [
            _train_curve(args.output_dir / run.name) for run in runs if run.optimizer == optimizer
        ]
        for optimizer in OPTIMIZERS
    }
    summary["muon_steps_to_adamw"] = _steps_to_reach(
        [args.output_dir / run.name for run in runs if run.optimizer == "muon"],
        statistics.mean(adamw),
    )
    write_atomically(
        args.output_dir / "compare.json", (json.dumps(summary, indent=2) + "\n").encode()
    )
    draw_comparison(
        args.output_dir / "compare.png",
        curves,
        title=f"Moonlight {PRESET}, peak rate {best_rate:g} (AdamW's best), {len(SEEDS)} seeds",
    )
    _present(args, summary)
    return summary


def _finish(runs: list[Run], args: Args) -> dict[Run, dict[str, Any]]:
    """Brings every run to its end, `jobs` at a time; a finished one only checks its settings."""
    free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for core in cores(args.jobs):
        free.put(core)

    def finish(run: Run) -> dict[str, Any]:
        core = free.get()
        try:
            return _train_in_process(run, args, core)
        finally:
            free.put(core)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(finish, run): run for run in runs}
        try:
            for future in concurrent.futures.as_completed(futures):
                loss = future.result()["final_val_loss"]
                rich.print(f"{futures[future].name:<22} validation loss {loss:.4f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {run: future.result() for future, run in futures.items()}


def _train_in_process(run: Run, args: Args, core: int | None) -> dict[str, Any]:
    folder = args.output_dir / run.name
    log = args.output_dir / "logs" / f"{run.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "examples.moonlight.train", "--resume"]
    values = {
        "preset": PRESET,
        "schedule": "cosine",
        "optimizer": run.optimizer,
        "learning-rate": run.learning_rate,
        "seed": run.seed,
        "data-seed": run.seed,
        "steps": args.steps,
        "output-dir": folder,
        "cache-dir": args.cache_dir,
    }
    if args.data is not None:
        values["data"] = args.data
    for name, value in values.items():
        command += [f"--{name}", str(value)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=one_thread_environment(), stdout=output, stderr=output
        )
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        try:
            code = process.wait()
        finally:
            process.kill()
    if code != 0:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{run.name} ended with code {code}; {log} ends with:\n{tail}")
    return json.loads((folder / RESULTS).read_text())


def _summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [result["final_val_loss"] for result in results]
    return {
        "final_val_loss": losses,
        "mean": statistics.mean(losses),
        "standard_deviation": statistics.stdev(losses),
        "mean_per_byte": statistics.mean(result["final_val_loss_per_byte"] for result in results),
        "tokens_per_second": statistics.mean(result["tokens_per_second"] for result in results),
    }


def _train_curve(folder: Path) -> tuple[list[int], list[float]]:
    records = metrics.read_metrics(folder / metrics.FILE, metrics.TRAIN)
    return [record["step"] for record in records], [record["loss"] for record in records]


def _steps_to_reach(folders: list[Path], loss: float) -> int | None:
    """First validated step at which the mean over the runs is at most `loss`; None if never."""
    runs = [metrics.read_metrics(folder / metrics.FILE, metrics.VALIDATION) for folder in folders]
    for records in zip(*runs, strict=True):
        if statistics.mean(record["val_loss"] for record in records) <= loss:
            return records[0]["step"]
    return None


def _present(args: Args, summary: dict[str, Any]) -> None:
    table = Table(title=f"Final validation loss after {args.steps} steps, nats per token")
    for column in ("optimizer", "mean ± std", *(f"seed {seed}" for seed in SEEDS), "per byte"):
        table.add_column(column, justify="right")
    table.add_column("tokens/s, one thread", justify="right")
    for name, result in summary["optimizers"].items():
        table.add_row(
            name,
            f"{result['mean']:.4f} ± {result['standard_deviation']:.4f}",
            *(f"{loss:.4f}" for loss in result["final_val_loss"]),
            f"{result['mean_per_byte']:.4f}",
            f"{result['tokens_per_second']:,.0f}",
        )
    grid = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in summary["adamw_grid"].items())
    differences = summary["muon_minus_adamw"]
    mean = statistics.mean(differences)
    ahead = "Muon" if mean < 0 else "AdamW"
    seeds_ahead = sum((difference < 0) == (mean < 0) for difference in differences)
    rich.print(table)
    rich.print(f"AdamW by rate, seed {SEEDS[0]}: {grid}; both at {summary['learning_rate']:g}")
    rich.print(
        f"{ahead} is ahead by {abs(mean):.4f} on average, in {seeds_ahead} of {len(SEEDS)} seeds"
    )
    if summary["muon_steps_to_adamw"] is not None:
        rich.print(f"Muon reaches AdamW's final mean by step {summary['muon_steps_to_adamw']}")
    rich.print(f"everything is in {args.output_dir}: compare.json, compare.png and the runs")


if __name__ == "__main__":
    started = time.perf_counter()
    run_program(lambda: compare(tyro.cli(Args)))
    rich.print(f"took {(time.perf_counter() - started) / 60:.1f} minutes")
