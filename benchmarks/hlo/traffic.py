"""What a program reads from the main memory and writes to it, every loop as often as it runs.

An instruction reads its operands and writes its result. A fusion reads of an operand what it slices
out, and one that updates a part of an array in place touches that part only. What the compiler put
in another memory (a TPU's VMEM) costs nothing but its way there. Caches are not modelled.
"""

import functools
from collections import defaultdict

from benchmarks.hlo.calls import branches_of, calls_of
from benchmarks.hlo.module import Computation, Instruction, Module, parse
from benchmarks.hlo.shapes import Shape, arrays_of

# They name what is there.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"opt-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done"}
# They run other computations, whose instructions count.
_CALLS = {"while", "conditional", "call", "async-start", "async-update"}
_SLICES = {"slice", "dynamic-slice", "gather"}


def traffic(text: str, *, assume_trip_count: int | None = None) -> dict[str, float]:
    """Bytes read and written in the main memory, apart for each `jax.named_scope` path.

    Args:
      text: what `compiled.as_text()` returns.
      assume_trip_count: for loops whose trip count the text does not show.

    Raises:
      ValueError: a trip count is unknown.
    """
    module = parse(text)

    @functools.cache
    def inside(name: str) -> dict[str, float]:
        computation, total = module.computations[name], defaultdict[str, float](float)
        for instruction in computation.instructions.values():
            if instruction.opcode not in _FREE | _CALLS:
                total[instruction.scope] += _bytes(instruction, computation, module)
                continue
            options = [inside(branch) for branch in branches_of(instruction)]
            found = [(max(options, key=lambda one: sum(one.values())), 1)] if options else []
            for callee, times in calls_of(instruction, name, module, assume_trip_count):
                found.append((inside(callee), times))
            for scopes, times in found:
                for scope, count in scopes.items():
                    total[scope or instruction.scope] += times * count
        return total

    return dict(inside(module.entry))


def _bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    opcode = instruction.opcode
    if opcode in ("copy-start", "slice-start"):
        # A tuple of the result, the source and a context; or of the source and the result.
        arrays = [*arrays_of(instruction.shape)][:2]
        moved = min(array.bytes for array in arrays)
        return sum(moved for array in arrays if array.memory == 0)
    if opcode == "custom-call" and "ConcatBitcast" in instruction.attributes:
        return 0
    operands = [_operand(name, computation) for name in instruction.operand_names]
    if opcode in _SLICES:
        return 2 * _size(instruction.shape)
    if opcode == "dynamic-update-slice":
        return 2 * _size(operands[1])
    callees = instruction.called("calls") if opcode == "fusion" else []
    if not callees:
        return _size(instruction.shape) + sum(map(_size, operands))
    fused = module.computations[callees[0]]
    return _read(fused, operands) + _written(fused, instruction)


def _operand(name: str, computation: Computation) -> Shape:
    return computation.instructions[name].shape


def _size(shape: Shape) -> float:
    return sum(array.bytes for array in arrays_of(shape) if array.memory == 0)


def _read(fused: Computation, operands: list[Shape]) -> float:
    """What a fusion reads of its operands: of those that it only slices, the slices."""
    users = defaultdict[str, list[Instruction]](list)
    for instruction in fused.instructions.values():
        for name in instruction.operand_names:
            users[name].append(instruction)

    def share(name: str, whole: float) -> float:
        total = 0.0
        for user in users[name]:
            if user.opcode in _SLICES and user.operand_names[0] == name:
                total += _all(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operand_names[0] == name:
                total += 0  # updated in place
            elif user.opcode in ("bitcast", "reshape", "convert"):
                total += share(user.name, whole)
            else:
                return whole
        return min(total, whole)

    total = 0.0
    for parameter in fused.instructions.values():
        if parameter.opcode == "parameter":
            whole = _size(operands[int(parameter.operands)])
            total += share(parameter.name, whole)
    return total


def _written(fused: Computation, instruction: Instruction) -> float:
    """What a fusion writes: of a result that it updates in place, the part."""
    results = [*arrays_of(instruction.shape)]
    root = fused.root
    names = root.operand_names if root.opcode == "tuple" else [root.name]
    total = 0.0
    for array, name in zip(results, names, strict=False):
        source = fused.instructions[name]
        while source.opcode in ("bitcast", "convert", "copy") and source.operand_names:
            source = fused.instructions[source.operand_names[0]]
        if source.opcode == "dynamic-update-slice" and array.memory == 0:
            total += _all(fused.instructions[source.operand_names[1]].shape)
        elif array.memory == 0:
            total += array.bytes
    return total


def _all(shape: Shape) -> float:
    return sum(array.bytes for array in arrays_of(shape))
