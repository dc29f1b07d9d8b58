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

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import targets
from benchmarks.harness import environment, write_json
from benchmarks.targets import TARGETS, Target
from benchmarks.wire_cases import CASES

EVEN_WORK = 1.15
STATE = 0.51


@dataclasses.dataclass(frozen=True)
class Expected:
    """The most that muon_jax may send, as a ratio to AdamW, and what else is checked."""

    ratio: float
    work: bool = False


EXPECTED = {
    "separate": Expected(0.79, work=True),
    "deep": Expected(0.79, work=True),
    "stacked-8": Expected(0.79, work=True),
    "stacked-12": Expected(0.83, work=True),
    "stacked-6": Expected(0.83, work=True),
    "few": Expected(0.79),
    "many": Expected(0.79),
    "fsdp": Expected(0.064),
    "experts": Expected(0.0),
    "square": Expected(0.82, work=True),
    "wide": Expected(0.78, work=True),
}

NOTES = {
    "cpu": "XLA:CPU reduces gradients by all-reduce, so the second ratio is held to the limit",
    "tpu": "over many chips the second ratio is held to the limit",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Bytes on the wire per step and device, counted from compiled programs.

    Attributes:
      targets: machines to compile for: cpu-8, v5e-8, h100-8, v5e-256, v6e-256, v5p-128.
      cases: sets of matrices, see wire_cases.py; each names the machines that it is for.
      output: where the JSON goes.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    cases: tuple[str, ...] = tuple(CASES)
    output: Path = Path("runs/benchmarks/wire.json")


class WorkerError(RuntimeError):
    """A process that compiled for a target ended badly."""


def measure(target: Target, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compile cases for a target in a process of its own, and yield its rows as they come.

    Raises:
      WorkerError: with the end of what the process wrote, if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.wire_steps", target.name, *names]
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


def complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row what needs its case's AdamW: the ratios, the work, and the checks."""
    baselines = {(r["target"], r["case"]): r for r in rows if r["optimizer"] == "adamw"}
    done = []
    for row in rows:
        baseline = baselines.get((row["target"], row["case"]))
        done.append(row | (_compare(row, baseline) if baseline else {"checks": {}}))
    return done


def _compare(row: dict[str, Any], adamw: dict[str, Any]) -> dict[str, Any]:
    case, n = CASES[row["case"]], row["devices"]
    total, base = total_of(row), total_of(adamw)
    if case.parameters == "replicated":
        ratio, ideal = total / base, ideal_total(row) / ideal_total(adamw)
    else:
        ratio = ideal = (total - base) / (8 * (n - 1) / n * row["parameters"])
    found: dict[str, Any] = {
        "ratio": ratio,
        "ideal_ratio": ideal,
        "work": (row["flops"] - adamw["flops"]) / row["even_flops"],
        "state_ratio": row["state_bytes"] / adamw["state_bytes"],
        "checks": {},
    }
    if row["optimizer"] == "muon_jax":
        expected = EXPECTED[row["case"]]
        held = ratio if holds_as_compiled(TARGETS[row["target"]]) else ideal
        found["limit"] = expected.ratio
        found["checks"] = {"ratio": held <= expected.ratio, "state": found["state_ratio"] <= STATE}
        if expected.work:
            found["checks"]["work"] = found["work"] <= EVEN_WORK
    return found


def holds_as_compiled(target: Target) -> bool:
    """Whether XLA makes reduce-scatters of gradients there, so that no ideal is needed."""
    return target.platform != "cpu" and target.devices == 8


def total_of(row: dict[str, Any]) -> float:
    """All bytes of a row."""
    return sum(row["bytes"].values())


def ideal_total(row: dict[str, Any]) -> float:
    """All bytes, the gradient reduction replaced by a reduce-scatter in float32."""
    n = row["devices"]
    return total_of(row) - row["bytes"]["reduction"] + 4 * (n - 1) / n * row["parameters"]


def show(console: Console, target: Target, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one target, case by case, in 80 columns."""
    where = {"cpu": "CPU devices", "tpu": "TPU chips", "cuda": "H100s"}[target.platform]
    kind = f" ({target.topology})" if target.platform == "tpu" else ""
    console.print(f"[bold]{target.devices} {where}{kind}, MB per step and device[/bold]")
    if not holds_as_compiled(target):
        console.print(NOTES[target.platform])
    console.print(_table([], header=True))
    for case in dict.fromkeys(row["case"] for row in rows):
        console.print(f"[italic]{case}: {CASES[case].title}[/italic]")
        shown = [row for row in rows if row["case"] == case]
        console.print(_table(shown, header=False))
        for row in shown:
            if failed := [name for name, passed in row["checks"].items() if not passed]:
                console.print(f"[red]over the limit: {', '.join(failed)}[/red]")
    console.print()


COLUMNS = {
    "optimizer": 11, "reduce": 6, "exchange": 8, "gather": 6, "total": 6, "ratio": 5, "ideal": 5,
    "limit": 5, "": 1, "ops": 4, "work": 5, "state": 5,
}  # fmt: skip


def _table(rows: list[dict[str, Any]], header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=header)
    for name, width in COLUMNS.items():
        justify = "left" if name == "optimizer" else "right"
        table.add_column(name, width=width, justify=justify, no_wrap=True)
    for row in rows:
        sent, adamw = row["bytes"], row["optimizer"].startswith("adamw")
        table.add_row(
            row["optimizer"],
            _megabytes(sent["reduction"] + sent["loss"]),
            _megabytes(sent["exchange"]),
            _megabytes(sent["gather"]),
            _megabytes(total_of(row)),
            _number(row.get("ratio")),
            _number(row.get("ideal_ratio")),
            _number(row.get("limit")),
            _mark(row["checks"]),
            str(sum(row["collectives"].values())),
            "" if adamw else _number(row.get("work")),
            _number(row.get("state_ratio")),
        )
    return table


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mark(checks: dict[str, bool]) -> str:
    if not checks:
        return ""
    return "[green]✓[/green]" if all(checks.values()) else "[red]✗[/red]"


def main(args: Args) -> dict[str, Any]:
    """Compile, print the tables, write the JSON."""
    for given, known in ((args.targets, TARGETS), (args.cases, CASES)):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    console = Console()
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
    main(tyro.cli(Args))
