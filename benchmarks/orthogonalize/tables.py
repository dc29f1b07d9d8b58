"""The rows of a run as tables, for the terminal and for a page."""

from collections.abc import Sequence
from typing import Any

from benchmarks.model_shapes import TITLES, matrices_of
from benchmarks.orthogonalize.sides import PEERS
from examples.scaling_law.tables import Table

Rows = Sequence[dict[str, Any]]

NAMES = {"muon_jax": "muon_jax", "optax": "Optax", "torch": "torch", "adamw": "AdamW"}


def all_tables(rows: Rows) -> dict[str, Table]:
    """The tables by name: times, errors, and the sums over whole models."""
    return {"times": times(rows), "errors": errors(rows), "models": models(rows)}


def times(rows: Rows) -> Table:
    """Milliseconds of a matrix, and how near they are to the speed of plain products."""
    columns = (
        "model",
        "shape",
        "matrices",
        *(f"{NAMES[peer]}, ms" for peer in PEERS),
        "to Optax",
        "to torch",
        "of the float32 peak",
        "of bfloat16's",
    )
    return Table("Orthogonalization of one matrix", columns, [_times(row) for row in rows])


def errors(rows: Rows) -> Table:
    """Polar errors beside that of five exact steps."""
    columns = ("shape", "exact arithmetic", *(NAMES[peer] for peer in PEERS))
    lines, seen = [], set()
    for row in rows:
        shape = _shape(row)
        if row.get("exact_polar_error") is None or shape in seen:
            continue
        seen.add(shape)
        exact = f"{row['exact_polar_error']:.4f}"
        lines.append((shape, exact, *(_of(row, peer, "polar_error", ".4f") for peer in PEERS)))
    return Table("RMS of |s - 1| against the polar factor of a float64 SVD", columns, lines)


def models(rows: Rows) -> Table:
    """Seconds for all of a model's matrices, where every shape of it was measured."""
    columns = ("model", "matrices", *(f"{NAMES[peer]}, s" for peer in PEERS))
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        count = sum(row["count"] for row in own)
        whole = count == sum(shape.count for shape in matrices_of(model))  # or it was interrupted
        if not whole or not all(row["measured"] for row in own):
            continue
        sums = [total(own, peer) for peer in PEERS]
        shown = ("-" if s is None else f"{s:.2f}" for s in sums)
        lines.append((TITLES[model], f"{count:,}", *shown))
    return Table("All matrices of a model, from the time of one of each shape", columns, lines)


def total(rows: Rows, peer: str) -> float | None:
    """Seconds of a peer for every matrix of the rows; None where one was not measured."""
    found = [row["peers"].get(peer, {}).get("matrix_s") for row in rows]
    if any(seconds is None for seconds in found):
        return None
    return sum(row["count"] * seconds for row, seconds in zip(rows, found, strict=True))


def _times(row: dict[str, Any]) -> tuple[str, ...]:
    measured = f"{row['measured']} of {row['count']:,}"
    where = (TITLES[row["model"]], _shape(row), measured)
    if "left_out" in row:
        return (*where, row["left_out"], *[""] * 6)
    ours = row["peers"].get("muon_jax", {})
    shares = ours.get("share_of_peak") or {}
    return (
        *where,
        *(_of(row, peer, "matrix_s", ".2f", 1e3) for peer in PEERS),
        *(_ratio(row, peer) for peer in ("optax", "torch")),
        *(percent(shares.get(name)) for name in ("float32", "bfloat16")),
    )


def percent(share: float | None) -> str:
    """A share of the peak; nothing where there is none."""
    return "-" if share is None else f"{share:.0%}"


def _shape(row: dict[str, Any]) -> str:
    return f"{row['rows']} x {row['cols']}"


def _of(row: dict[str, Any], peer: str, key: str, form: str, factor: float = 1.0) -> str:
    found = row["peers"].get(peer)
    if found is None:
        return ""
    return found["error"] if "error" in found else format(found[key] * factor, form)


def _ratio(row: dict[str, Any], peer: str) -> str:
    ours, theirs = (row["peers"].get(name, {}).get("matrix_s") for name in ("muon_jax", peer))
    return f"{ours / theirs:.2f}x" if ours and theirs else ""
