"""Count what an optimizer's step reads and writes: `python -m benchmarks.traffic`.

A step, `apply_updates` included, is compiled for one device of each target, none of which need be
there (`benchmarks.targets` says what to install). `benchmarks.hlo.traffic` counts the bytes that it
moves between the processor and its main memory, for each element of the parameters.

"around" is all but the orthogonalization, which stands apart as "Newton-Schulz": there each product
reads its factors once, which no device does. Of "around", 20 bytes are the least: gradient,
momentum and parameter are read, momentum and parameter written, in float32; and 8 more where the
direction and its result pass through the memory in bfloat16. AdamW's least is 28. Optax marks no
scope of its own, so its iteration counts as "around". "temporary" is what the program allocates
beside its arguments and results.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import targets
from benchmarks.harness import check_known, environment, make_console, write_json
from benchmarks.targets import TARGETS
from benchmarks.traffic.steps import CASES
from examples.moonlight.common.command_line import CommandLine


@dataclasses.dataclass(frozen=True)
class Args:
    """Bytes that a step reads and writes, counted from compiled programs.

    Attributes:
      targets: machines to compile for; one device of each.
      cases: sets of leaves: experts (one layer's of Moonlight-16B-A3B), separate (four layers).
      output: where the JSON goes.
    """

    targets: tuple[str, ...] = ("cpu-8", "v5e-8", "h100-8")
    cases: tuple[str, ...] = tuple(CASES)
    output: Path = Path("runs/benchmarks/traffic.json")


def measure(name: str, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a target, counted in a process of its own.

    Raises:
      RuntimeError: with the end of what the process wrote, if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.traffic.steps", name, *cases]
    done = subprocess.run(
        command,
        cwd=targets.ROOT,
        env=targets.environment(TARGETS[name]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The rows of a target."""
    target = TARGETS[rows[0]["target"]]
    title = f"{target.name}: bytes for each element, {targets.compiler(target)}"
    table = Table(title=title, title_justify="left")
    for column in ("leaves", "optimizer", "around", "Newton-Schulz", "temporary"):
        table.add_column(column, justify="left" if column in ("leaves", "optimizer") else "right")
    for row in rows:
        figures = (f"{row[key]:.1f}" for key in ("around", "within", "temporary"))
        table.add_row(row["case"], row["optimizer"], *figures)
    return table


def main(args: Args) -> dict[str, Any]:
    """Compile, print the tables, write the JSON."""
    check_known(args.targets, TARGETS)
    check_known(args.cases, CASES)
    console = make_console()
    record: dict[str, Any] = {"left_out": {}, "rows": []}
    for name in args.targets:
        if reason := targets.missing(TARGETS[name]):
            record["left_out"][name] = reason
            console.print(f"[yellow]{name}[/yellow] {reason}\n", soft_wrap=True)
            continue
        with console.status(f"{name}: compiling {', '.join(args.cases)}"):
            rows = measure(name, args.cases)
        record["rows"] += rows
        console.print(table_of(rows))
    versions = environment("jax", "jaxlib", "optax") | targets.compiler_versions()
    record = {"environment": versions} | record
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.traffic", Args, __doc__).run(main)
