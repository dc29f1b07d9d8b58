"""The rows of a run: each has a key, and is measured once."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from benchmarks import step
from benchmarks.accelerator import correctness, training
from benchmarks.device_clock import Clocks
from benchmarks.model_shapes import MatrixShape, Model, matrices_of
from benchmarks.orthogonalize import sides
from benchmarks.orthogonalize.__main__ import scaled
from benchmarks.orthogonalize.measure import Limits, measure
from benchmarks.peaks import copy_bandwidth, matmul_peaks
from examples.moonlight.model.config import MoonlightConfig

Kind = Literal["correctness", "limits", "shape", "step", "training"]

# Longest shorter side that is held against a float64 SVD, which the host takes seconds for.
LARGEST_SVD = 1408


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, and how large.

    Attributes:
      models: whose matrices are orthogonalized.
      cases: trees of `benchmarks.step`.
      scale: divides every matrix' sides, and the products of the limits.
      repeats: timed calls of each side.
      passes: passes in one dispatch of shapes and steps.
      row_seconds: what a shape may take.
      preset: the Moonlight that takes a training step.
      batch: its sequences.
      length: tokens that the model reads of each.
    """

    models: tuple[Model, ...] = ("gpt2-small", "moonlight-16b-a3b", "qwen2.5-7b")
    cases: tuple[step.Case, ...] = ("a", "b", "c", "d", "e")
    scale: int = 1
    repeats: int = 10
    passes: int = 10
    row_seconds: float = 10.0
    preset: str = "small"
    batch: int = 8
    length: int = 1024


@dataclasses.dataclass(frozen=True)
class Work:
    """A row that is to be measured.

    Attributes:
      key: what the record is found by.
      kind: which kind of row.
      measure: measures it; takes the limits, which are None for rows before them.
    """

    key: str
    kind: Kind
    measure: Callable[[dict[str, Any] | None], dict[str, Any]]


def all_work(sizes: Sizes, clocks: Clocks, torch: bool) -> Iterator[Work]:
    """Every row, correctness first.

    Args:
      sizes: what is measured.
      clocks: how both sides are timed.
      torch: whether torch takes part.
    """
    peers: tuple[step.Peer, ...] = tuple(p for p in step.PEERS if torch or p != "torch")
    without_adamw: tuple[sides.Peer, ...] = tuple(p for p in sides.PEERS if torch or p != "torch")
    shapes = [scaled(s, sizes.scale) for model in sizes.models for s in matrices_of(model)]
    small = {(s.rows, s.cols) for s in shapes if s.rows <= LARGEST_SVD}
    for rows, cols in (*correctness.AWKWARD, *sorted(small)):

        def check(_: Any, rows: int = rows, cols: int = cols) -> dict[str, Any]:
            return correctness.check(rows, cols, without_adamw)

        yield Work(f"correctness/{rows}x{cols}", "correctness", check)

    toy = None if sizes.scale == 1 else (2048 // sizes.scale,)

    def limits(_: Any) -> dict[str, Any]:
        on_cpu = jax.default_backend() == "cpu"
        size = 2**20 if on_cpu and toy else None
        return {
            "matmul_peak_flops": matmul_peaks(toy, clock=clocks.jax),
            "copy_bytes_per_s": copy_bandwidth(size, clock=clocks.jax),
        }

    yield Work("limits", "limits", limits)
    row_limits = Limits(
        seconds=sizes.row_seconds,
        repeats=sizes.repeats,
        passes=sizes.passes,
        stack_bytes=2**30,
        largest_svd=LARGEST_SVD,
    )
    for shape in shapes:

        def one_shape(known: dict[str, Any] | None, shape: MatrixShape = shape) -> dict[str, Any]:
            peak = max(_peaks(known).values())
            return measure(shape, row_limits, peak, without_adamw, clocks, toy)

        yield Work(f"shape/{shape}", "shape", one_shape)
    for case in sizes.cases:

        def one_case(known: dict[str, Any] | None, case: step.Case = case) -> dict[str, Any]:
            tree = step.shapes_of(case, sizes.scale)
            found = step.measure(tree, peers, sizes.repeats, sizes.passes, clocks)
            return {"case": case, **found}

        yield Work(f"step/{case}", "step", one_case)

    def train(_: Any) -> dict[str, Any]:
        config = MoonlightConfig.preset(sizes.preset)
        found = training.measure(config, sizes.batch, sizes.length, peers, sizes.repeats, clocks)
        return {"preset": sizes.preset, **found}

    yield Work(f"training/{sizes.preset}", "training", train)


def _peaks(limits: dict[str, Any] | None) -> dict[str, float]:
    if limits is None:
        raise RuntimeError("the limits, to which this row is held, could not be measured")
    return limits["matmul_peak_flops"]
