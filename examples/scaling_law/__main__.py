"""How much of AdamW's compute does Muon need for the same loss?

    python -m examples.scaling_law --quick     the whole method on two small sizes, in minutes
    python -m examples.scaling_law             the main study
    python -m examples.scaling_law --plan      what a preset would run, and how long it would take

1. AdamW is tuned on a grid of learning rates and batch sizes, on files that are not reported.
2. Both optimizers train at every size with AdamW's values, the same seeds and the same data.
3. Muon trains again on 40% to 60% of the tokens, each run with its own whole schedule.
4. Power laws are fitted, and the compute ratio at equal loss is found from them and, directly, from
   the shorter runs.

Everything is declared in `protocol.py`, `studies.py` and `ablations.py`. Call it again to continue:
each finished run is a line in `runs.jsonl` and is not trained twice.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import jax
import rich
from rich.table import Table

from examples.moonlight.common.command_line import CommandLine
from examples.one_thread import available_cores
from examples.scaling_law import tables
from examples.scaling_law.ablations import ablations
from examples.scaling_law.models import flops_of
from examples.scaling_law.pool import Pool, estimate
from examples.scaling_law.protocol import Run
from examples.scaling_law.report import FIGURES, SUMMARY, report
from examples.scaling_law.store import RUNS, Store
from examples.scaling_law.studies import MAIN, STUDIES, Study
from examples.scaling_law.tuning import Bowl, fit_law


@dataclasses.dataclass(frozen=True)
class Args:
    """Measures Muon's share of AdamW's compute at equal loss."""

    preset: Literal["quick", "main", "distinct", "1m", "ablations", "gpu"] = "main"
    """What to run; "distinct", "1m" and "ablations" use the grids of "main", and run them if need
    be."""
    quick: bool = False
    """The same as `--preset quick`."""
    output_dir: Path = Path("runs/scaling_law")
    """Where runs, numbers and figures go, and where finished runs are found."""
    data: Path | None = None
    """Folder of text files, or .jsonl file, of at least four documents; left out, the Python
    standard library's own source."""
    jobs: int = available_cores()
    """Runs at a time, each with one thread on a core of its own; one on an accelerator."""
    plan: bool = False
    """Print the plan and its budget, and train nothing."""


def run(args: Args) -> None:
    """Runs what is missing of a preset, and reports.

    Raises:
        ValueError: `jobs` is not positive, or the corpus is too small for the preset.
        RuntimeError: The preset needs an accelerator and JAX finds none.
    """
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if args.quick and args.preset not in ("main", "quick"):
        raise ValueError(f"--quick is --preset quick, and --preset is {args.preset}: give one")
    preset = "quick" if args.quick else args.preset
    on_accelerator = preset == "gpu"
    if on_accelerator and not args.plan and jax.default_backend() == "cpu":
        raise RuntimeError(
            "--preset gpu trains up to 49M parameters and JAX finds no GPU or TPU here: install "
            "jax for yours (https://docs.jax.dev/en/latest/installation.html), or choose a preset "
            "for CPUs"
        )
    console = rich.get_console()
    pool = Pool(Store(args.output_dir), args.data, jobs=args.jobs, accelerator=on_accelerator)
    console.print(f"corpus {pool.corpus_hash}", highlight=False)
    study = STUDIES.get(preset, MAIN)
    console.print(plan_table(pool, study, preset, 1 if on_accelerator else args.jobs))
    if args.plan:
        return
    tuning_runs = [run for runs in study.tuning_runs().values() for run in runs]
    records = pool.finish(tuning_runs, "tuning AdamW")
    for size, bowl in study.bowls(records).items():
        if bowl.at_edge:
            console.print(f"[bold]{size} layers: the best cell is at an edge of its grid[/bold]")
    law = study.tuned(records)
    if preset == "ablations":
        declared = ablations(lambda size: study.run(law, size, "muon", 0))
        runs = [run for ablation in declared.values() for run in ablation.runs]
        pool.finish(runs, "ablations")
    else:
        pool.finish(study.runs(law), "both optimizers")
    summary = report(args.output_dir, corpus=pool.corpus_hash)
    for name, table in tables.all_tables(summary).items():
        if name.startswith(f"{preset}/"):
            console.print(table.rich())
    for what, name in (("runs", RUNS), ("numbers", SUMMARY), ("figures", FIGURES)):
        console.print(f"{what:<8} {args.output_dir / name}", highlight=False, soft_wrap=True)


def plan_table(pool: Pool, study: Study, preset: str, jobs: int) -> Table:
    """What a preset runs, how much of it is there, and how long the rest takes.

    Raises:
        ValueError: The corpus is too small for a run.
    """
    tuning_runs = [run for runs in study.tuning_runs().values() for run in runs]
    untuned = pool.missing(tuning_runs)
    law = fit_law(_middles(study)) if untuned else study.tuned(pool.finish(tuning_runs, ""))
    stages: dict[str, list[Run]] = {"tuning AdamW": tuning_runs}
    if preset == "ablations":
        declared = ablations(lambda size: study.run(law, size, "muon", 0))
        stages |= {name: ablation.runs for name, ablation in declared.items()}
    else:
        for size in study.sizes:
            runs = [run for run in study.runs(law) if run.layers == size]
            stages[f"{size} layers, {runs[0].tokens:,} tokens"] = runs
    pool.check([run for runs in stages.values() for run in runs])
    table = Table(title=f"{preset}: the plan{', before tuning' if untuned else ''}")
    for column in ("stage", "runs", "missing", "FLOPs", "core-minutes left"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    left_in_all = 0.0
    for name, runs in stages.items():
        missing = pool.missing(runs)
        left = sum(map(estimate, missing)) / 60
        left_in_all += left
        flops = sum(flops_of(run).whole + flops_of(run).newton_schulz for run in runs)
        table.add_row(name, str(len(runs)), str(len(missing)), f"{flops:.2g}", f"{left:.1f}")
    table.caption = f"about {left_in_all / jobs:.0f} minutes with {jobs} at a time"
    if preset == "gpu":
        table.caption = "minutes are those of a CPU core; an accelerator's are not known beforehand"
    return table


def _middles(study: Study) -> dict[float, Bowl]:
    """The middle of each grid, in the place of what tuning will find."""
    return {
        study.compute(size): Bowl(
            grid.rates[len(grid.rates) // 2],
            grid.batches[len(grid.batches) // 2],
            0.0,
            fitted=False,
            at_edge=False,
        )
        for size, grid in study.grids.items()
    }


COMMAND_LINE = CommandLine("examples.scaling_law", Args, __doc__)


def main() -> None:
    """The program."""
    started = time.perf_counter()
    COMMAND_LINE.run(run)
    rich.print(f"took {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
