"""Several processes of one command on this machine, which end together.

    python -m examples.moonlight.train --local-processes 4 ...

Process 0 has this terminal: its lines stand as they are, and if it reads what is typed, it gets it
from here, since a terminal lets only the processes in front read. The others have nothing to say
but errors, which stand here with their number. The first that fails ends all, its words are the
last, and its exit code is that of the command. A signal goes to process 0, which tells the others
(`stopping.py` in training), so all stop after the same step.
"""

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from examples.moonlight.common.processes.watch import LOST

# In a process that was started here: ADDRESS,PROCESSES,PROCESS,HANDLE.
VARIABLE = "MOONLIGHT_LOCAL_PROCESS"

# Seconds that the others have to end by themselves.
_PATIENCE = 10.0

# Seconds until a line of another process is repeated: what one says because a third is gone, pages
# from C++, comes a moment before it is known which is gone, and is left out.
_HELD = 0.5

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def launch(count: int, environment: Mapping[str, str] | None = None, *, reads: bool = False) -> int:
    """Starts this process's own command `count` times, and waits until all have ended.

    Args:
        count: How many.
        environment: What the processes find in their environment besides this one's.
        reads: Whether process 0 reads what is typed in the terminal.

    Returns:
        The exit code: 0, or that of the first process that failed.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    return run_together(command, count, environment or {}, reads=reads)


def run_together(
    command: Sequence[str], count: int, environment: Mapping[str, str], *, reads: bool = False
) -> int:
    """Starts a command `count` times; see `launch`."""
    on_terminal = sys.stdin.isatty()
    address = f"localhost:{_free_port()}"
    read, write = os.pipe()  # closes when this process is gone, whatever ended it
    passed: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: passed.append(number))
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    processes: list[subprocess.Popen[bytes]] = []
    tellers: list[_Teller] = []
    try:
        for i in range(count):
            mine = {VARIABLE: f"{address},{count},{i},{read}"}
            process = subprocess.Popen(
                command,
                env=os.environ | environment | mine,
                stdin=_input(i, on_terminal=on_terminal, reads=reads),
                stdout=None if i == 0 else subprocess.DEVNULL,
                stderr=None if i == 0 else subprocess.PIPE,
                pass_fds=[read],
                # Ctrl-C is one signal to this process, and none to those.
                process_group=0,
            )
            processes.append(process)
            if process.stderr is not None:
                tellers.append(_Teller(i, process.stderr))
            if process.stdin is not None:
                threading.Thread(target=_pass_on, args=[process.stdin], daemon=True).start()
        os.close(read)
        return _wait(processes, tellers, passed)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(write)


def _input(number: int, *, on_terminal: bool, reads: bool) -> int | None:
    """What a process reads: process 0 this one's input, or what is typed; the others nothing."""
    if number == 0 and not on_terminal:
        return None
    return subprocess.PIPE if number == 0 and reads else subprocess.DEVNULL


def _pass_on(stream: IO[bytes]) -> None:
    """Hands what is typed to process 0, until its end."""
    with contextlib.suppress(OSError, ValueError), stream:
        while typed := os.read(sys.stdin.fileno(), 1 << 16):
            stream.write(typed)
            stream.flush()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    tellers: Sequence["_Teller"],
    passed: Sequence[int],
) -> int:
    """Waits for all, or for the first that fails: its exit code, and its last words."""
    failed, told, deadline = None, 0, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for number in passed[told:]:
            told += 1
            if told <= 2:
                processes[0].send_signal(number)
            else:  # nobody who was asked twice and does not end is asked again
                deadline = 0.0
        if failed is None:
            failed = _first_failed(processes, passed)
            if failed is not None:
                deadline = time.monotonic() + _PATIENCE
            for teller in tellers:
                teller.tell(time.monotonic() - _HELD)
        time.sleep(0.02)
    stuck = [i for i, process in enumerate(processes) if process.poll() is None]
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    failed = _first_failed(processes, passed) if failed is None else failed
    for teller in tellers:
        teller.join()
        if failed in (None, teller.number):
            teller.tell(float("inf"))
    if failed is None:
        return next((code for process in processes if (code := process.returncode)), 0)
    code = processes[failed].returncode
    if code < 0:
        name = signal.Signals(-code).name
        words = f"process {failed} was ended by {name}"
        if code == -signal.SIGABRT and stuck:  # JAX gave up the one that did not end by itself
            words = f"process {stuck[0]} gave no sign of life any more, and was ended"
        print(f"error: {words}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def _first_failed(
    processes: Sequence[subprocess.Popen[bytes]], passed: Sequence[int]
) -> int | None:
    """A process that failed by itself: not as another one was lost, nor as it was asked to stop."""
    fine = {None, 0, LOST, *(128 + number for number in passed)}
    failed = [i for i, process in enumerate(processes) if process.returncode not in fine]
    # JAX ends a process by SIGABRT when another one is gone.
    return min(failed, key=lambda i: processes[i].returncode == -signal.SIGABRT, default=None)


class _Teller(threading.Thread):
    """Repeats a process's errors, each line with the process's number."""

    def __init__(self, number: int, stream: IO[bytes]):
        super().__init__(daemon=True)
        self.number, self._stream = number, stream
        self._lines: collections.deque[tuple[float, bytes]] = collections.deque()
        self.start()

    def run(self) -> None:
        """Reads them as they come."""
        for line in self._stream:
            self._lines.append((time.monotonic(), line))

    def tell(self, until: float) -> None:
        """Repeats those that came before a time."""
        while self._lines and self._lines[0][0] < until:
            words = self._lines.popleft()[1].decode(errors="replace").rstrip("\n")
            with contextlib.suppress(OSError, ValueError):
                print(f"process {self.number}: {words}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
