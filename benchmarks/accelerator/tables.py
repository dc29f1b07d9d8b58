"""The record of a run as tables, for the terminal and for docs/benchmarks.md."""

from collections.abc import Mapping
from typing import Any

from benchmarks.model_shapes import TITLES
from benchmarks.orthogonalize.sides import PEERS
from benchmarks.orthogonalize.tables import NAMES, percent
from benchmarks.orthogonalize.tables import all_tables as shape_tables
from benchmarks.report.steps import step_table
from benchmarks.step import TITLES as CASES
from examples.scaling_law.tables import Table


def all_tables(record: Mapping[str, Any]) -> dict[str, Table]:
    """Tables by name: correctness, limits, shapes, whole steps, the training step, and failures."""
    made = {"correctness": _correctness(record), "limits": _limits(record)}
    made |= shape_tables(record["shapes"])
    made["steps"] = step_table(record["cases"])
    if record["training"]:
        made["training"] = _training(record["training"])
    if record["failed"]:
        failed = [(key, said) for key, said in record["failed"].items()]
        made["failed"] = Table("Rows that failed, and are tried again", ("row", "error"), failed)
    return made


def summary(record: Mapping[str, Any]) -> Table:
    """The whole run as one table: milliseconds of a matrix and of a step."""
    columns = ("", *(f"{NAMES[peer]}, ms" for peer in PEERS), "to Optax", "to torch", "of bfloat16")
    right = sum(row["right"] for row in record["correctness"])
    there = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in there["versions"].items())
    lines: list[tuple[str, ...]] = [
        (f"{there['device']}, {versions}, {record['clock']}", *[""] * 6),
        (f"right: {right} of {len(record['correctness'])} shapes", *[""] * 6),
        *((f"{name}: {limit}", *[""] * 6) for name, limit in _limits(record).rows),
    ]
    for row in record["shapes"]:
        name = f"{TITLES[row['model']]}, {row['rows']} x {row['cols']}"
        lines.append(_line(name, row.get("peers", {}), "matrix_s"))
    for case, found in record["cases"].items():
        lines.append(_line(CASES[case], found["optimizers"], "step_s"))
    if found := record["training"]:
        lines.append(_line(f"a training step of {found['preset']}", found["optimizers"], "step_s"))
    lines += [(f"{key}: {said}", *[""] * 6) for key, said in record["failed"].items()]
    return Table("One accelerator", columns, lines)


def _line(name: str, peers: Mapping[str, Any], key: str) -> tuple[str, ...]:
    seconds = {peer: peers.get(peer, {}).get(key) for peer in PEERS}
    ours = seconds["muon_jax"]
    shares = peers.get("muon_jax", {}).get("share_of_peak") or {}
    return (
        name,
        *("-" if s is None else f"{s * 1e3:.3f}" for s in seconds.values()),
        *(f"{ours / seconds[p]:.2f}x" if ours and seconds[p] else "-" for p in ("optax", "torch")),
        percent(shares.get("bfloat16")),
    )


def _correctness(record: Mapping[str, Any]) -> Table:
    names = sorted({name for row in record["correctness"] for name in row["distance"]})
    lines = [
        (
            f"{row['rows']} x {row['cols']}",
            "yes" if row["right"] else "NO",
            *(f"{row['distance'][n]:.1e}" if n in row["distance"] else "-" for n in names),
        )
        for row in record["correctness"]
    ]
    return Table(
        "Distance from five steps in exact arithmetic, relative", ("shape", "right", *names), lines
    )


def _limits(record: Mapping[str, Any]) -> Table:
    lines = [
        (f"products in {name}", f"{speed / 1e12:.3f} TFLOP/s")
        for name, speed in (record["matmul_peak_flops"] or {}).items()
    ]
    if record["copy_bytes_per_s"]:
        lines.append(("copy, read and written", f"{record['copy_bytes_per_s'] / 1e9:.1f} GB/s"))
    return Table(f"Limits of the device, by the {record['clock']}", ("", "at most"), lines)


def _training(found: Mapping[str, Any]) -> Table:
    lines = []
    for peer, row in found["optimizers"].items():
        if "error" in row:
            lines.append((NAMES[peer], row["error"], "", "", ""))
            continue
        ratio = row["step_s_to_optax"]
        lines.append(
            (
                NAMES[peer],
                f"{row['step_s'] * 1e3:.1f} ms",
                f"{ratio:.2f}x" if ratio else "-",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['first_loss']:.4f}",
            )
        )
    title = (
        f"A training step of {found['preset']}, {found['parameters']['total'] / 1e6:.1f}M "
        f"parameters, {found['batch']} x {found['length']} tokens, {found['dtype']}"
    )
    return Table(title, ("optimizer", "step", "to Optax", "tokens/s", "first loss"), lines)
