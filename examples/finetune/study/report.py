"""Numbers, picture and tables from the records: `python -m examples.finetune.study.report`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import rich

from examples.finetune.study.analysis import summarize
from examples.finetune.study.figure import draw
from examples.finetune.study.protocol import STUDIES
from examples.finetune.study.runs import open_store
from examples.finetune.study.tables import all_tables
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.files import write_atomically
from examples.scaling_law.report import fill_in

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SUMMARY = "summary.json"
FIGURE = "answers.png"


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes numbers, picture and tables of finished runs again."""

    results: Path = RESULTS
    """The folder of the records; numbers and picture go there too."""
    preset: Literal["main", "quick"] = "main"
    """What was run."""


def report(folder: Path, preset: str) -> dict[str, Any]:
    """Writes numbers and picture into the folder of the records, and returns the numbers.

    Raises:
        KeyError: A run of the preset is missing.
    """
    summary = summarize(STUDIES[preset], open_store(folder))
    write_atomically(folder / SUMMARY, f"{json.dumps(summary, indent=1)}\n".encode())
    draw(folder / FIGURE, summary)
    return summary


def main(args: Args) -> None:
    """Writes everything, the committed page too for the committed records, and shows the tables."""
    summary = report(args.results, args.preset)
    made = all_tables(summary)
    console = rich.get_console()
    for table in made.values():
        console.print(table.rich())
    if args.results == RESULTS:
        page = HERE / "REPORT.md"
        write_atomically(page, fill_in(page.read_text(), made).encode())
    for what, name in (("numbers", SUMMARY), ("picture", FIGURE)):
        console.print(f"{what}  {args.results / name}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    CommandLine("examples.finetune.study.report", Args, __doc__).run(main)
