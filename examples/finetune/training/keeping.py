"""Which checkpoints stay, and when they are made, as ms-swift's flags say it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from examples.finetune.args import Args
from examples.moonlight.run_folder.retention import best_step


@dataclasses.dataclass(frozen=True)
class TotalLimit:
    """`--save_total_limit`: the last checkpoint, the best, and the youngest of the others.

    Attributes:
        limit: How many in all; None keeps every one. Of 1, the best stays beside the last, as with
            Hugging Face's trainer.
    """

    limit: int | None

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of those whose validation losses are given."""
        steps = sorted(losses)
        if self.limit is None:
            return {*steps}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        kept = {*steps[-1:], *([best_step(measured)] if measured else [])}
        for step in reversed(steps):
            if len(kept) >= self.limit:
                break
            kept.add(step)
        return kept


class Occasions(NamedTuple):
    """The steps after which something is done: every so many, or at the end of every epoch.

    Attributes:
        every: Steps between them; 0 is never.
        epoch: Steps of an epoch; 0 where epochs do not matter.
    """

    every: int = 0
    epoch: float = 0.0

    def includes(self, step: int) -> bool:
        """Whether a step is one of them."""
        if self.every:
            return step % self.every == 0
        if not self.epoch:
            return False
        return math.floor(step / self.epoch + 1e-9) > math.floor((step - 1) / self.epoch + 1e-9)


def occasions(args: Args, epoch: float, *, validates: bool) -> tuple[Occasions, Occasions]:
    """When to save and when to validate, apart from the end.

    Args:
        args: The command line's arguments.
        epoch: Steps of an epoch.
        validates: Whether there is anything to validate on.
    """

    def made(strategy: str, every: int) -> Occasions:
        if strategy == "no":
            return Occasions()
        return Occasions(every=every) if strategy == "steps" else Occasions(epoch=epoch)

    saves = made(args.save_strategy, args.save_steps)
    if not validates:
        return saves, Occasions()
    if args.eval_strategy is None and args.eval_steps is None:
        return saves, saves
    return saves, made(args.eval_strategy or "steps", args.eval_steps or args.save_steps)
