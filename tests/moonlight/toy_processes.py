"""A toy training with the flags of the program, as one process or several: `python -m` this.

`HURT=2:SIGKILL:5` has process 2 send itself that signal when it is to take step 5, and
`HURT=2:SIGKILL:save` when it is to save for the second time.
"""

import os
import signal

from examples.moonlight.common.processes import group
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.train import COMMAND_LINE, main
from examples.moonlight.training import loop
from tests.moonlight import toy


def hurt(process: str, name: str, when: str) -> None:
    """Patches what is called at a moment."""
    call, save, saved = loop.Run._call, Checkpoints.save, []

    def send() -> None:
        if group.index() == int(process):
            os.kill(os.getpid(), signal.Signals[name])

    def call_then(self, state, step, count, buffer_sabt):
        if when != "save" and step < int(when) <= step + count:
            send()
        return call(self, state, step, count, buffer_sabt)

    def save_then(self, step, **items):
        saved.append(step)
        if when == "save" and len(saved) == 2:
            self.wait()  # for the first one
            send()
        return save(self, step, **items)

    loop.Run._call, Checkpoints.save = call_then, save_then


if __name__ == "__main__":
    if asked_for := os.environ.get("HURT"):
        hurt(*asked_for.split(":"))
    main(COMMAND_LINE.parse(), toy.CONFIG)
