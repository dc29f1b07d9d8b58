r"""When training does what: learning rate, batch size, bias rate and data mix of every step.

Papers state a schedule in tokens. An `Outline` says it so, and can be scaled to another number of
them; its `plan()` has whole optimizer steps. Everything in a `Plan` is a function of the step
alone: a run that is stopped, continued or taken back finds its place from one integer.

Within a step nothing changes, so its place on a curve has to be chosen. Where the rate rises it is
that of the step's end, so that the first step already moves and the last has the peak; where it
falls, that of the step's beginning, so that the first has the peak and none has the 0 at the end.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Shape = Literal["rise", "linear", "cosine"]

_INT32_MAX = 2**31 - 1


# --------------------------------------------------------------------------------------------------
# In steps
# --------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The learning rate from `start` to `end`, while so many sequences are read."""

    shape: Shape
    start: float
    end: float
    sequences: int

    def __call__(self, sequences: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """The rate once this many of the curve's sequences are read."""
        if self.shape == "cosine":
            alpha = self.end / self.start
            return optax.cosine_decay_schedule(self.start, self.sequences, alpha)(sequences)
        return optax.linear_schedule(self.start, self.end, self.sequences)(sequences)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps between which nothing jumps.

    Attributes:
        stage: Name of the stage that they belong to.
        steps: How many.
        batch: Sequences in each.
        curve: What the learning rate follows; the segment may be a part of it.
        behind: Sequences of the curve that lie before the segment.
        bias_rate: Step of the router biases.
        mix: Weights of the data's sources by name; empty: by their sizes.
    """

    stage: str
    steps: int
    batch: int
    curve: Curve
    behind: int
    bias_rate: float
    mix: Mapping[str, float]

    def learning_rate(self, step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """The rate of a step, counted from the segment's first."""
        place = step + 1 if self.curve.shape == "rise" else step
        return self.curve(self.behind + place * self.batch)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole training, step by step. Steps count from 0: step 0 is the first.

    Attributes:
        segments: In order.
        sequence_length: Predicted tokens per sequence.
    """

    segments: tuple[Segment, ...]
    sequence_length: int

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The first step of each segment, and the number of all steps."""
        return tuple(itertools.accumulate((s.steps for s in self.segments), initial=0))

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.starts[-1]

    @property
    def max_batch(self) -> int:
        """Sequences in the largest step."""
        return max(segment.batch for segment in self.segments)

    def learning_rate(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate of a step, float32; an `optax.Schedule`, traced or not."""
        schedules = [segment.learning_rate for segment in self.segments]
        rate = optax.join_schedules(schedules, self.starts[1:-1])(jnp.asarray(step))
        return jnp.asarray(rate, jnp.float32)

    def bias_rate(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The router biases' rate in a step, float32; an `optax.Schedule`, traced or not."""
        schedules = [optax.constant_schedule(segment.bias_rate) for segment in self.segments]
        rate = optax.join_schedules(schedules, self.starts[1:-1])(jnp.asarray(step))
        return jnp.asarray(rate, jnp.float32)

    def segment(self, step: int) -> Segment:
        """Where a step lies; those after the end, in the last."""
        ends = zip(self.starts[1:], self.segments, strict=True)
        return next((segment for end, segment in ends if step < end), self.segments[-1])

    def sequences(self, step: int) -> int:
        """Sequences read before a step."""
        return sum(
            min(max(step - start, 0), segment.steps) * segment.batch
            for start, segment in zip(self.starts, self.segments, strict=False)
        )

    def tokens(self, step: int) -> int:
        """Tokens behind the run when a step begins."""
        return self.sequences(step) * self.sequence_length

    def stage_ends(self) -> dict[str, int]:
        """The number of steps that each stage has behind it when it ends."""
        ends = zip(self.segments, self.starts[1:], strict=True)
        return {segment.stage: end for segment, end in ends}

    def cooled_down_at(self, step: int) -> "Plan":
        """The plan whose last stage begins at this step, from the rate that the run has there.

        Raises:
            ValueError: There is one stage only, or the step lies in the last.
        """
        *earlier, last = self.stage_ends()
        end = self.stage_ends()[earlier[-1]] if earlier else 0
        if not 0 < step <= end:
            raise ValueError(
                f"a cooldown can begin after steps 1 to {end}, where the stage {last!r} begins; "
                f"got {step}"
                if earlier
                else f"this schedule has one stage, {last!r}, and no cooldown to begin earlier"
            )
        kept = [
            dataclasses.replace(segment, steps=min(segment.steps, step - start))
            for start, segment in zip(self.starts, self.segments, strict=False)
            if start < step
        ]
        tail = [segment for segment in self.segments if segment.stage == last]
        rate = float(self.learning_rate(step))
        for i, segment in enumerate(tail):
            if segment.curve.shape == "rise":
                tail[i] = dataclasses.replace(segment, curve=segment.curve._replace(start=rate))
        return Plan((*kept, *tail), self.sequence_length)


# --------------------------------------------------------------------------------------------------
# In tokens
# --------------------------------------------------------------------------------------------------


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
        stages: In order.
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
                f"{len(pieces)} segments takes it to {behind:,}; train on more, or with a smaller "
                "batch"
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
