"""The text of a program as instructions in computations: `parse`."""

import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.hlo.brackets import closing, split
from benchmarks.hlo.shapes import Shape, read_shape

_NAME = re.compile(r"[\w.\-]+")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: Shape
    opcode: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def operand_names(self) -> list[str]:
        """The operands, in order."""
        parts = [part.split() for part in split(self.operands)]
        return [words[-1].lstrip("%") for words in parts if words]

    def called(self, *keys: str) -> list[str]:
        """The computations that the attributes name under these keys."""
        names = []
        for key in keys:
            found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            names += _NAME.findall(found[1]) if found else []
        return names

    @property
    def scope(self) -> str:
        """The `jax.named_scope` path, "" where XLA dropped it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in self.instructions.values() if i.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program."""

    entry: str
    computations: dict[str, Computation]
    devices: int


def parse(text: str) -> Module:
    """Read the text of an HLO module.

    Args:
      text: what `compiled.as_text()` returns.

    Raises:
      ValueError: if it has no entry computation.
    """
    entry, computations, current = None, {}, None
    for line in _whole_lines(text):
        if current is not None and line.rstrip() == "}":
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
        elif header := _COMPUTATION.match(line):
            current = Computation(header[2], {})
            computations[header[2]] = current
            entry = header[2] if header[1] else entry
    if entry is None:
        raise ValueError(
            f"no ENTRY computation in this text; expected compiled.as_text(), got {text[:80]!r}"
        )
    counts = [re.search(rf"\b{key}=(\d+)", text) for key in ("replica_count", "num_partitions")]
    return Module(entry, computations, math.prod(int(found[1]) for found in counts if found))


def _whole_lines(text: str) -> Iterator[str]:
    """The lines, with an instruction as one: a Pallas kernel's metadata is spread over several."""
    held = ""
    for line in text.splitlines():
        if held and line.rstrip() != "}" and not line.startswith("  "):
            held += line
            continue
        if held:
            yield held
        held = line if _INSTRUCTION.match(line) else ""
        if not held:
            yield line
    if held:
        yield held


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if call is None:
        raise ValueError(f"cannot read this HLO instruction: {line.strip()[:200]}")
    opening = end + call.end() - 1
    end_of_operands = closing(rest, opening)
    return Instruction(
        name=head[2],
        shape=read_shape(rest[:end]),
        opcode=call[1],
        operands=rest[opening + 1 : end_of_operands],
        attributes=rest[end_of_operands + 1 :],
        is_root=bool(head[1]),
    )
