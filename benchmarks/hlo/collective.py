"""One collective operation: what it is called, what it sends, and where it comes from."""

import dataclasses
import re

from benchmarks.hlo.module import Computation, Instruction, Module
from benchmarks.hlo.replica_groups import group_size
from benchmarks.hlo.shapes import Shape, arrays_of

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_CHAIN = re.compile(r'chain_id="?([^",}]+)')
_STARTS, _ENDS = (f'custom_call_target="AsyncCollective{end}"' for end in ("Start", "Done"))
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
      opcode: without "-start"; XLA:TPU's fused reduce-scatter is a "reduce-scatter".
      dtype: of its arrays, joined by "+" where XLA combined several.
      elements: of the larger side: gathered, or not yet reduced.
      bytes: of the larger side.
      group_size: devices that take part together; 1 costs nothing.
      executions: how often it runs in one call of the program.
      scope: metadata's op_name, or that of an operand where XLA dropped it.
      chain: what joins the pieces of one asynchronous collective, or None.
      begins: whether this piece is the one that starts it.
      ends: whether this piece is the one that waits for its end.
    """

    opcode: str
    dtype: str
    elements: int
    bytes: float
    group_size: int
    executions: int
    scope: str
    chain: str | None = None
    begins: bool = False
    ends: bool = False

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, all executions together."""
        n = self.group_size
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": float(n > 1),
            "collective-broadcast": float(n > 1),
        }.get(self.opcode, (n - 1) / n)
        return self.executions * share * self.bytes


def kind_of_collective(instruction: Instruction) -> str | None:
    """The opcode without "-start", if this starts or is a collective."""
    base = instruction.opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def read_collective(
    instruction: Instruction, kind: str, computation: Computation, module: Module
) -> Collective:
    """What a collective sends, once: of the size of its groups and the larger of its sides.

    Args:
      instruction: the collective, or its start.
      kind: its opcode without "-start".
      computation: where it stands.
      module: the program.

    Raises:
      ValueError: if its replica groups are written in an unknown form.
    """
    size = group_size(instruction, kind, module)
    shape = instruction.shape
    # A start returns (operands, results, contexts); only all-reduce's returns the results alone.
    is_start = instruction.opcode.endswith("-start")
    if is_start and isinstance(shape, tuple) and (kind != "all-reduce" or _nested(shape)):
        shape = shape[1]
    arrays = list(arrays_of(shape))
    grow = size if kind == "reduce-scatter" else 1
    chain, channel = (p.search(instruction.attributes) for p in (_CHAIN, _CHANNEL))
    return Collective(
        opcode=kind,
        dtype="+".join(sorted({array.dtype for array in arrays})),
        elements=grow * sum(array.elements for array in arrays),
        bytes=grow * sum(array.bytes for array in arrays),
        group_size=size,
        executions=1,
        scope=instruction.scope or _scope_of_operands(instruction, computation),
        chain=f"{kind} {chain[1]} {channel[1] if channel else ''}" if chain else None,
        begins=_STARTS in computation.root.attributes,
        ends=_ENDS in computation.root.attributes,
    )


def _nested(shape: tuple[Shape, ...]) -> bool:
    return isinstance(shape[0], tuple)


def _scope_of_operands(instruction: Instruction, computation: Computation) -> str:
    """Where what is sent was computed: XLA:GPU drops the op_name of collectives it combines."""
    operands = (computation.instructions.get(name) for name in instruction.operand_names)
    return next((operand.scope for operand in operands if operand and operand.scope), "")
