"""The rows of `benchmarks.wire` as tables of 80 columns."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.targets import Target, compiler
from benchmarks.wire.cases import CASES
from benchmarks.wire.limits import holds_as_compiled, total_of

NOTES = {
    "cpu": "XLA:CPU reduces gradients by all-reduce, so the second ratio is held to the limit",
    "tpu": "over many chips the second ratio is held to the limit",
}


def show(console: Console, target: Target, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one target, case by case, in 80 columns."""
    where = {"cpu": "CPU devices", "tpu": "TPU chips", "cuda": "H100s"}[target.platform]
    kind = f" ({target.topology})" if target.platform == "tpu" else ""
    console.print(f"[bold]{target.devices} {where}{kind}, MB per step and device[/bold]")
    console.print(compiler(target))
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
