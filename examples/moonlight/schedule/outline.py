"""A training as papers state it, in tokens: its stages and its batch sizes, at any scale.

`Outline.scaled` keeps the shape at another number of tokens; `Outline.plan` rounds it to whole
optimizer steps.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from examples.moonlight.schedule.plan import Curve, Plan, Segment, Shape

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage as papers state it.

    Attributes:
        name: How it is called.
        until: Tokens behind the run when it ends.
        rise: Tokens over which the rate rises linearly, from where the stage before it ended, or
            from 0.
        peak: The rate after that.
        final: The rate at the stage's end.
        decay: How it gets there.
        bias_rate: Step of the router biases.
        mix: Weights of the data's sources by name; empty: by their sizes.
    """

    name: str
    until: int
    rise: int
    peak: float
    final: float
    decay: Literal["linear", "cosine"]
    bias_rate: float
    mix: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Ramp(NamedTuple):
    """Sequences per step, until this many tokens are behind the run."""

    until: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Outline:
    """A whole training in tokens.

    Attributes:
        stages: The stages in order.
        ramp: The batch sizes, in order; the last holds until the end.
        sequence_length: Predicted tokens per sequence.
    """

    stages: tuple[Stage, ...]
    ramp: tuple[Ramp, ...]
    sequence_length: int

    def scaled(
        self,
        total_tokens: int,
        *,
        sequence_length: int,
        max_batch: int,
        learning_rate: float,
        bias_rate: float,
        warmup_steps: int | None = None,
    ) -> "Outline":
        """The same shape at another size.

        Every boundary stays at its fraction of the tokens, and so do the warmups; rates and batch
        sizes keep their ratios.

        Args:
            total_tokens: Tokens in all.
            sequence_length: Predicted tokens per sequence.
            max_batch: Sequences in the largest step.
            learning_rate: The highest rate.
            bias_rate: The highest step of the router biases.
            warmup_steps: Steps of the first rise, in the place of its fraction. A stage that is all
                rise ends with it.

        Raises:
            ValueError: `max_batch` cannot be divided in the ramp's ratios.
        """
        size = total_tokens / self.stages[-1].until
        rates = learning_rate / max(stage.peak for stage in self.stages)
        bias_rates = bias_rate / max(stage.bias_rate for stage in self.stages)
        largest = max(batch for _, batch in self.ramp)
        for _, batch in self.ramp:
            if max_batch * batch % largest:
                raise ValueError(
                    f"the batch grows from {self.ramp[0].batch} to {largest} sequences: "
                    f"{max_batch} sequences cannot be divided in the same ratio"
                )
        ramp = tuple(
            Ramp(round(until * size), max_batch * batch // largest) for until, batch in self.ramp
        )
        stages = [
            dataclasses.replace(
                stage,
                until=round(stage.until * size),
                rise=round(stage.rise * size),
                peak=stage.peak * rates,
                final=stage.final * rates,
                bias_rate=stage.bias_rate * bias_rates,
            )
            for stage in self.stages
        ]
        if warmup_steps is not None:
            first, rise = stages[0], _tokens(warmup_steps, ramp, sequence_length)
            until = rise if first.rise == first.until else first.until
            stages[0] = dataclasses.replace(first, rise=rise, until=until)
        return Outline(tuple(stages), ramp, sequence_length)

    def plan(self) -> Plan:
        """Whole steps: each boundary at the nearest, and no segment without one.

        Raises:
            ValueError: The tokens are too few for a step of every segment, or too many to count.
        """
        pieces, behind = [], 0
        for stage, start, shape, end in self._curves():
            for batch, until in self._batches(start, end):
                # From where the steps before have really ended: roundings do not add up.
                steps = max(1, round((until - behind) / (batch * self.sequence_length)))
                behind += steps * batch * self.sequence_length
                pieces.append((stage, shape, batch, steps))
        total, last = self.stages[-1].until, pieces[-1][2] * self.sequence_length
        if behind - total > last / 2:
            raise ValueError(
                f"{total:,} tokens are too few for this schedule: one step of each of its "
                f"{len(pieces)} segments takes it to {behind:,}; give more --total-tokens (or "
                "--steps), or a smaller --batch-size or --sequence-length"
            )
        if behind > _INT32_MAX * self.sequence_length:
            raise ValueError(
                f"{behind // self.sequence_length:,} sequences are more than a step can count, "
                f"{_INT32_MAX:,}: take longer sequences"
            )
        return Plan(tuple(_segments(pieces)), self.sequence_length)

    def _curves(self) -> Iterator[tuple[Stage, int, Shape, int]]:
        """Stage, first token, shape and last token of each curve."""
        start = 0
        for stage in self.stages:
            top = start + stage.rise
            if not start <= top <= stage.until:
                raise ValueError(
                    f"the stage {stage.name!r} has {stage.until - start:,} tokens, fewer than its "
                    f"warmup of {stage.rise:,}: train on more, or warm up for fewer steps"
                )
            if start < top:
                yield stage, start, "rise", top
            if top < stage.until:
                yield stage, top, stage.decay, stage.until
            start = stage.until

    def _batches(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Batch size and last token of every part of a curve."""
        for until, batch in self.ramp[:-1]:
            if start < until < end:
                yield batch, until
                start = until
        yield next((b for until, b in self.ramp if end <= until), self.ramp[-1].batch), end


def _tokens(steps: int, ramp: tuple[Ramp, ...], sequence_length: int) -> int:
    """Tokens of the first steps."""
    behind = 0
    for i, (until, batch) in enumerate(ramp):
        each = batch * sequence_length
        taken = steps if i == len(ramp) - 1 else min(steps, round((until - behind) / each))
        behind += taken * each
        steps -= taken
    return behind


def _segments(pieces: list[tuple[Stage, Shape, int, int]]) -> Iterator[Segment]:
    """Joins the parts of each curve, which has the sequences that its steps really have."""
    rate = 0.0
    for (stage, shape), group in itertools.groupby(pieces, key=lambda piece: piece[:2]):
        parts = [(batch, steps) for _, _, batch, steps in group]
        start, end = (rate, stage.peak) if shape == "rise" else (stage.peak, stage.final)
        curve = Curve(shape, start, end, sum(batch * steps for batch, steps in parts))
        behind = 0
        for batch, steps in parts:
            yield Segment(stage.name, steps, batch, curve, behind, stage.bias_rate, stage.mix)
            behind += batch * steps
        rate = end
