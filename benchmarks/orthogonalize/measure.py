"""One row: a shape, as many of its matrices as the time allows, and every implementation."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.device_clock import WALL, Clocks
from benchmarks.harness import attempt_each, median, time_interleaved
from benchmarks.model_shapes import MatrixShape
from benchmarks.orthogonalize.accuracy import Spectrum
from benchmarks.orthogonalize.sides import PEERS, Peer, Side, build
from benchmarks.peaks import highest, matmul_peaks, shares_of
from benchmarks.step import computed_flops, newton_schulz_flops

# What the slowest peer is taken to reach of the fastest products until it is measured: Optax in
# float32 on CPU, beside other work, had 0.11 to 0.17 of bfloat16's.
SLOWEST = 0.15


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a row may cost.

    Attributes:
      seconds: all passes of all peers together, estimated from the matmul peak before they run.
      repeats: timed calls of each peer, where they fit.
      passes: passes in one dispatch; more than one hides the dispatch from the clock.
      stack_bytes: the float32 matrices that are measured together.
      largest_svd: the longest shorter side whose error is measured against a float64 SVD.
    """

    seconds: float = 60.0
    repeats: int = 5
    passes: int = 1
    stack_bytes: int = 2**28
    largest_svd: int = 2048


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of a row is measured: `matrices` at once, `repeats` times; none if it is too long.

    Attributes:
      matrices: how many of the shape's matrices; 0 where not even one fits.
      repeats: timed calls of each peer.
      estimate_s: what one matrix is taken to cost the slowest peer.
    """

    matrices: int
    repeats: int
    estimate_s: float


def plan(shape: MatrixShape, limits: Limits, peak: float, peers: int) -> Plan:
    """As many matrices as fit in the limits, then as many repeats.

    Args:
      shape: the row's.
      limits: what the row may cost.
      peak: the speed of the fastest products, as FLOP/s.
      peers: how many run.
    """
    flops = newton_schulz_flops({"": (shape.rows, shape.cols)})
    estimate = flops / (SLOWEST * peak)
    once = limits.seconds / (peers * limits.passes * estimate)  # matrices, if called once
    fit = int(once / (1 + limits.repeats))
    by_memory = max(1, limits.stack_bytes // (4 * shape.rows * shape.cols))
    if fit:
        return Plan(min(fit, by_memory, shape.count), limits.repeats, estimate)
    repeats = int(once) - 1  # one call warms up
    return Plan(1 if repeats > 0 else 0, max(0, repeats), estimate)


def add_shares(rows: Iterable[dict[str, Any]], first: dict[str, float]) -> dict[str, float]:
    """Puts into every result its share of the fastest peaks of all rows, and returns these."""
    there = [row for row in rows if row["measured"]]
    peaks = highest(first, *(row["matmul_peak_flops"] for row in there))
    for row in there:
        for found in row["peers"].values():
            if "error" not in found:
                found["share_of_peak"] = shares_of(found["flops"], found["matrix_s"], peaks)
    return peaks


def measure(
    shape: MatrixShape,
    limits: Limits,
    peak: float,
    peers: tuple[Peer, ...] = PEERS,
    clocks: Clocks = WALL,
    sizes: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Time every peer in turns on Gaussian matrices, and hold one result against float64.

    Args:
      shape: the matrices.
      limits: what the row may cost.
      peak: the speed of the fastest products so far, as FLOP/s, for the estimate.
      peers: which implementations.
      clocks: how both sides are timed.
      sizes: the products whose speed is measured again, right after the row.
    """
    planned = plan(shape, limits, peak, len(peers))
    record: dict[str, Any] = {
        "model": shape.model,
        "rows": shape.rows,
        "cols": shape.cols,
        "count": shape.count,
        "measured": planned.matrices,
        "repeats": planned.repeats,
    }
    if not planned.matrices:
        least = 2 * len(peers) * limits.passes * planned.estimate_s
        return record | {
            "left_out": f"one matrix, twice by each: about {least:.0f} s, where "
            f"a row may take {limits.seconds:.0f}"
        }
    rng = np.random.default_rng(0)
    x = rng.standard_normal((planned.matrices, shape.rows, shape.cols), np.float32)
    builders: dict[Peer, Callable[[], Side]] = {
        peer: functools.partial(build, peer, x, limits.passes) for peer in peers
    }
    sides, failed = attempt_each(builders, lambda side: side.run())
    seconds = time_interleaved(
        {peer: side.run for peer, side in sides.items()},
        planned.repeats,
        warmups=0,
        clocks=clocks.of(sides),
    )
    again = matmul_peaks(sizes, clock=clocks.jax)
    spectrum = Spectrum(x[0]) if shape.rows <= limits.largest_svd else None
    done = planned.matrices * limits.passes
    shapes = {"": (shape.rows, shape.cols)}
    rows: dict[str, dict[str, Any]] = {peer: {"error": said} for peer, said in failed.items()}
    for peer, side in sides.items():
        each = [s / done for s in seconds[peer]]
        rows[peer] = {
            "matrix_s": median(each),
            "matrix_s_all": each,
            "flops": computed_flops(shapes, peer),
            "compile_s": side.compile_s,
            "polar_error": spectrum and spectrum.polar_error(side.first()),
            **side.notes,
        }
    return record | {
        "matmul_peak_flops": again,
        "exact_polar_error": spectrum and spectrum.exact_polar_error,
        "peers": {peer: rows[peer] for peer in peers},
    }
