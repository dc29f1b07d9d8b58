"""The record of a run: a JSON line per optimizer step and per validation, also for TensorBoard.

A line is written before the checkpoint of its step, so a checkpoint never lacks its history; what a
killed run wrote after its last checkpoint is cut off on resume, so each step appears exactly once.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from examples.moonlight.files import write_atomically

FILE = "metrics.jsonl"
TRAIN, VALIDATION, MONITOR = "train", "validation", "monitor"


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, `TRAIN`, `VALIDATION` or `MONITOR`, in order of their steps."""
    records = map(json.loads, path.read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder.

    Args:
        folder: The run's folder; it exists.
        after_step: The step of the checkpoint that the run continues from; later lines are removed.
            0 for a fresh run.

    Raises:
        ValueError: The file lacks steps that the checkpoint has behind it.
    """

    def __init__(self, folder: Path, *, after_step: int):
        self._path = folder / FILE
        write_records(self._path, records_until(self._path, after_step))
        self._file = self._path.open("a", encoding="utf-8")
        # purge_step makes TensorBoard forget what a killed run wrote beyond its checkpoint.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(
        self,
        kind: str,
        step: int,
        values: Mapping[str, Any],
        scalars: Mapping[str, float] | None = None,
    ) -> None:
        """Adds one record; `step` counts finished optimizer steps, so the first is 1.

        TensorBoard gets the `scalars`: where they are left out, the values themselves.
        """
        record = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        for name, value in (values if scalars is None else scalars).items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Hands every record to the operating system, where a `kill -9` cannot reach it."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()


def records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records up to a step, of all kinds, in order.

    Raises:
        ValueError: Steps are missing.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # The line that a kill interrupted: nothing after it is older.
        if record["step"] > step:
            break
        kept.append(record)
    steps = [record["step"] for record in kept if record["kind"] == TRAIN]
    if steps != list(range(1, step + 1)):
        raise ValueError(
            f"{path} lacks steps that the checkpoint of step {step} has behind it: the file was "
            "changed; start again in another --output-dir"
        )
    return kept


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of records, whole or not at all."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())
