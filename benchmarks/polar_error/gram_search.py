"""Where Gram Newton-Schulz is as good as the plain iteration, and cheaper: a search.

`python -m benchmarks.polar_error.gram_search` tries all sets of restarts, formats and shapes on
four spectra. A variant passes where no result is further from exact arithmetic than 5/4 of what
the plain iteration's is, which rounds as often: float64 says what is exact.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.progress import track
from rich.table import Table

from benchmarks.harness import environment, make_console, write_json
from benchmarks.polar_error.gram import ARITHMETICS, Apart, gram_newton_schulz, products
from benchmarks.polar_error.spectra import SEARCHED, Problem, problem
from examples.moonlight.common.command_line import CommandLine
from muon_jax._polynomials import Schedule, resolve_schedule
from muon_jax._preconditioning import precondition
from muon_jax._products import one_by_one

LIMIT = 5 / 4
"""Distances from exact arithmetic differ by a tenth between two Gaussian matrices."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the Gram form is rounded: the format of X, that of R, P and Q, and what is left out."""

    x: str
    gram: str
    apart: Apart

    def __str__(self) -> str:
        gram = "" if self.gram == self.x else f", R in {self.gram}"
        return f"{self.x}{gram}, {self.apart} apart"


VARIANTS = (
    Variant("bfloat16", "bfloat16", "nothing"),
    Variant("bfloat16", "bfloat16", "a"),
    Variant("bfloat16", "bfloat16", "mean"),
    Variant("bfloat16", "float16", "mean"),
    Variant("bfloat16", "float32", "mean"),
    Variant("float32", "float32", "mean"),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Search restarts and formats of Gram Newton-Schulz.

    Attributes:
      rows: rows of the matrices; their columns are as many times an aspect ratio.
      aspects: the aspect ratios.
      schedules: names that `muon_jax.orthogonalize` accepts.
      seeds: how many matrices of each spectrum.
      output: where the JSON goes.
    """

    rows: int = 128
    aspects: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[str, ...] = ("standard", "polar_express", "minimax")
    seeds: int = 1
    output: Path = Path("runs/benchmarks/gram_search.json")


def restarts(steps: int) -> Iterator[tuple[int, ...]]:
    """All sets of restarts, from none to one after each step but the last: the plain iteration."""
    for many in range(steps):
        yield from itertools.combinations(range(1, steps), many)


def exact(x: np.ndarray, schedule: Schedule) -> np.ndarray:
    """The plain iteration in float64, from a matrix of any scale."""
    x = x / np.linalg.norm(x)
    for a, b, c in schedule:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def measure(
    problems: list[Problem], schedule: Schedule, after: tuple[int, ...], variant: Variant
) -> list[dict[str, float]]:
    """The errors of all problems; `rounding` is the distance from exact arithmetic, relative."""
    arithmetic = ARITHMETICS[variant.x]
    x = jnp.stack([each.x for each in problems]).astype(jnp.float32)
    x, _ = precondition(x, "frobenius", arithmetic)
    small = ARITHMETICS[variant.gram]
    results = gram_newton_schulz(x, schedule, after, arithmetic, small, variant.apart)
    return [
        each.error(result) | {"rounding": _away(result, exact(np.asarray(each.x, float), schedule))}
        for each, result in zip(problems, results, strict=True)
    ]


def _away(result: Any, expected: np.ndarray) -> float:
    values = np.asarray(result, float)
    if not np.isfinite(values).all():
        return np.inf
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def passes(errors: list[dict[str, float]], plain: list[dict[str, float]]) -> bool:
    """Whether rounding takes no matrix further than `LIMIT` of where it takes the plain one's."""
    return furthest(errors, plain) <= LIMIT


def furthest(errors: list[dict[str, float]], plain: list[dict[str, float]]) -> float:
    """The largest distance from exact arithmetic, to the plain iteration's of the same matrix."""
    return max(
        ours["rounding"] / theirs["rounding"] for ours, theirs in zip(errors, plain, strict=True)
    )


def rows(args: Args) -> Iterator[dict[str, Any]]:
    """One row for each aspect ratio, schedule, set of restarts and variant."""
    cases = list(itertools.product(args.aspects, args.schedules))
    for aspect, name in track(cases, "aspect ratios and schedules"):
        shape = args.rows, args.rows * aspect
        problems = [
            problem(spectrum, *shape, "bfloat16", seed)
            for seed in range(args.seeds)
            for spectrum in SEARCHED
        ]
        schedule = resolve_schedule(name)
        every = tuple(range(1, len(schedule)))
        formats = {variant.x for variant in VARIANTS}
        plain = {x: measure(problems, schedule, every, Variant(x, x, "a")) for x in formats}
        for after, variant in itertools.product(restarts(len(schedule)), VARIANTS):
            if after == every:
                continue
            errors = measure(problems, schedule, after, variant)
            taken, without = products(schedule, after), one_by_one(schedule)
            yield {
                "aspect": aspect,
                "schedule": name,
                "restarts": after,
                "variant": str(variant),
                "products": taken.all,
                "flops": taken.flops(*shape),
                "work": taken.flops(*shape) / without.flops(*shape),
                "errors": errors,
                "plain": plain[variant.x],
                "furthest": furthest(errors, plain[variant.x]),
                "passes": passes(errors, plain[variant.x]),
            }


def main(args: Args) -> dict[str, Any]:
    """Search, print what passes everywhere and what breaks, and write all of it."""
    found = list(rows(args))
    console = make_console()
    table = Table(
        title="distance from exact arithmetic to the plain iteration's, the largest; + passes",
        title_justify="left",
        box=None,
    )
    table.add_column("restarts after")
    table.add_column("rounding")
    for name in args.schedules:
        table.add_column(name, justify="right")
    for aspect in args.aspects:
        table.add_column(f"work {aspect}:1", justify="right")
    for after in dict.fromkeys(row["restarts"] for row in found):
        for variant in dict.fromkeys(row["variant"] for row in found):
            mine = [row for row in found if (row["restarts"], row["variant"]) == (after, variant)]
            cells = []
            for name in args.schedules:
                of = [row for row in mine if row["schedule"] == name]
                mark = "+" if of and all(row["passes"] for row in of) else " "
                away = max((row["furthest"] for row in of), default=0)
                cells.append(f"{away:.2f}{mark}" if away < 1e3 else f"{away:.0e} ")
            work = {row["aspect"]: f"{row['work']:.2f}" for row in mine}
            shown = ", ".join(map(str, after)) or "none"
            table.add_row(shown, variant, *cells, *(work.get(a, "") for a in args.aspects))
    console.print(table)
    record = {
        "environment": environment("jax", "numpy"),
        "limit": LIMIT,
        "args": {**dataclasses.asdict(args), "output": None},
        "rows": found,
    }
    write_json(args.output, record)
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.polar_error.gram_search", Args, __doc__).run(main)
