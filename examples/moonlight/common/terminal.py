"""A terminal that a program outlives: one that closes, fills its disk, or lacks a character."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


def make_sturdy() -> None:
    """Lets a program go on when what it prints cannot be printed.

    Characters that the encoding of the output lacks become question marks. After the first failure
    to write (a pipe whose reader ended, a full disk) nothing more is printed: what a program writes
    to files is its own to check.
    """
    # None stands for a stream that was closed before the program began.
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, _Sturdy(stream))


def keep_stdout_from_libraries() -> None:
    """Has only Python write to the standard output.

    Libraries in C++ write to the same file, past Python and in the midst of its lines: gloo says
    there how many others it is connected to.
    """
    stream = sys.stdout
    if stream is None:
        return
    stream.flush()
    if stream.fileno() != 1:
        return
    own = os.fdopen(os.dup(1), "w", 1, encoding=stream.encoding)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = _Sturdy(own)


class _Sturdy(io.TextIOBase):
    """A stream that hands everything to another one until that fails."""

    def __init__(self, stream: Any):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        self._stream = stream
        self._broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.encoding

    def isatty(self) -> bool:
        return not self._broken and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if not self._broken:
            with self._outlived():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            with self._outlived():
                self._stream.flush()

    @contextlib.contextmanager
    def _outlived(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self._broken = True
            # What is buffered cannot be written either, and would fail again at the end.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
