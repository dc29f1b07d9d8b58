"""Every collective of a program, each once, with how often it runs."""

import dataclasses
import functools

from benchmarks.hlo.calls import branches_of, calls_of
from benchmarks.hlo.collective import Collective, kind_of_collective, read_collective
from benchmarks.hlo.module import Instruction, parse


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
            if kind := kind_of_collective(instruction):
                found.append(read_collective(instruction, kind, module.computations[name], module))
                continue
            branches = branches_of(instruction)
            if branches:
                found += max(map(inside, branches), key=total_bytes)
            for callee, times in calls_of(instruction, name, module, assume_trip_count):
                found += [as_called(c, instruction, times) for c in inside(callee)]
        return tuple(_join_chains(found))

    return list(inside(module.entry))


def total_bytes(found: "tuple[Collective, ...] | list[Collective]") -> float:
    """Bytes on the wire of all of them."""
    return sum(c.wire_bytes for c in found)


def as_called(collective: Collective, caller: Instruction, times: int) -> Collective:
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
    """Keep one piece of each asynchronous collective: the one that starts it, where that is seen.

    A collective that is started in front of a loop may go on in its rounds, in a piece that runs as
    often as they do.
    """
    chains: dict[str, Collective] = {}
    for c in found:
        if c.chain is not None:
            known = chains.get(c.chain)
            if known is None or (known.begins, known.executions) < (c.begins, c.executions):
                chains[c.chain] = c
    return [c for c in found if c.chain is None] + list(chains.values())
