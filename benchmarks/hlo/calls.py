"""Which computations an instruction runs, and how often."""

from collections.abc import Iterator

from benchmarks.hlo.loops import trip_count
from benchmarks.hlo.module import Instruction, Module


def branches_of(instruction: Instruction) -> list[str]:
    """The computations of which a conditional runs one; none for any other instruction."""
    if instruction.opcode != "conditional":
        return []
    return instruction.called("branch_computations", "true_computation", "false_computation")


def calls_of(
    instruction: Instruction, caller: str, module: Module, assume: int | None
) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often; conditionals apart."""
    opcode = instruction.opcode
    if opcode == "while":
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        times = trip_count(instruction, caller, module)
        if times is None:
            times = assume
        if times is None:
            raise ValueError(
                f"unknown trip count of the loop {instruction.name} ({instruction.scope or body}); "
                "pass assume_trip_count="
            )
        yield body, times
        yield condition, times + 1
    elif opcode in ("call", "fusion", "custom-call", "async-start", "call-start"):
        # The update and the done of an asynchronous call name the same computation again.
        for callee in instruction.called("calls", "to_apply", "called_computations"):
            if callee in module.computations:
                yield callee, 1
