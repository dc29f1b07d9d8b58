"""Every table of docs/benchmarks.md that is made from a record."""

from collections.abc import Mapping
from typing import Any

from benchmarks.accelerator.tables import summary
from benchmarks.orthogonalize.tables import all_tables as orthogonalize_tables
from benchmarks.report.steps import step_table
from examples.scaling_law.tables import Table


def all_tables(records: Mapping[str, Any]) -> dict[str, Table]:
    """The tables by the names of their marks; one without a record says how to make it."""
    step, orthogonalize = records.get("step"), records.get("orthogonalize")
    accelerator = records.get("accelerator")
    made = {
        "step": step_table(step["cases"]) if step else _missing("step"),
        "step/machine": machine(step) if step else _missing("step"),
        "orthogonalize/machine": machine(orthogonalize)
        if orthogonalize
        else _missing("orthogonalize"),
    }
    of_shapes = orthogonalize_tables(orthogonalize["rows"] if orthogonalize else [])
    made |= {f"orthogonalize/{name}": table for name, table in of_shapes.items()}
    made["accelerator"] = summary(accelerator) if accelerator else _missing("accelerator")
    return made


def machine(record: Mapping[str, Any]) -> Table:
    """What a record was measured on, and the limits that it is held against."""
    there = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in there["versions"].items())
    peaks = record.get("matmul_peak_flops") or {}
    products = ", ".join(f"{speed / 1e9:,.0f} in {name}" for name, speed in peaks.items())
    row = (
        there["processor"] if there["device"] == "cpu: cpu" else there["device"],
        f"{there['cpus']}",
        versions,
        products or "not measured",
        f"{record['load_average']:.1f}" if "load_average" in record else "not recorded",
        f"{there['time'][:10]}, {there['commit']}",
    )
    columns = ("device", "cores", "versions", "products, GFLOP/s", "load before", "when")
    return Table("Measured on", columns, [row])


def _missing(name: str) -> Table:
    return Table(name, ("not measured yet",), [(f"`python -m benchmarks.{name}`",)])
