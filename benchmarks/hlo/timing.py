"""How long a TPU program takes by its compiler's own estimates, and what of it waits for a network.

The text of a compiled program is in the order in which a core runs it, and XLA:TPU writes beside
each fusion the cycles that it expects. It writes nothing beside a collective: that is priced here,
by the bytes that cross the fullest link (`Chip.seconds_sent`). A collective that is one instruction
stands still for as long as it takes; of one with a start and a done, what is computed in between
hides as much. Copies between memories run behind the core, and cost nothing. A kernel, and a fusion
for which the compiler has no number, cost their FLOPs at the chip's peak.

So the seconds are an estimate, made to compare parts of one program. Nothing was run.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator

from benchmarks.hlo.calls import branches_of, calls_of
from benchmarks.hlo.collective import Collective, kind_of_collective, read_collective
from benchmarks.hlo.module import Computation, Instruction, Module, parse
from benchmarks.hlo.multiplied import flops_of
from benchmarks.hlo.ragged import ragged_groups
from benchmarks.hlo.sent import as_called

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**62
"""libtpu 0.0.52 writes the largest integer where it has no estimate."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, and its place in a slice whose axes are all as long.

    Attributes:
      clock: cycles per second of the core.
      peak: FLOP/s of bfloat16 products, by the data sheet.
      link: bytes per second of a link between neighbours, in one direction.
      side: chips along an axis of the slice.
      wraps: whether an axis' last chip is linked to its first.
    """

    clock: float
    peak: float
    link: float
    side: int
    wraps: bool

    def seconds_sent(self, collective: Collective) -> float:
        """The seconds that a collective takes, once, if every link is used in both directions.

        A ring gathers from both sides, a line's last chip from one. In an all_to_all half of what
        each chip holds crosses the middle of the longest axis: a quarter of a side's chips for each
        link there and direction, an eighth where the axis wraps.
        """
        if collective.group_size < 2:
            return 0.0
        side = min(self.side, collective.group_size)
        wraps = self.wraps and side == self.side
        if collective.opcode in ("all-to-all", "ragged-all-to-all"):
            return collective.bytes * side / (8 if wraps else 4) / self.link
        once = dataclasses.replace(collective, executions=1).wire_bytes
        return once / self.link / (2 if wraps else 1)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What an instruction of the program's main computation takes, or a part of its loop.

    Attributes:
      scope: the `jax.named_scope` path, that of the caller where XLA dropped it.
      place: the number of the instruction in the main computation.
      computed: seconds of the core.
      waited: seconds in which the core waits for a collective.
      hidden: seconds of collectives behind which the core computes.
    """

    scope: str
    place: int = 0
    computed: float = 0.0
    waited: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """How much longer the step is for it."""
        return self.computed + self.waited


def stretches(text: str, chip: Chip, *, assume_trip_count: int | None = None) -> list[Stretch]:
    """The program in its order, with what each piece of it takes.

    Args:
      text: what `compiled.as_text()` returns for a TPU.
      chip: what it was compiled for.
      assume_trip_count: for loops whose trip count the text does not show.

    Raises:
      ValueError: the text has no cycles, so it is no TPU's; or a trip count is unknown.
    """
    if not _CYCLES.search(text):
        raise ValueError("no estimated_cycles in this text; expected a program compiled for a TPU")
    return _Reader(parse(text), chip, assume_trip_count).main()


class _Reader:
    """Walks through a module once, remembering what each computation takes."""

    def __init__(self, module: Module, chip: Chip, assume: int | None):
        self.module, self.chip, self.assume = module, chip, assume
        self.inside = functools.cache(self._inside)

    def main(self) -> list[Stretch]:
        """The main computation."""
        return self._inside(self.module.entry)

    def _inside(self, name: str) -> list[Stretch]:
        computation = self.module.computations[name]
        found: list[Stretch] = []
        started: dict[str, tuple[float, Collective]] = {}
        now = 0.0
        for place, instruction in enumerate(computation.instructions.values()):
            for piece in self._pieces(instruction, computation, now, started):
                found.append(dataclasses.replace(piece, place=place))
                now += piece.seconds
        # What is not waited for here is waited for elsewhere, if at all: a round of a loop later.
        for _, collective in started.values():
            took = self.chip.seconds_sent(collective)
            found.append(Stretch(collective.scope, len(computation.instructions), hidden=took))
        return found

    def _pieces(
        self,
        instruction: Instruction,
        computation: Computation,
        now: float,
        started: dict[str, tuple[float, Collective]],
    ) -> Iterator[Stretch]:
        scope = instruction.scope
        if options := [self.inside(branch) for branch in branches_of(instruction)]:
            yield from _under(max(options, key=_total), scope, 1)
        elif instruction.opcode in ("while", "call"):
            calls = calls_of(instruction, computation.name, self.module, self.assume)
            for callee, times in calls:
                yield from _under(self.inside(callee), scope, times)
        else:
            if computed := self._computed(instruction, computation):
                yield Stretch(scope, computed=computed)
            for collective in self._collectives(instruction, computation):
                yield from self._sent(instruction, collective, now, started)
            if instruction.opcode.endswith("-done"):
                yield from self._waited(instruction.operand_names[0], now, started)

    def _computed(self, instruction: Instruction, computation: Computation) -> float:
        said = _CYCLES.search(instruction.attributes)
        if said and int(said[1]) < _UNKNOWN:
            groups = ragged_groups(instruction, self.module)
            return int(said[1]) / groups / self.chip.clock
        if instruction.opcode in ("fusion", "custom-call"):
            return flops_of(instruction, computation, self.module) / self.chip.peak
        return 0.0

    def _collectives(
        self, instruction: Instruction, computation: Computation
    ) -> Iterator[Collective]:
        """The collective that an instruction is, or those in the computations of a fusion."""
        if kind := kind_of_collective(instruction):
            yield read_collective(instruction, kind, computation, self.module)
        elif instruction.opcode == "fusion":
            for callee, _ in calls_of(instruction, computation.name, self.module, self.assume):
                fused = self.module.computations[callee]
                for inner in fused.instructions.values():
                    for collective in self._collectives(inner, fused):
                        yield as_called(collective, instruction, 1)

    def _sent(
        self,
        instruction: Instruction,
        collective: Collective,
        now: float,
        started: dict[str, tuple[float, Collective]],
    ) -> Iterator[Stretch]:
        if instruction.opcode.endswith("-start"):
            started[instruction.name] = (now, collective)
        elif collective.chain is None:
            yield Stretch(collective.scope, waited=self.chip.seconds_sent(collective))
        elif collective.begins:
            started[collective.chain] = (now, collective)
        elif collective.ends:
            yield from self._waited(collective.chain, now, started)

    def _waited(
        self, name: str, now: float, started: dict[str, tuple[float, Collective]]
    ) -> Iterator[Stretch]:
        if name in started:
            since, collective = started.pop(name)
            took = self.chip.seconds_sent(collective)
            hidden = min(took, now - since)
            yield Stretch(collective.scope, waited=took - hidden, hidden=hidden)


def _under(pieces: Iterable[Stretch], scope: str, times: int) -> Iterator[Stretch]:
    """What a called computation takes, as the caller sees it."""
    for piece in pieces:
        yield Stretch(
            piece.scope or scope,
            computed=times * piece.computed,
            waited=times * piece.waited,
            hidden=times * piece.hidden,
        )


def _total(pieces: Iterable[Stretch]) -> float:
    return sum(piece.seconds for piece in pieces)
