"""What a program multiplies, every loop as often as it runs."""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from benchmarks.hlo.calls import branches_of, calls_of
from benchmarks.hlo.module import Computation, Instruction, Module, parse
from benchmarks.hlo.products import product_flops
from benchmarks.hlo.ragged import ragged_groups


def flops(
    text: str,
    *,
    assume_trip_count: int | None = None,
    branches: Literal["heaviest", "mean"] = "heaviest",
) -> float:
    """FLOPs of one device's matrix products and convolutions, loops counted as often as they run.

    Args:
      text: what `compiled.as_text()` returns.
      assume_trip_count: for loops whose trip count the text does not show.
      branches: what a conditional counts as: its heaviest branch, the bound that holds for every
        device, or the mean over branches.

    Raises:
      ValueError: if a trip count is unknown, or a library call multiplies in a way unknown here.
    """
    found = flops_by_scope(text, assume_trip_count=assume_trip_count, branches=branches)
    return sum(found.values())


def flops_by_scope(
    text: str,
    *,
    assume_trip_count: int | None = None,
    branches: Literal["heaviest", "mean"] = "heaviest",
    kernels: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The same, apart for each `jax.named_scope` path; "" where XLA dropped it.

    Args and errors are those of `flops`; `kernels` has the FLOPs of a call of each TPU kernel whose
    name begins so, instead of what it says of itself.
    """
    module = parse(text)

    @functools.cache
    def inside(name: str) -> dict[str, float]:
        computation, total = module.computations[name], defaultdict[str, float](float)

        def add(found: dict[str, float], times: float, caller: str) -> None:
            for scope, count in found.items():
                total[scope or caller] += times * count

        for instruction in computation.instructions.values():
            scope = instruction.scope
            if own := product_flops(instruction, computation, kernels):
                total[scope] += own
            options = [inside(branch) for branch in branches_of(instruction)]
            if options and branches == "heaviest":
                add(max(options, key=lambda found: sum(found.values())), 1, scope)
            for option in options if branches == "mean" else ():
                add(option, 1 / len(options), scope)
            share = 1 / ragged_groups(instruction, module)
            for callee, times in calls_of(instruction, name, module, assume_trip_count):
                add(inside(callee), times * share, scope)
        return total

    return dict(inside(module.entry))


def flops_of(instruction: Instruction, computation: Computation, module: Module) -> float:
    """FLOPs of one instruction, those of a fusion's products among them."""
    total = product_flops(instruction, computation)
    if instruction.opcode == "fusion":
        inner = [module.computations[name] for name in instruction.called("calls")]
        fused = sum(flops_of(i, one, module) for one in inner for i in one.instructions.values())
        total += fused / ragged_groups(instruction, module)
    return total
