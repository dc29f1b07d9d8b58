"""Finished runs: one JSON line each, appended whole, found again by content.

Any number of processes may work on one folder. They write one after the other, each under a lock,
and each run is trained by the one that has *claimed* it. Both are locks of the operating system
(`flock`, by the `filelock` library), which end with their process, however it ends: nothing is left
to clean up after a kill.

What holds over NFS: Linux sends `flock` to the server since 2.6.12, so that processes on several
machines exclude each other. It does not on mounts with `local_lock=flock`, `local_lock=all` or
`nolock`, where each machine locks for itself: let one machine at a time work there. A machine that
dies keeps its locks until the server takes them away or it is back. None of this was tried here. A
file system without locks raises.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from examples.scaling_law.protocol import Run, from_json

Record = dict[str, Any]

RUNS = "runs.jsonl"
CLAIMS = "claims"
FIELDS = ("key", "corpus", "val_loss")

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Store:
    """The runs of one folder.

    A process killed while it wrote leaves half a line at the end; the next one to write takes it
    off, and that run is repeated. Nothing else is ever removed.

    Args:
        folder: Made once there is something to write; the runs are in its `runs.jsonl`.
        read_run: Makes a run of a record's `run`, or raises.
        fields: What each record has besides.

    Raises:
        ValueError: A line is not a run's record; the message names the line.
    """

    def __init__(
        self,
        folder: Path,
        read_run: Callable[[dict[str, Any]], Any] = from_json,
        fields: Collection[str] = FIELDS,
    ):
        self.path = folder / RUNS
        self._expected = read_run, fields
        self.records: dict[str, Record] = {}
        # How much of the file is in `records`.
        self._bytes = self._lines = 0
        # Without the lock, since there may be no folder to lock: whole lines never change.
        self._read_new()

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> Record:
        return self.records[key]

    def append(self, record: Record) -> None:
        """Adds a record, on disk when this returns, behind what others have added meanwhile.

        Raises:
            ValueError: JSON cannot hold the record, or the file has a line that is no record.
            RuntimeError: Lines that this store has read or written are gone.
            OSError: The disk is full, or the file system has no locks.
        """
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._read_new()
            # Unbuffered: a line is one write.
            with self.path.open("ab", buffering=0) as file:
                file.truncate(self._bytes)
                file.write(line)
                os.fsync(file.fileno())
            self._bytes += len(line)
            self._lines += 1
        self.records[record["key"]] = record

    def refresh(self) -> None:
        """Reads what others have added. Raises as `append` does."""
        with self._lock():
            self._read_new()

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Keeps other processes from training a run, until the block or the process ends.

        Gives True if the run is this process's to train: no other has claimed it, and none has
        finished it either. Every record is read again for that, so one that another process has
        appended is in the store when this gives False because of it.

        Raises:
            RuntimeError, ValueError, OSError: As `append` does.
        """
        path = self.path.parent / CLAIMS / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_locked(path, timeout=0))
            except Timeout:
                yield False
                return
            self.refresh()
            yield key not in self
            if key in self:
                # Whoever opened this file before it is gone will lock it and find the record.
                path.unlink(missing_ok=True)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return _locked(self.path.with_name(f"{RUNS}.lock"), timeout=-1)

    def _read_new(self) -> None:
        """Takes in the whole lines behind those that were read; half a line stays unread."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(self._bytes)
                content = _whole_lines(file.read())
        except FileNotFoundError:
            size, content = 0, b""
        if size < self._bytes:
            raise RuntimeError(
                f"{self.path} had {self._bytes} bytes when this process last used it and has "
                f"{size} now: something removed finished runs. Put them back if you can, and "
                "start again: what is there is not trained twice"
            )
        for record in _parse(self.path, content, *self._expected, start=self._lines + 1):
            self.records[record["key"]] = record
        self._bytes += len(content)
        self._lines += content.count(b"\n")


def read_runs(path: Path, corpus: str | None = None) -> dict[Run, Record]:
    """The records of a file by what was run; those of other versions of the study are left out.

    Takes no lock, so that it reads where it may not write: whole lines never change.

    Args:
        path: A `runs.jsonl`.
        corpus: Hash of the corpus whose runs are wanted; None where the file has but one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a record, or `corpus` is None and there are several.
    """
    records = [
        (run, record)
        for record in _parse(path, _whole_lines(path.read_bytes()))
        if record["key"] == (run := from_json(record["run"])).key(record["corpus"])
    ]
    corpora = {record["corpus"] for _, record in records}
    if corpus is None and len(corpora) > 1:
        raise ValueError(
            f"{path} has runs on the corpora {', '.join(sorted(corpora))}: report one of them"
        )
    return {run: record for run, record in records if corpus in (None, record["corpus"])}


@contextlib.contextmanager
def _locked(path: Path, *, timeout: float) -> Iterator[None]:
    # Its other kind of lock, a file that merely exists, would outlive a killed process.
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise OSError(
            error.errno,
            f"the file system of {path.parent} cannot lock files, and without locks two processes "
            "destroy each other's records: give --output-dir a folder on another file system",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _parse(
    path: Path,
    content: bytes,
    read_run: Callable[[dict[str, Any]], Any] = from_json,
    fields: Collection[str] = FIELDS,
    start: int = 1,
) -> Iterable[Record]:
    for number, line in enumerate(content.splitlines(), start=start):
        try:
            record = json.loads(line.decode())
            read_run(record["run"])
            missing = {*fields} - record.keys()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not the record of a run ({error})") from error
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(sorted(missing))}")
        yield record
