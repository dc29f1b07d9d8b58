"""Orthogonalization by shape: `python -m benchmarks.orthogonalize`.

The matrices that Muon has in real models, one row for each shape: `muon_jax.orthogonalize` against
the Newton-Schulz of `optax.contrib.muon` and of `torch.optim.Muon`, on the same Gaussian matrices,
timed in turns. A row takes as many of the shape's matrices as its time allows and says how many; a
shape of which not even one fits is left out, and says so. "peak" is the share of the speed of plain
products, measured in the same run; five steps count 4 m^2 n + 2 m^3 FLOPs each. "error" is the
distance of one result from the polar factor of a float64 SVD, where exact arithmetic has "exact".
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

from benchmarks.harness import environment, load_average, make_console, write_json
from benchmarks.model_shapes import MatrixShape, Model, matrices_of
from benchmarks.orthogonalize.measure import Limits, add_shares, measure
from benchmarks.orthogonalize.sides import PEERS, Peer
from benchmarks.orthogonalize.tables import all_tables
from benchmarks.peaks import matmul_peaks
from examples.moonlight.common.command_line import CommandLine


@dataclasses.dataclass(frozen=True)
class Args:
    """Newton-Schulz on the matrices of real models, against Optax and torch.

    Attributes:
      models: whose matrices: gpt2-small, qwen2.5-7b, moonlight-16b-a3b, moonlight-tiny.
      peers: which implementations.
      row_seconds: what a row may take; longer ones are measured on fewer matrices, or left out.
      repeats: timed calls of each implementation, fewer where a row would take too long.
      scale: divides the sides of every matrix, for a quick look.
      output: where the JSON goes.
    """

    models: tuple[Model, ...] = ("gpt2-small", "qwen2.5-7b", "moonlight-16b-a3b")
    peers: tuple[Peer, ...] = PEERS
    row_seconds: float = 60.0
    repeats: int = 5
    scale: int = 1
    output: Path = Path("runs/benchmarks/orthogonalize.json")


def scaled(shape: MatrixShape, scale: int) -> MatrixShape:
    """The shape with its sides divided."""
    rows, cols = (max(1, side // scale) for side in (shape.rows, shape.cols))
    return dataclasses.replace(shape, rows=rows, cols=cols)


def main(args: Args) -> dict[str, Any]:
    """Run the benchmark, print its table, write its JSON after every row."""
    console = make_console()
    load = load_average(console)
    with console.status("measuring the speed of plain products"):
        peaks = matmul_peaks()
    versions = ["jax", "jaxlib", "optax", *(["torch"] if "torch" in args.peers else [])]
    record: dict[str, Any] = {
        "environment": environment(*versions),
        "load_average": load,
        "scale": args.scale,
        "row_seconds": args.row_seconds,
        "matmul_peak_flops": peaks,
        "rows": [],
    }
    limits = Limits(seconds=args.row_seconds, repeats=args.repeats)
    shapes = [scaled(s, args.scale) for model in args.models for s in matrices_of(model)]
    for shape in track(shapes, "shapes", console=console, transient=True):
        record["rows"].append(measure(shape, limits, max(peaks.values()), args.peers))
        record["matmul_peak_flops"] = peaks = add_shares(record["rows"], peaks)
        record["left"] = [str(s) for s in shapes[len(record["rows"]) :]]
        write_json(args.output, record)
        jax.clear_caches()
    shown = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {name}" for name, peak in peaks.items())
    console.print(f"{record['environment']['device']}, matmul peak {shown}")
    for table in all_tables(record["rows"]).values():
        console.print(table.rich())
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.orthogonalize", Args, __doc__, keeps_programs=False).run(main)
