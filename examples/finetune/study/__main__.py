"""Which optimizer for the fine-tuning of a model that was pre-trained with which?

    python -m examples.finetune.study --quick    the whole method with fewer and shorter runs
    python -m examples.finetune.study            the study whose report is beside this file
    python -m examples.finetune.study --plan     what would run, and train nothing

1. Two small models are pre-trained on generated text, one with Muon and one with AdamW.
2. Each is fine-tuned on questions that it has not seen the like of, with both optimizers, in full
   and by LoRA: eight cells. Every cell has a learning rate of its own, found on a declared grid, on
   questions that are not reported.
3. Every cell trains with several seeds, and is measured on the test questions.

Everything is declared in `protocol.py` and `task.py`. Call it again to continue: each finished run
is a line in `runs.jsonl` and is not trained twice.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import rich
from rich.table import Table

from examples.finetune.study.protocol import STUDIES, Study
from examples.finetune.study.report import FIGURE, SUMMARY, report
from examples.finetune.study.runs import open_store, run_study
from examples.finetune.study.tables import all_tables
from examples.moonlight.common.command_line import CommandLine
from examples.one_thread import available_cores


@dataclasses.dataclass(frozen=True)
class Args:
    """Fine-tunes models of both optimizers with both."""

    preset: Literal["main", "quick"] = "main"
    """What to run."""
    quick: bool = False
    """The same as `--preset quick`."""
    output_dir: Path = Path("runs/finetune_study")
    """Where runs, numbers and the picture go, and where finished runs are found."""
    jobs: int = available_cores()
    """Runs at a time, each with one thread on a core of its own."""
    plan: bool = False
    """Print the plan, and train nothing."""


def run(args: Args) -> None:
    """Runs what is missing of a preset, and reports.

    Raises:
        ValueError: `jobs` is not positive.
        RuntimeError: A process ended without a word, or every run of a cell diverged.
    """
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    preset = "quick" if args.quick else args.preset
    study, console = STUDIES[preset], rich.get_console()
    console.print(plan_table(study, args.output_dir, preset))
    if args.plan:
        return
    run_study(study, args.output_dir, args.jobs)
    for table in all_tables(report(args.output_dir, preset)).values():
        console.print(table.rich())
    for what, name in (("numbers", SUMMARY), ("picture", FIGURE)):
        console.print(f"{what}  {args.output_dir / name}", highlight=False, soft_wrap=True)


def plan_table(study: Study, folder: Path, preset: str) -> Table:
    """What a preset runs, and how much of it is there."""
    store = open_store(folder)
    table = Table(title=f"{preset}: the plan")
    for column in ("stage", "runs", "missing", "steps of each"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    bases = study.bases()
    tuning = [run for cell in study.cells() for run in study.tuning(cell)]
    stages = [("pre-training", bases, f"{study.pretraining_steps}")]
    steps = " and ".join(f"{count} ({tuner})" for tuner, count in study.steps.items())
    stages.append(("learning rates", tuning, steps))
    for name, runs, count in stages:
        missing = sum(run.key() not in store for run in runs)
        table.add_row(name, str(len(runs)), str(missing), count)
    table.add_row("reported", str(len(study.cells()) * len(study.seeds)), "", steps)
    return table


COMMAND_LINE = CommandLine("examples.finetune.study", Args, __doc__)


def main() -> None:
    """The program."""
    COMMAND_LINE.run(run)


if __name__ == "__main__":
    main()
