"""Helpers for files that mean harm: bounds of time and memory, and what a clear error is."""

import contextlib
import json
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

# Of ru_maxrss, which is in bytes on macOS only.
_UNIT = 1 if sys.platform == "darwin" else 1024


@contextlib.contextmanager
def bounded(*, seconds: float = 20, megabytes: int = 300):
    """Fails if the block takes longer, or if this process' peak of memory grows by more."""

    def late(*_):
        pytest.fail(f"takes more than {seconds} s")

    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = signal.signal(signal.SIGALRM, late)  # what waits for a pipe waits for ever
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    took = time.monotonic() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * _UNIT / 2**20
    assert took < seconds, f"took {took:.1f} s"
    assert grown < megabytes, f"took {grown:.0f} MB"


def edit_json(path: Path, **changes) -> None:
    """Sets fields of a JSON file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def sparse(path: Path, start: bytes = b"", size: int = 10**10) -> None:
    """A file of 10 GB that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def raw_safetensors(path: Path, header: str | bytes, data: bytes = b"", length: int | None = None):
    """A safetensors file with whatever header."""
    content = header if isinstance(header, bytes) else header.encode()
    size = len(content) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + content + data)
