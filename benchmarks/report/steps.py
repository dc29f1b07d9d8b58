"""Whole steps as a table of a page; `benchmarks.step` prints a longer one for each tree."""

from collections.abc import Mapping
from typing import Any

from benchmarks.orthogonalize.tables import NAMES, percent
from benchmarks.step import TITLES
from examples.scaling_law.tables import Table


def step_table(cases: Mapping[str, Any]) -> Table:
    """A row for each tree: times and compile times to Optax, memory, and the share of the peak."""
    columns = (
        "",
        "muon_jax",
        *(f"{NAMES[peer]}" for peer in ("optax", "torch", "adamw")),
        "muon_jax to Optax",
        "torch to Optax",
        "compile to Optax",
        "memory",
        "of bfloat16's peak",
    )
    return Table("Whole steps", columns, [_step(case, found) for case, found in cases.items()])


def _step(case: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    rows = found["optimizers"]
    ours, optax = rows.get("muon_jax", {}), rows.get("optax", {})
    memory = f"{_show(ours, 'temporary_bytes', '.0f', 1e-6)} MB"
    shares = ours.get("share_of_peak") or {}
    return (
        f"{TITLES[case]}: {found['leaves']} leaves, {found['parameters'] / 1e6:.1f}M",
        *(f"{_show(rows.get(peer, {}), 'step_s', '.1f', 1e3)} ms" for peer in NAMES),
        *(_show(rows.get(peer, {}), "step_s_to_optax", ".2f") for peer in ("muon_jax", "torch")),
        _show(ours, "compile_s_to_optax", ".2f"),
        f"{memory} (Optax {_show(optax, 'temporary_bytes', '.0f', 1e-6)})",
        percent(shares.get("bfloat16")),
    )


def _show(row: Mapping[str, Any], key: str, form: str, factor: float = 1.0) -> str:
    if "error" in row:
        return row["error"]
    value = row.get(key)
    return "-" if value is None else format(value * factor, form)
