"""Cost of a method, and its distance from the polar factor: `python -m benchmarks.polar_error`.

All schedules with all preconditionings, schedules derived for any number of products, and some of
them two steps at once, on three spectra. Errors are the RMS of ``|s - 1|`` (`spectra`), FLOPs those
of matrix products, relative to five steps of the paper's quintic one by one. The library takes two
steps at once where that is cheaper; here it is measured at every shape. What a preconditioning
costs besides is not counted: nothing but elementwise work, and an eigenvalue decomposition for
`spectral`, which no number of products stands for.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import environment, make_console, write_json
from benchmarks.polar_error import derive, figure
from benchmarks.polar_error.gram import ARITHMETICS
from benchmarks.polar_error.spectra import SPECTRA, Problem, problem
from examples.moonlight.common.command_line import CommandLine
from muon_jax import SCHEDULES
from muon_jax._newton_schulz import take
from muon_jax._polynomials import Schedule, resolve_schedule
from muon_jax._preconditioning import Preconditioning, precondition
from muon_jax._products import Products, of_steps, one_by_one

STANDARD = resolve_schedule("standard")
HEADS = ("gaussian", "ill-cond.", "low-rank")


@dataclasses.dataclass(frozen=True)
class Args:
    """Products, FLOPs and polar error of all methods.

    Attributes:
      scale: size of the matrices, relative to 256 rows.
      aspects: their columns to their rows.
      dtypes: in which products are multiplied.
      output: where the JSON goes.
      figure: where the picture goes.
    """

    scale: float = 1.0
    aspects: tuple[int, ...] = (1, 2, 4, 8)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    output: Path = Path("runs/benchmarks/polar_error.json")
    figure: Path = Path("runs/benchmarks/polar_error.png")


@dataclasses.dataclass(frozen=True)
class Method:
    """A schedule, what divides the matrix first, and whether steps are taken two at once."""

    name: str
    schedule: Schedule
    preconditioning: str
    by_twos: bool = False

    @property
    def steps(self) -> list[Schedule]:
        """The steps that are taken together."""
        together = 2 if self.by_twos else 1
        return [self.schedule[k : k + together] for k in range(0, len(self.schedule), together)]

    @property
    def products(self) -> Products:
        """Matrix products of one matrix."""
        spectral = self.preconditioning == "spectral"
        long, short = of_steps(self.steps)
        return Products(long + spectral, short)

    def errors(self, problems: list[Problem], dtype: str) -> list[dict[str, float]]:
        """The errors of all problems."""
        # The library's own steps, operation by operation: to compile as many programs takes longer.
        arithmetic = ARITHMETICS[dtype]
        x = jnp.stack([each.x for each in problems]).astype(jnp.float32)
        x, gram = precondition(x, self.preconditioning, arithmetic)
        for steps in self.steps:
            x, gram = take(x, steps, arithmetic, gram=gram), None
        return [each.error(result) for each, result in zip(problems, x, strict=True)]


def methods() -> list[Method]:
    """All that are measured."""
    schedules = {name: resolve_schedule(name) for name in SCHEDULES}
    schedules |= {f"minimax {steps}": resolve_schedule("minimax", steps) for steps in (3, 4, 6)}
    mixed = {f"mixed {n}": derive.schedule(n) for n in (8, 10, 11, 13, 14)}
    plain = [
        Method(name, schedule, preconditioning)
        for name, schedule in (schedules | mixed).items()
        for preconditioning in get_args(Preconditioning)
    ]
    twos = [
        Method(name, schedules[name], preconditioning, by_twos=True)
        for name in ("standard", "polar_express", "minimax", "minimax 4", "minimax 6")
        for preconditioning in ("frobenius", "aol", "schatten")
    ]
    return plain + twos


def measure(args: Args) -> Iterator[dict[str, Any]]:
    """One row for each method, shape and dtype."""
    size = max(8, round(256 * args.scale))
    cases = list(itertools.product(args.dtypes, args.aspects))
    for dtype, aspect in track(cases, "dtypes and shapes"):
        shape = size, size * aspect
        problems = [problem(spectrum, *shape, dtype) for spectrum in SPECTRA]
        reference = one_by_one(STANDARD).flops(*shape)
        for method in methods():
            errors = method.errors(problems, dtype)
            flops = method.products.flops(*shape)
            yield {
                "method": method.name,
                "preconditioning": method.preconditioning,
                "by_twos": method.by_twos,
                "dtype": dtype,
                "aspect": aspect,
                "products": method.products.all,
                "flops": flops,
                "work": flops / reference,
                "errors": dict(zip(SPECTRA, errors, strict=True)),
                "error": sum(each["error"] for each in errors) / len(errors),
            }


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other beats in FLOPs and error, from the cheapest on."""
    kept, least = [], float("inf")
    for row in sorted(rows, key=lambda row: (row["flops"], row["error"])):
        if row["error"] < least:
            kept.append(row)
            least = row["error"]
    return kept


def show(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    """Print some rows."""
    table = Table(title=title, title_justify="left", box=None)
    for column in ("method", "divided by", "products", "FLOPs", *HEADS, "mean"):
        table.add_column(
            column, justify="left" if column in ("method", "divided by") else "right", no_wrap=True
        )
    for row in rows:
        errors = [f"{row['errors'][spectrum]['error']:.3f}" for spectrum in SPECTRA]
        name = row["method"] + (", by twos" if row["by_twos"] else "")
        cells = [name, row["preconditioning"], str(row["products"]), f"{row['work']:.2f}x"]
        table.add_row(*cells, *errors, f"{row['error']:.3f}")
    console.print(table)


def main(args: Args) -> dict[str, Any]:
    """Measure, print, draw and write."""
    rows = list(measure(args))
    console = make_console()
    for dtype, aspect in itertools.product(args.dtypes, args.aspects):
        here = [row for row in rows if (row["dtype"], row["aspect"]) == (dtype, aspect)]
        for row in here:
            row["front"] = row in front(here)
        paper = [row for row in here if row["method"] in SCHEDULES and not row["by_twos"]]
        paper = [row for row in paper if row["preconditioning"] == "frobenius"]
        show(console, paper, f"{dtype}, {aspect}:1, the schedules as they are")
        show(console, front(here), f"{dtype}, {aspect}:1, the Pareto front")
    figure.draw([row for row in rows if row["dtype"] == args.dtypes[0]], args.figure)
    record = {
        "environment": environment("jax", "numpy"),
        "rows": max(8, round(256 * args.scale)),
        "results": rows,
    }
    write_json(args.output, record)
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.polar_error", Args, __doc__).run(main)
