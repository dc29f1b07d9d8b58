"""Finished runs: one JSON line each, appended whole, found again by content."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.scaling_law.protocol import Run, from_json

Record = dict[str, Any]

RUNS = "runs.jsonl"


class Store:
    """The runs of one folder.

    A process killed while it wrote leaves half a line at the end; the next one takes it off, and
    that run is repeated. Nothing else is ever removed.

    Args:
        folder: Made if it is not there; the runs are in its `runs.jsonl`.

    Raises:
        ValueError: A line is not a run's record; the message names the line.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RUNS
        if self.path.exists():
            content = self.path.read_bytes()
            if whole := content[: content.rfind(b"\n") + 1]:
                self.records = {record["key"]: record for record in _parse(self.path, whole)}
            else:
                self.records = {}
            if len(whole) < len(content):
                os.truncate(self.path, len(whole))
        else:
            self.records = {}

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> Record:
        return self.records[key]

    def append(self, record: Record) -> None:
        """Adds a record, on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record


def read_runs(path: Path) -> dict[Run, Record]:
    """The records of a file by what was run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a record, or runs are of several corpora or protocols, so that
            the file holds two results for one run.
    """
    runs: dict[Run, Record] = {}
    for record in _parse(path, path.read_bytes()):
        run = from_json(record["run"])
        if run in runs and runs[run]["key"] != record["key"]:
            raise ValueError(
                f"{path} has two results for one run, of the corpora {runs[run]['corpus']} and "
                f"{record['corpus']}, or of two versions of the study: keep those of one"
            )
        runs[run] = record
    return runs


def losses(records: Mapping[Run, Record], runs: Iterable[Run]) -> list[float]:
    """Final losses of some runs; a run that diverged has infinity.

    Raises:
        KeyError: A run is not there.
    """
    values = (records[run]["val_loss"] for run in runs)
    return [float("inf") if value is None else value for value in values]


def _parse(path: Path, content: bytes) -> Iterable[Record]:
    for number, line in enumerate(content.decode().splitlines(), start=1):
        try:
            record = json.loads(line)
            from_json(record["run"])
            missing = {"key", "corpus", "val_loss"} - record.keys()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not the record of a run ({error})") from error
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(sorted(missing))}")
        yield record
