"""Count what a compiled program sends and multiplies, from the text of its HLO.

`compiled.as_text()` shows the program that one device runs, after partitioning. XLA's own cost
analysis does not count communication and counts a loop's body once; this module reads the text.

Bytes are those that a device sends in a ring, the least that the operation needs, for a group of
N devices: (N-1)/N of the gathered or unreduced array for an all-gather or a reduce-scatter, twice
that for an all-reduce, (N-1)/N of the buffer for an all-to-all, the buffer for a
collective-permute.

What is read how:

- A loop's body counts as often as it runs: XLA's `known_trip_count`, else the bound in its
  condition.
- An asynchronous collective counts at its start. XLA:TPU runs pieces of one inside several fusions,
  under one `chain_id`: they count once. It writes a reduce-scatter as an all-reduce inside a fusion
  called `all-reduce-scatter`.
- Of a conditional, the branch that sends most counts.
- A ragged product on TPU is written as if each group multiplied every row, under a mask whose empty
  tiles are skipped: it counts once for each row, the rows that belong to no group included.
"""

import dataclasses
import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"[\w.\-]+")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = ")
_CHAIN = re.compile(r'chain_id="?([^",}]+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_RAGGED = re.compile(r'"num_groups_in_ragged_dot":"(\d+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# Opcodes that hand a value on unchanged, as far as a loop counter goes.
_TRANSPARENT = ("copy", "convert", "bitcast", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The size in memory, without layout padding."""
        return self.elements * _bits(self.dtype) / 8


# What an instruction returns: an array or a tuple of such.
Shape = Array | tuple["Shape", ...]


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
        parts = [part.split() for part in _split(self.operands)]
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
    """

    opcode: str
    dtype: str
    elements: int
    bytes: float
    group_size: int
    executions: int
    scope: str
    chain: str | None = None

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


def parse(text: str) -> Module:
    """Read the text of an HLO module.

    Args:
      text: what `compiled.as_text()` returns.

    Raises:
      ValueError: if it has no entry computation.
    """
    entry, computations, current = None, {}, None
    for line in text.splitlines():
        if current is not None and line.startswith("}"):
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


def collectives(text: str, *, assume_trip_count: int | None = None) -> list[Collective]:
    """Every collective of a compiled program, each once, with how often it runs.

    Args:
      text: what `compiled.as_text()` returns.
      assume_trip_count: for loops whose trip count the text does not show.

    Raises:
      ValueError: if a loop's trip count is unknown and none is assumed, or something that decides
        the bytes cannot be read.
    """
    module = parse(text)

    @functools.cache
    def inside(name: str) -> tuple[Collective, ...]:
        found: list[Collective] = []
        for instruction in module.computations[name].instructions.values():
            if kind := _collective_kind(instruction):
                found.append(_collective(instruction, kind, module.computations[name], module))
                continue
            branches = _branches(instruction)
            if branches:
                found += max(map(inside, branches), key=total_bytes)
            for callee, times in _calls(instruction, name, module, assume_trip_count):
                found += [_as_called(c, instruction, times) for c in inside(callee)]
        return tuple(_join_chains(found))

    return list(inside(module.entry))


def total_bytes(found: "tuple[Collective, ...] | list[Collective]") -> float:
    """Bytes on the wire of all of them."""
    return sum(c.wire_bytes for c in found)


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
) -> dict[str, float]:
    """The same, apart for each `jax.named_scope` path; "" where XLA dropped it.

    Args and errors are those of `flops`.
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
            if own := _product_flops(instruction, computation):
                total[scope] += own
            options = [inside(branch) for branch in _branches(instruction)]
            if options and branches == "heaviest":
                add(max(options, key=lambda found: sum(found.values())), 1, scope)
            for option in options if branches == "mean" else ():
                add(option, 1 / len(options), scope)
            share = 1 / _ragged_groups(instruction, module)
            for callee, times in _calls(instruction, name, module, assume_trip_count):
                add(inside(callee), times * share, scope)
        return total

    return dict(inside(module.entry))


def unknown_loops(text: str) -> list[str]:
    """The scopes of the loops whose trip count the text does not show, each once."""
    module = parse(text)
    found = {}
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values():
            if instruction.opcode == "while" and _trip_count(instruction, name, module) is None:
                found[instruction.scope or instruction.name] = None
    return list(found)


# --- reading a line


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if call is None:
        raise ValueError(f"cannot read this HLO instruction: {line.strip()[:200]}")
    opening = end + call.end() - 1
    closing = _closing(rest, opening)
    return Instruction(
        name=head[2],
        shape=_shape(rest[:end]),
        opcode=call[1],
        operands=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
        is_root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brackets in this HLO: {text[:200]}")


def _split(text: str) -> list[str]:
    """Split at the commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text.strip() else []


def _shape(text: str) -> Shape:
    text = text.strip()
    if text.startswith("("):
        return tuple(_shape(part) for part in _split(text[1 : _closing(text, 0)]))
    found = _SHAPE.match(text)
    if found is None:
        raise ValueError(f"cannot read this HLO shape: {text[:80]!r}")
    dims = [int(size.lstrip("<=")) for size in found[2].split(",") if size]
    return Array(found[1], tuple(dims))


def _arrays(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, flat."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from _arrays(part)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found is None:
        raise ValueError(f"unknown HLO element type {dtype!r}")
    return int(found[1])


# --- collectives


def _collective_kind(instruction: Instruction) -> str | None:
    """The opcode without "-start", if this starts or is a collective."""
    base = instruction.opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _collective(
    instruction: Instruction, kind: str, computation: Computation, module: Module
) -> Collective:
    size = _group_size(instruction, kind, module)
    shape = instruction.shape
    # A start returns (operands, results, contexts); only all-reduce's returns the results alone.
    is_start = instruction.opcode.endswith("-start")
    if is_start and isinstance(shape, tuple) and (kind != "all-reduce" or _nested(shape)):
        shape = shape[1]
    arrays = list(_arrays(shape))
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
    )


def _nested(shape: tuple[Shape, ...]) -> bool:
    return isinstance(shape[0], tuple)


def _scope_of_operands(instruction: Instruction, computation: Computation) -> str:
    """Where what is sent was computed: XLA:GPU drops the op_name of collectives it combines."""
    operands = (computation.instructions.get(name) for name in instruction.operand_names)
    return next((operand.scope for operand in operands if operand and operand.scope), "")


def _group_size(instruction: Instruction, kind: str, module: Module) -> int:
    """Devices in a group: `{{0,1},{2,3}}`, `[2,4]<=[8]T(1,0)` or `mesh['a'=2,'b'=4] {'b'}`."""
    attributes = instruction.attributes
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
        moved = {device for pair in pairs if pair[0] != pair[1] for device in pair}
        return max(1, len(moved))
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = re.findall(r"\{([\d,]*)\}", found[1])
        return max((len(g.split(",")) for g in groups), default=module.devices)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", attributes
    ):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        # 'a':(2)4 is the part of size 4 that follows a part of size 2.
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups=" not in attributes:
        return module.devices
    raise ValueError(f"cannot read the replica groups of {instruction.name}: {attributes[:200]}")


def _as_called(collective: Collective, caller: Instruction, times: int) -> Collective:
    """A collective of a called computation, as the caller sees it."""
    opcode = collective.opcode
    if caller.opcode == "fusion" and opcode == "all-reduce" and _scatters(caller):
        opcode = "reduce-scatter"
    return dataclasses.replace(
        collective,
        opcode=opcode,
        executions=times * collective.executions,
        scope=collective.scope or caller.scope,
    )


def _scatters(fusion: Instruction) -> bool:
    names = fusion.called("calls")
    return any(name.startswith("all-reduce-scatter") for name in names) or (
        '"emitter":"AllReduceScatterFusion"' in fusion.attributes
    )


def _join_chains(found: list[Collective]) -> list[Collective]:
    """Keep one piece of each asynchronous collective."""
    chains: dict[str, Collective] = {}
    for c in found:
        if c.chain is not None:
            known = chains.get(c.chain)
            if known is None or known.executions < c.executions:
                chains[c.chain] = c
    return [c for c in found if c.chain is None] + list(chains.values())


# --- calls and loops


def _branches(instruction: Instruction) -> list[str]:
    if instruction.opcode != "conditional":
        return []
    return instruction.called("branch_computations", "true_computation", "false_computation")


def _calls(
    instruction: Instruction, caller: str, module: Module, assume: int | None
) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often; conditionals apart."""
    opcode = instruction.opcode
    if opcode == "while":
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        times = _trip_count(instruction, caller, module)
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


def _trip_count(loop: Instruction, caller: str, module: Module) -> int | None:
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


# --- products


def _product_flops(instruction: Instruction, computation: Computation) -> float:
    """2 FLOPs for each multiplication of a product; 0 for any other instruction."""
    counters: dict[str, Callable[[Instruction, Computation], float]] = {
        "dot": _dot_flops,
        "convolution": _convolution_flops,
        "custom-call": _library_flops,
    }
    counter = counters.get(instruction.opcode)
    return counter(instruction, computation) if counter else 0.0


def _ragged_groups(fusion: Instruction, module: Module) -> int:
    """Of the fusion in which XLA:TPU multiplies groups of rows: how many groups; else 1."""
    found = _RAGGED.search(fusion.attributes)
    if found is None:
        return 1
    # It is wrapped in a fusion that says the same.
    inner = [
        i
        for name in fusion.called("calls")
        for i in module.computations[name].instructions.values()
    ]
    return 1 if any(_RAGGED.search(i.attributes) for i in inner) else int(found[1])


def _operand(instruction: Instruction, index: int, computation: Computation) -> Array:
    shape = computation.instructions[instruction.operand_names[index]].shape
    if not isinstance(shape, Array):
        raise ValueError(f"operand {index} of {instruction.name} is a tuple, expected an array")
    return shape


def _dot_flops(dot: Instruction, computation: Computation) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = [int(dim) for dim in found[1].split(",") if dim] if found else []
    return _contraction_flops(dot, computation, contracted)


def _contraction_flops(
    product: Instruction, computation: Computation, contracted: list[int]
) -> float:
    lhs = _operand(product, 0, computation)
    result = next(_arrays(product.shape))
    return 2.0 * result.elements * math.prod(lhs.dims[dim] for dim in contracted)


def _convolution_flops(convolution: Instruction, computation: Computation) -> float:
    """XLA:TPU writes matrix products as convolutions, a batch as a dilated window dimension.

    Only the positions of the window that lie on an element of the input multiply.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"the convolution {convolution.name} has no dim_labels")
    lhs, rhs = (_operand(convolution, i, computation) for i in (0, 1))
    result = next(_arrays(convolution.shape))
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    total = 2.0
    for label, size in zip(labels[3], result.dims, strict=True):
        total *= size if label in "bf" else 1
    total *= rhs.dims[labels[2].index("i")]
    for label in filter(str.isdigit, labels[3]):
        total *= _window_positions(
            int(label),
            settings,
            lhs.dims[labels[1].index(label)],
            result.dims[labels[3].index(label)],
        )
    return total


def _window_positions(dim: int, settings: dict[str, str], inputs: int, outputs: int) -> int:
    """Pairs of (output, window element) that meet an input element, along one dimension."""

    def setting(key: str, default: str) -> str:
        return settings[key].split("x")[dim] if key in settings else default

    size, stride = int(setting("size", "1")), int(setting("stride", "1"))
    low = int(setting("pad", "0_0").split("_")[0])
    grown, spread = int(setting("lhs_dilate", "1")), int(setting("rhs_dilate", "1"))
    positions = (
        output * stride - low + element * spread
        for output in range(outputs)
        for element in range(size)
    )
    last = (inputs - 1) * grown
    return sum(0 <= position <= last and position % grown == 0 for position in positions)


def _library_flops(call: Instruction, computation: Computation) -> float:
    """A product that XLA hands to cuBLAS; other libraries' products raise."""
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    target = found[1] if found else ""
    if target.startswith("__cublas$"):
        config = json.loads(
            call.attributes[call.attributes.index("backend_config=") + 15 :].split("\n")[0]
        )
        numbers = config["gemm_backend_config"]["dot_dimension_numbers"]
        contracted = [int(dim) for dim in numbers["lhs_contracting_dimensions"]]
        return _contraction_flops(call, computation, contracted)
    if re.search("gemm|matmul|dot|conv", target, re.IGNORECASE):
        raise ValueError(f"cannot count the FLOPs of the library call {target!r} ({call.name})")
    return 0.0
