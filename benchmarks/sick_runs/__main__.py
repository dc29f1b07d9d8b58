"""Train healthy and sick, and draw it: `python -m benchmarks.sick_runs`.

A small transformer on characters of Python's standard library, once as it should be and once for
each mistake of docs/debugging.md. What the page shows is made with

    python -m benchmarks.sick_runs --output docs/results/sick_runs.json --figures docs

and drawn again, without training, with `--record docs/results/sick_runs.json --figures docs`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks.harness import environment, make_console, write_json
from benchmarks.sick_runs import figure
from benchmarks.sick_runs.cases import CASES
from benchmarks.sick_runs.train import batches, run


@dataclasses.dataclass(frozen=True)
class Args:
    """All runs, one after the other.

    Attributes:
      records: how many records each run has.
      every: the number of steps of a record.
      batch: the number of pieces of text in a step.
      length: the number of characters of one.
      width: the model's width.
      layers: the number of its layers.
      output: where the JSON goes.
      figures: the folder that the pictures go to.
      record: an earlier output, to be drawn again instead of training.
    """

    records: int = 50
    every: int = 5
    batch: int = 16
    length: int = 64
    width: int = 64
    layers: int = 3
    output: Path = Path("runs/benchmarks/sick_runs.json")
    figures: Path = Path("runs/benchmarks")
    record: Path | None = None


def main(args: Args) -> None:
    """Train and write the record, or read one; draw the pictures, print the table."""
    console = make_console()
    if args.record is None:
        write_json(args.output, _train(args, console))
    record = json.loads((args.record or args.output).read_text())
    args.figures.mkdir(parents=True, exist_ok=True)
    for path in figure.draw(args.figures, record["runs"], record["every"]):
        console.print(f"drew {path}")
    print(figure.table(record["runs"]))


def _train(args: Args, console: Console) -> dict[str, Any]:
    texts = batches(args.records, args.every, args.batch, args.length)
    runs = {}
    for name, case in CASES.items():
        values = run(case, texts, args.width, args.layers)
        runs[name] = {key: [float(f"{x:.4g}") for x in each] for key, each in values.items()}
        loss = values["loss"]
        console.print(f"{case.title}: loss {loss[0]:.2f} to {loss[-1]:.2f}")
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int)}
    return environment("jax") | settings | {"runs": runs}


if __name__ == "__main__":
    main(tyro.cli(Args))
