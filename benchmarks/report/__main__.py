"""The docs' tables and pictures from the records: `python -m benchmarks.report`.

Reads `docs/results/*.json`, measures nothing, and writes the tables between the marks of
docs/benchmarks.md, and beside the page the pictures. A record that is not there leaves its table
with a line that says so, and draws nothing.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import rich

from benchmarks.report import figures, tables
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.files import write_atomically
from examples.scaling_law.report import fill_in

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "benchmarks.md"
RECORDS = ("step", "orthogonalize", "accelerator")


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the tables and pictures of docs/benchmarks.md again.

    Attributes:
      docs: the folder with the page and `results`.
    """

    docs: Path = DOCS


def read_records(docs: Path) -> dict[str, Any]:
    """The records that are there, by name."""
    paths = {name: docs / "results" / f"{name}.json" for name in RECORDS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main(args: Args) -> None:
    """Writes the page and the pictures, and shows the tables."""
    records = read_records(args.docs)
    made = tables.all_tables(records)
    console = rich.get_console()
    for table in made.values():
        console.print(table.rich())
    page = args.docs / PAGE
    write_atomically(page, fill_in(page.read_text(), made).encode())
    for path in (page, *figures.draw_all(records, args.docs)):
        console.print(f"written to {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    CommandLine("benchmarks.report", Args, __doc__).run(main)
