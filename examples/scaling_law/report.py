"""From finished runs to numbers, figures and tables.

    python -m examples.scaling_law.report

reads `runs.jsonl` of a folder, the committed results unless told otherwise, and writes what can be
made of it: `summary.json`, `figures/*.png`, and, given a page, the tables between its marks. It
trains nothing, and the same runs give the same files.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.files import write_atomically
from examples.scaling_law import figures, tables
from examples.scaling_law.ablations import ablations
from examples.scaling_law.analysis import summarize, summarize_ablation
from examples.scaling_law.protocol import Run
from examples.scaling_law.store import RUNS, Record, read_runs
from examples.scaling_law.studies import STUDIES, Study

HERE = Path(__file__).parent
SUMMARY = "summary.json"
FIGURES = "figures"


@dataclasses.dataclass(frozen=True)
class Args:
    """Draws and tabulates finished runs."""

    results: Path = HERE / "results"
    """Folder with `runs.jsonl`; `summary.json` and the figures are written into it."""
    page: Path | None = None
    """Markdown file whose tables are brought up to date; left out, REPORT.md for the committed
    results, and none for others."""


def report(
    folder: Path, *, corpus: str | None = None, studies: Mapping[str, Study] = STUDIES
) -> dict[str, Any]:
    """Summarises and draws every study of a folder whose runs are all there.

    Args:
        folder: Where `runs.jsonl` is.
        corpus: Hash of the corpus whose runs are reported; None where there is but one.
        studies: The studies by name; ablations belong to the one named "main".

    Returns:
        What `summary.json` holds: a summary for each study by name, and "ablations" by theirs.

    Raises:
        FileNotFoundError: There are no runs.
        ValueError: They are not of one corpus, or no study is complete.
    """
    if not (folder / RUNS).is_file():
        raise FileNotFoundError(
            f"{folder / RUNS} is not there: run `python -m {__package__} --output-dir {folder}`"
        )
    records = read_runs(folder / RUNS, corpus)
    summary: dict[str, Any] = {}
    for name, study in studies.items():
        if is_complete(study, records):
            summary[name] = summarize(study, records)
    main_study = studies.get("main")
    if main_study is not None and is_tuned(main_study, records):
        law = main_study.tuned(records)
        declared = ablations(lambda size: main_study.run(law, size, "muon", 0))
        summary["ablations"] = {
            name: summarize_ablation(ablation, records)
            for name, ablation in declared.items()
            if all(run in records for run in ablation.runs)
        }
    if not any(name in summary for name in studies) and not summary.get("ablations"):
        raise ValueError(
            f"{folder / RUNS}: no study is complete; `python -m {__package__} --output-dir "
            f"{folder}` goes on where it stopped"
        )
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(folder / SUMMARY, text.encode())
    draw(json.loads(text), folder / FIGURES)
    return json.loads(text)


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what there is into PNG files, and returns their paths."""
    drawn = []

    def add(function: Any, name: str, *args: Any) -> None:
        function(folder / f"{name}.png", *args)
        drawn.append(folder / f"{name}.png")

    for name, study in summary.items():
        if name == "ablations":
            continue
        suffix = "" if name == "main" else f"_{name}"
        add(figures.draw_scaling, f"scaling{suffix}", study)
        add(figures.draw_ratios, f"ratios{suffix}", study)
        if tables.has_own_tuning(name, summary):
            add(figures.draw_bowls, f"bowls{suffix}", study)
    there = summary.get("ablations", {})
    compared = {"learning_rate", "batch", "update_rms", "newton_schulz", "scales", "routing"}
    if compared <= there.keys():
        add(figures.draw_ablations, "ablations", there)
    for name in ("entropy", "weight_decay"):
        if name in there:
            add(getattr(figures, f"draw_{name}"), name, there[name])
    return drawn


def fill_in(page: str, made: Mapping[str, tables.Table]) -> str:
    """A page with its tables made anew: those between `<!-- table: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: A mark names a table that there is not, or has no end.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(made)}")
        return f"<!-- table: {name} -->\n\n{made[name].markdown()}\n\n<!-- end -->"

    filled = re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", table, page, flags=re.DOTALL)
    if filled.count("<!-- table:") != filled.count("<!-- end -->"):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- end -->` after it")
    return filled


def is_tuned(study: Study, records: Mapping[Run, Record]) -> bool:
    """Whether every cell of the study's grids is there."""
    return all(run in records for runs in study.tuning_runs().values() for run in runs)


def is_complete(study: Study, records: Mapping[Run, Record]) -> bool:
    """Whether every run of the study is there."""
    return is_tuned(study, records) and all(
        run in records for run in study.runs(study.tuned(records))
    )


def main(args: Args) -> None:
    """Writes everything and says where it is."""
    summary = report(args.results)
    console = rich.get_console()
    for table in tables.all_tables(summary).values():
        console.print(table.rich())
    page = args.page
    if page is None and args.results == Args.results:
        page = HERE / "REPORT.md"
    if page is not None:
        write_atomically(page, fill_in(page.read_text(), tables.all_tables(summary)).encode())
        console.print(f"tables   {page}", highlight=False, soft_wrap=True)
    console.print(f"numbers  {args.results / SUMMARY}", highlight=False, soft_wrap=True)
    console.print(f"figures  {args.results / FIGURES}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    CommandLine("examples.scaling_law.report", Args, __doc__).run(main)
