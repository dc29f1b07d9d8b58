"""Where Gram Newton-Schulz is as good as the plain iteration, and cheaper: a search.

`python -m benchmarks.polar_error.gram_search` tries all sets of restarts, formats and shapes. A
variant passes where none of three spectra ends further from the polar factor than with the plain
iteration, by more than the rounding of bfloat16, and no singular value ends higher by two of them.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import environment, write_json
from benchmarks.polar_error import count
from benchmarks.polar_error.gram import ARITHMETICS, gram_newton_schulz
from benchmarks.polar_error.spectra import SPECTRA, Problem, problem
from examples.moonlight.common.command_line import CommandLine
from muon_jax._polynomials import Schedule, resolve_schedule
from muon_jax._preconditioning import precondition

ROUNDING = 2.0**-7
"""What counts as equal: a bfloat16 has 8 significant bits, so that it is 2^-8 to 2^-7 of 1."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the Gram form is rounded: the format of X, that of R, Q and P, and where a I is."""

    x: str
    gram: str
    identity_apart: bool

    def __str__(self) -> str:
        gram = "" if self.gram == self.x else f", R in {self.gram}"
        return f"{self.x}{gram}, a I {'apart' if self.identity_apart else 'inside'}"


VARIANTS = (
    Variant("bfloat16", "bfloat16", identity_apart=False),
    Variant("bfloat16", "bfloat16", identity_apart=True),
    Variant("bfloat16", "float16", identity_apart=True),
    Variant("float16", "float16", identity_apart=True),
    Variant("bfloat16", "float32", identity_apart=True),
    Variant("float32", "float32", identity_apart=True),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Search restarts and formats of Gram Newton-Schulz.

    Attributes:
      rows: rows of the matrices; their columns are as many times an aspect ratio.
      aspects: the aspect ratios.
      schedules: names that `muon_jax.orthogonalize` accepts.
      preconditioning: what divides the matrices, as there.
      seeds: how many matrices of each spectrum.
      output: where the JSON goes.
    """

    rows: int = 128
    aspects: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[str, ...] = ("standard", "polar_express", "minimax")
    preconditioning: str = "frobenius"
    seeds: int = 1
    output: Path = Path("runs/benchmarks/gram_search.json")


def restarts(steps: int) -> Iterator[tuple[int, ...]]:
    """All sets of restarts, from none to one after each step but the last: the plain iteration."""
    for many in range(steps):
        yield from itertools.combinations(range(1, steps), many)


def measure(
    problems: list[Problem],
    schedule: Schedule,
    after: tuple[int, ...],
    variant: Variant,
    preconditioning: str,
) -> list[dict[str, float]]:
    """The errors of all problems."""
    arithmetic = ARITHMETICS[variant.x]
    x = jnp.stack([each.x for each in problems]).astype(jnp.float32)
    x, _ = precondition(x, preconditioning, arithmetic)
    small = ARITHMETICS[variant.gram]
    out = gram_newton_schulz(x, schedule, after, arithmetic, small, variant.identity_apart)
    return [each.error(result) for each, result in zip(problems, out, strict=True)]


def passes(errors: list[dict[str, float]], plain: list[dict[str, float]]) -> bool:
    """Whether no matrix ends further away, or with a larger singular value, than without it."""
    return all(
        ours[key] <= theirs[key] + (2 if key == "largest" else 1) * ROUNDING
        for ours, theirs in zip(errors, plain, strict=True)
        for key in ("error", "distance", "largest")
    )


def rows(args: Args) -> Iterator[dict[str, Any]]:
    """One row for each aspect ratio, schedule, set of restarts and variant."""
    cases = list(itertools.product(args.aspects, args.schedules))
    for aspect, name in track(cases, "aspect ratios and schedules"):
        shape = args.rows, args.rows * aspect
        problems = [
            problem(spectrum, *shape, "bfloat16", seed)
            for seed in range(args.seeds)
            for spectrum in SPECTRA
        ]
        schedule = resolve_schedule(name)
        every = tuple(range(1, len(schedule)))
        plain = {x: measure(problems, schedule, every, Variant(x, x, True), args.preconditioning)
                 for x in {variant.x for variant in VARIANTS}}  # fmt: skip
        for after, variant in itertools.product(restarts(len(schedule)), VARIANTS):
            if after == every:
                continue
            errors = measure(problems, schedule, after, variant, args.preconditioning)
            products, without = count.gram(schedule, after), count.plain(schedule)
            yield {
                "aspect": aspect,
                "schedule": name,
                "restarts": after,
                "variant": str(variant),
                "products": products.all,
                "flops": products.flops(*shape),
                "work": products.flops(*shape) / without.flops(*shape),
                "errors": errors,
                "plain": plain[variant.x],
                "passes": passes(errors, plain[variant.x]),
            }


def largest(errors: list[dict[str, float]]) -> float:
    """The largest singular value of all."""
    return max(each["largest"] for each in errors)


def main(args: Args) -> dict[str, Any]:
    """Search, print what passes everywhere and what breaks, and write all of it."""
    found = list(rows(args))
    console = Console()
    table = Table(
        title="largest singular value over all shapes and spectra; + passes everywhere",
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
                cells.append(f"{max((largest(row['errors']) for row in of), default=0):.2f}{mark}")
            work = {row["aspect"]: f"{row['work']:.2f}" for row in mine}
            shown = ", ".join(map(str, after)) or "none"
            table.add_row(shown, variant, *cells, *(work.get(a, "") for a in args.aspects))
    console.print(table)
    record = {
        "environment": environment("jax", "numpy"),
        "rounding": ROUNDING,
        "args": {**dataclasses.asdict(args), "output": None},
        "rows": found,
    }
    write_json(args.output, record)
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.polar_error.gram_search", Args, __doc__).run(main)
