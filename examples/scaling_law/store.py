"""Finished runs: one JSON line each, appended whole, found again by content."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.scaling_law.protocol import Run, from_json

Record = dict[str, Any]

RUNS = "runs.jsonl"


class Store:
    """The runs of one folder.

    A process killed while it wrote leaves half a line at the end; the next one to write takes it
    off, and that run is repeated. Nothing else is ever removed.

    Args:
        folder: Made once there is something to write; the runs are in its `runs.jsonl`.

    Raises:
        ValueError: A line is not a run's record; the message names the line.
    """

    def __init__(self, folder: Path):
        self.path = folder / RUNS
        content = self.path.read_bytes() if self.path.exists() else b""
        self._whole = content.rfind(b"\n") + 1
        self.records = {
            record["key"]: record for record in _parse(self.path, content[: self._whole])
        }

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> Record:
        return self.records[key]

    def append(self, record: Record) -> None:
        """Adds a record, on disk when this returns."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a line is one write. Whole lines that another study added meanwhile stay.
        with self.path.open("a+b", buffering=0) as file:
            file.seek(self._whole)
            self._whole += file.read().rfind(b"\n") + 1
            file.truncate(self._whole)
            file.write(line)
            os.fsync(file.fileno())
        self._whole += len(line)
        self.records[record["key"]] = record


def read_runs(path: Path, corpus: str | None = None) -> dict[Run, Record]:
    """The records of a file by what was run; those of other versions of the study are left out.

    Args:
        path: A `runs.jsonl`.
        corpus: Hash of the corpus whose runs are wanted; None where the file has but one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a record, or `corpus` is None and there are several.
    """
    content = path.read_bytes()
    records = [
        (run, record)
        for record in _parse(path, content[: content.rfind(b"\n") + 1])
        if record["key"] == (run := from_json(record["run"])).key(record["corpus"])
    ]
    corpora = {record["corpus"] for _, record in records}
    if corpus is None and len(corpora) > 1:
        raise ValueError(
            f"{path} has runs on the corpora {', '.join(sorted(corpora))}: report one of them"
        )
    return {run: record for run, record in records if corpus in (None, record["corpus"])}


def _parse(path: Path, content: bytes) -> Iterable[Record]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line.decode())
            from_json(record["run"])
            missing = {"key", "corpus", "val_loss"} - record.keys()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not the record of a run ({error})") from error
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(sorted(missing))}")
        yield record
