"""TensorBoard's file, written in the thread that trains.

tensorboardX' own `SummaryWriter` hands events to another thread through a short queue. That thread
ends with its first error (a full disk), and who writes the eleventh event after that waits for
ever. Its event files are used here, without its thread: an error is an error.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

# Made by protobuf when it is imported, where no type checker sees them.
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]


class Board:
    """An event file in a folder of its own.

    Args:
        folder: Made when missing; a run that is resumed adds a file to it.
        after_step: TensorBoard forgets what earlier files have of later steps.

    Raises:
        OSError: The file cannot be written; `add` and `flush` raise it too.
    """

    def __init__(self, folder: Path, *, after_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{after_step}")
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=after_step + 1, session_log=start))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the values of a step, by their names."""
        for name, value in scalars.items():
            self._write(Event(step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Hands all events to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
