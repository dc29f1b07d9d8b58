r"""When training does what: learning rate, batch size, bias rate and data mix of every step.

Everything in a `Plan` is a function of the step alone: a run that is stopped, continued or taken
back finds its place from one integer. Plans are made of outlines in tokens (`outline.py`).

Within a step nothing changes, so its place on a curve has to be chosen. Where the rate rises it is
that of the step's end, so that the first step already moves and the last has the peak; where it
falls, that of the step's beginning, so that the first has the peak and none has the 0 at the end.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Shape = Literal["rise", "linear", "cosine"]


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
        segments: The segments in order.
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

    def rates(self, steps: np.ndarray) -> np.ndarray:
        """The learning rates of some steps, by one program; a call for each takes a second."""
        # Not `jit(self.learning_rate)`: its key would be the plan, whose mixes have no hash.
        return np.asarray(jax.jit(lambda steps: self.learning_rate(steps))(steps))

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
