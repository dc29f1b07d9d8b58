"""Count the bytes that a training step sends: `python -m benchmarks.wire`.

Whole steps, gradients of a loss on a sharded batch included, are compiled for eight CPU devices,
for TPU slices and for eight H100s, none of which need be there (`benchmarks.targets` says what to
install; rows that cannot be compiled are named and left out). `benchmarks.hlo` counts what crosses
the network on each device, apart for the reduction of gradients, the exchange that makes matrices
whole, and the gather of updates.

The first ratio is to ZeRO-1 AdamW with a float32 gather, as compiled. In the second, each side's
gradient reduction counts as the reduce-scatter that ZeRO-1 needs, 4 (N-1)/N bytes per parameter:
XLA:CPU makes an all-reduce of it, and XLA:TPU does on many chips, whatever the optimizer is.
Where parameters are sharded already, the ratio is what the optimizer adds to the same step with
AdamW, to all that ZeRO-1 AdamW sends for as many replicated parameters.

"ops" are the collectives of a step. "work" is the FLOPs of the products that one device adds to
AdamW's step, to an even share of Newton-Schulz. "state" is the optimizer state of one device, to
AdamW's.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import targets
from benchmarks.harness import check_known, environment, make_console, write_json
from benchmarks.targets import TARGETS, Target
from benchmarks.wire.cases import CASES, OPTIMIZERS
from benchmarks.wire.limits import complete
from benchmarks.wire.tables import show
from examples.moonlight.common.command_line import CommandLine


@dataclasses.dataclass(frozen=True)
class Args:
    """Bytes on the wire per step and device, counted from compiled programs.

    Attributes:
      targets: machines to compile for: cpu-8, v5e-8, h100-8, v5e-256, v6e-256, v5p-128.
      cases: sets of matrices, see wire/cases.py; each names the machines that it is for.
      output: where the JSON goes.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    cases: tuple[str, ...] = tuple(CASES)
    output: Path = Path("runs/benchmarks/wire.json")


class WorkerError(RuntimeError):
    """A process that compiled for a target ended badly."""


def measure(
    target: Target, names: Sequence[str], optimizers: Sequence[str] = OPTIMIZERS
) -> Iterator[dict[str, Any]]:
    """Compile cases for a target in a process of its own, and yield its rows as they come.

    Args:
      target: what to compile for.
      names: the cases.
      optimizers: those of a case's optimizers that are compiled.

    Raises:
      WorkerError: with the end of what the process wrote, if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.wire.steps", target.name]
    command += [",".join(names), ",".join(optimizers)]
    variables = targets.environment(target)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=targets.ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as worker,
    ):
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                yield json.loads(line)
        except BaseException:
            worker.kill()
            raise
        if worker.wait():
            errors.seek(0)
            tail = "".join(errors.readlines()[-15:])
            raise WorkerError(f"{target.name}: exit status {worker.returncode}\n{tail}")


def main(args: Args) -> dict[str, Any]:
    """Compile, print the tables, write the JSON."""
    check_known(args.targets, TARGETS)
    check_known(args.cases, CASES)
    console = make_console()
    record: dict[str, Any] = {"left_out": {}, "rows": []}
    for name in args.targets:
        target = TARGETS[name]
        cases = [case for case in args.cases if name in CASES[case].targets]
        if not cases:
            continue
        if reason := targets.missing(target):
            record["left_out"][name] = reason
            console.print(f"[yellow]{name}[/yellow] {reason}\n", soft_wrap=True)
            continue
        rows = []
        try:
            rows += _with_progress(console, target, cases)
        except WorkerError as error:
            record["left_out"][name] = str(error)
            console.print(f"[red]{error}[/red]", markup=True, soft_wrap=True)
        if rows := complete(rows):
            record["rows"] += rows
            show(console, target, rows)
    versions = ("jax", "jaxlib", "optax")
    record = {"environment": environment(*versions) | targets.compiler_versions()} | record
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


def _with_progress(console: Console, target: Target, cases: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a target, with a line that says what is being compiled."""
    coming = [(case, optimizer) for case in cases for optimizer in CASES[case].optimizers]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        work = measure(target, cases)
        for number, (case, optimizer) in enumerate(coming, 1):
            what = f"{target.name} {number}/{len(coming)}: compiling {case}, {optimizer}"
            progress.update(task, description=what)
            rows.append(next(work))
        list(work)
    return rows


if __name__ == "__main__":
    CommandLine("benchmarks.wire", Args, __doc__).run(main)
