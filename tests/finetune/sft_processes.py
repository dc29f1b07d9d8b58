"""A toy fine-tuning as several processes, of which the last is asked to stop: `python -m` this."""

import os
import signal

from examples.finetune import sft
from examples.finetune.training import loop
from examples.moonlight.common.processes import group

# The step in which the signal comes.
STOPPED = 3


def _stop_in_a_step() -> None:
    real = loop.Run._step

    def step(self, state, step):
        if step + 1 == STOPPED and group.index() == group.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, state, step)

    loop.Run._step = step


if __name__ == "__main__":
    _stop_in_a_step()
    sft.main()
