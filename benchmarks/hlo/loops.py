"""How often a loop runs: XLA's own count, or one read from the loop's counter and its bound."""

import math
import re

from benchmarks.hlo.module import Computation, Instruction, Module, parse

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


# Opcodes that hand a value on unchanged, as far as a loop counter goes.
_TRANSPARENT = ("copy", "convert", "bitcast", "copy-start", "copy-done")


def unknown_loops(text: str) -> list[str]:
    """The scopes of the loops whose trip count the text does not show, each once."""
    module = parse(text)
    found = {}
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values():
            if instruction.opcode == "while" and trip_count(instruction, name, module) is None:
                found[instruction.scope or instruction.name] = None
    return list(found)


def trip_count(loop: Instruction, caller: str, module: Module) -> int | None:
    """XLA's own count, else (bound - start) / step of `counter < bound`, else None."""
    if known := _TRIP_COUNT.search(loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]]
    body = module.computations[loop.called("body")[0]]
    index, bound = _bounded_counter(condition, module)
    if index is None or bound is None:
        return None
    start = _constant(_element(loop.operand_names[0], index, module.computations[caller]))
    step = _step(body, index, module)
    if start is None or not step:
        return None
    return max(0, math.ceil((bound - start) / step))


def _bounded_counter(condition: Computation, module: Module) -> tuple[int | None, int | None]:
    """Of `element index < bound`: the index and the bound; through a fusion too."""
    root = condition.root
    values = [condition.instructions.get(name) for name in root.operand_names]
    if root.opcode == "fusion":
        fused = module.computations[root.called("calls")[0]]
        parameters = {
            i.name: values[int(i.operands)]
            for i in fused.instructions.values()
            if i.opcode == "parameter"
        }
        root = fused.root
        values = [parameters.get(n, fused.instructions.get(n)) for n in root.operand_names]
    if root.opcode != "compare" or "direction=LT" not in root.attributes or len(values) != 2:
        return None, None
    counter, bound = (_through(value, condition) for value in values)
    if counter is None or counter.opcode != "get-tuple-element":
        return None, None
    return int(re.findall(r"index=(\d+)", counter.attributes)[0]), _constant(bound)


def _step(body: Computation, index: int, module: Module) -> int | None:
    """The constant that a loop's body adds to element `index` of its state."""
    value = _element(body.root.name, index, body)
    if value is not None and value.opcode == "fusion":
        inner = module.computations[value.called("calls")[0]]
        value, body = inner.root, inner
    if value is None or value.opcode != "add":
        return None
    operands = [_through(body.instructions.get(n), body) for n in value.operand_names]
    constants = [c for c in map(_constant, operands) if c is not None]
    return constants[0] if len(constants) == 1 else None


def _through(value: Instruction | None, computation: Computation) -> Instruction | None:
    while value is not None and value.opcode in _TRANSPARENT:
        value = computation.instructions.get(value.operand_names[0])
    return value


def _element(name: str, index: int, computation: Computation) -> Instruction | None:
    """Element `index` of the tuple called `name`."""
    value = _through(computation.instructions.get(name), computation)
    if value is None or value.opcode != "tuple":
        return None
    return _through(computation.instructions.get(value.operand_names[index]), computation)


def _constant(value: Instruction | None) -> int | None:
    if value is None or value.opcode != "constant":
        return None
    return int(value.operands) if re.fullmatch(r"-?\d+", value.operands) else None
