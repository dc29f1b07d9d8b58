"""Which of a run's checkpoints are kept: a pure function of their steps and losses."""

import dataclasses
from collections.abc import Callable, Collection, Mapping


@dataclasses.dataclass(frozen=True)
class EveryTokens:
    """Keeps the first checkpoint after every so many tokens.

    It looks at no clock and no earlier decision: what is kept follows from the steps alone.

    Attributes:
        interval: Tokens.
        tokens_at: The tokens that are behind a run after so many steps.
    """

    interval: int
    tokens_at: Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a run keeps; a checkpoint stays if one of these asks for it.

    Attributes:
        latest: How many of the most recent.
        steps: Steps whose checkpoints are kept for good.
        every_tokens: See there; None for none.

    Raises:
        ValueError: The latest would not be kept.
    """

    latest: int
    steps: Collection[int] = ()
    every_tokens: EveryTokens | None = None

    def __post_init__(self):
        if self.latest < 1:
            raise ValueError(f"--max-to-keep must be at least 1, got {self.latest}")

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay.

        Args:
            losses: The validation loss of every checkpoint by step, of which the lowest is kept.
                None of one that was saved without a validation.
        """
        steps = sorted(losses)
        kept = {*steps[-self.latest :], *self.steps}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        if measured:
            kept.add(best_step(measured))
        if self.every_tokens is not None:
            passed = 0
            for step in steps:
                now = self.every_tokens.tokens_at(step) // self.every_tokens.interval
                kept |= {step} if now > passed else set()
                passed = now
        return kept & losses.keys()


def best_step(losses: Mapping[int, float]) -> int:
    """The step of the lowest loss; of equal ones, the latest."""
    return min(losses, key=lambda step: (losses[step], -step))
