"""Signals: the first asks a run to stop where it can go on from, the second ends it at once.

A handler in Python runs only between two instructions of Python, not inside a compilation or a
call into XLA, and an exception raised by one may strike anywhere: inside of Orbax's event loop it
hung. So the handler here raises nothing. The system's own handler writes the signal's number into
a pipe, whatever the process is doing, and a thread reads it: at the first signal it takes down
that the run is to stop, at the second it ends the process. The loop asks, between two calls.

Example: Ctrl-C in the middle of a call of 20 steps. The thread says that the run will stop, the
call ends, the loop saves a checkpoint and raises `Stopped`. Ctrl-C again while it saves: the
process ends there, and goes on from the checkpoint before.

Of several processes a signal to one stops all, after the same step: to ask whether to go on is to
ask the others. A machine that is to be taken away sends SIGTERM as well.
"""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from examples.moonlight.common.processes.group import exchange

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """A signal asked a run to stop, and it has. Not an error, so no `except Exception` takes it.

    Attributes:
        signum: The signal's number; a program ends with 128 more than it.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Takes down signals from entering the context to leaving it.

    In any thread but the main one, which alone may set handlers, it takes down nothing. A signal
    that was ignored before (SIGHUP under `nohup`) stays ignored.

    Args:
        resume: The flag that goes on with a run.

    Attributes:
        signum: The first signal that came; None before.
    """

    def __init__(self, resume: str = "--resume"):
        self.signum: int | None = None
        self._resume = resume
        self._active = threading.current_thread() is threading.main_thread()
        self._lock = threading.Lock()
        self._seen = {"pipe": 0, "handler": 0}

    def asked(self) -> bool:
        """Whether a signal came, to this process or another: the same answer in all that ask now.

        All of them ask, or none.
        """
        mine = self.signum or 0
        came = [number for text in exchange(str(mine)) if (number := int(text))]
        if not came:
            return False
        self.signum = self.signum or came[0]
        return True

    def check(self, message: str) -> None:
        """Raises `Stopped` with the message if a signal came; see `asked`."""
        if self.asked():
            assert self.signum is not None
            raise Stopped(self.signum, message)

    def __enter__(self) -> "StopRequest":
        if not self._active:
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(self._write, b"\0")  # ends the thread
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _watch(self) -> None:
        while (number := os.read(self._read, 1)[0]) != 0:
            if number in self._before:
                self._take_down(number, "pipe")

    def _handle(self, number: int, _: FrameType | None) -> None:
        # The pipe is not ours while an event loop of another library runs in the main thread.
        self._take_down(number, "handler")

    def _take_down(self, number: int, way: str) -> None:
        """Counts a signal by the way that it came; each comes once by either, or by one alone."""
        with self._lock:
            self._seen[way] += 1
            count = max(self._seen.values())
            if count == self._seen[way]:  # not the other way's echo
                if self.signum is None:
                    self.signum = number
                    _say("stopping as soon as the run can go on from there; again to end at once")
                elif count > 1:
                    _say(f"ended at once: {self._resume} goes on from the last checkpoint")
                    os._exit(128 + number)


def quieten_signals() -> None:
    """Has signals do nothing where no `StopRequest` takes them down: for a program, around its run.

    Python's own handler answers a second Ctrl-C with a traceback, also while a run that has saved
    everything says so and ends.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def _say(message: str) -> None:
    """Writes a line past the console, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())
