"""The record of a run: a JSON line per optimizer step and per validation, also for TensorBoard.

Nothing that a run computes depends on it: a checkpoint holds all that the run goes on from. Lines
reach the operating system after every call, and the disk when a checkpoint of their step is begun,
so that a loss of power may cost lines, and never a checkpoint. On
resume, lines after the checkpoint's step are cut off, so each step appears exactly once; lines that
are missing or unreadable are told, and stay missing.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import rich
from rich.console import Console

from examples.moonlight.common.files import write_atomically

FILE = "metrics.jsonl"
UNREADABLE = "metrics.unreadable.jsonl"
TENSORBOARD = "tensorboard"
TRAIN, VALIDATION, MONITOR = "train", "validation", "monitor"

# Training losses in a mean, in pictures and words: single steps differ by more than what is shown.
SMOOTHING = 25


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, `TRAIN`, `VALIDATION` or `MONITOR`, in order of their steps.

    A number that was not finite, and is null in the file, is NaN.
    """
    return [
        {name: float("nan") if value is None else value for name, value in record.items()}
        for record in _read(path).records
        if record["kind"] == kind
    ]


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder.

    Args:
        folder: The run's folder; it exists.
        after_step: The step of the checkpoint that the run continues from; later lines are removed.
            0 for a fresh run.
        console: Told what the file lacks, and what became of it; left out, the terminal.
    """

    def __init__(self, folder: Path, *, after_step: int, console: Console | None = None):
        console = console or rich.get_console()
        self._path, self._console = folder / FILE, console
        found = _read(self._path)
        if found.unreadable:
            write_atomically(folder / UNREADABLE, self._path.read_bytes())
            _warn(
                console,
                f"{self._path}: {found.unreadable} lines cannot be read and are left out; the file "
                f"as it was is {folder / UNREADABLE}",
            )
        kept = records_until(self._path, after_step, console)
        write_records(self._path, kept)
        self._losses = [record["loss"] for record in kept if record["kind"] == TRAIN]
        self._open()
        # Here, because tensorboardX imports torch where that is installed, which takes seconds.
        from examples.moonlight.run_folder.board import Board

        self._board: Board | None = None
        with self._without_board_if_it_fails():
            self._board = Board(folder / TENSORBOARD, after_step=after_step)

    def losses(self, count: int) -> list[float]:
        """The last training losses of the steps that were there when the log was opened."""
        return [float("nan") if loss is None else loss for loss in self._losses[-count:]]

    def _open(self) -> None:
        self._file = self._path.open("a+", encoding="utf-8")

    def write(
        self,
        kind: str,
        step: int,
        values: Mapping[str, Any],
        scalars: Mapping[str, float] | None = None,
    ) -> None:
        """Adds one record; `step` counts finished optimizer steps, so the first is 1.

        A float that is not finite is written as null: JSON has no other word for it. TensorBoard
        gets the `scalars` that are finite: where they are left out, the values themselves.
        """
        record = {"kind": kind, "step": step, **values}
        self._file.write(_line(record))
        if self._board is not None:
            named = (values if scalars is None else scalars).items()
            with self._without_board_if_it_fails():
                finite = {f"{kind}/{name}": x for name, x in named if math.isfinite(x)}
                self._board.add(step, finite)

    def flush(self) -> None:
        """Hands every record to the operating system, where a `kill -9` cannot reach it.

        A file that was deleted meanwhile is written again, with all its records.
        """
        self._file.flush()
        if not self._path.exists() and self._path.parent.is_dir():
            _warn(self._console, f"{self._path} was deleted: writing it again, with all records")
            self._file.seek(0)
            write_atomically(self._path, self._file.read().encode())
            self._file.close()
            self._open()
        if self._board is not None:
            with self._without_board_if_it_fails():
                self._board.flush()

    def sync(self) -> None:
        """Waits until every record is on disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._board is not None:
            with self._without_board_if_it_fails():
                self._board.close()
        self._file.close()

    @contextlib.contextmanager
    def _without_board_if_it_fails(self) -> Iterator[None]:
        """TensorBoard's file repeats what the other has: a run does not end for want of it."""
        try:
            yield
        except OSError as error:
            board, self._board = self._board, None
            if board is not None:
                with contextlib.suppress(OSError):
                    board.close()
            _warn(self._console, f"TensorBoard's file is no longer written: {error}")


class NoLog:
    """A log of a process that writes none, since process 0 does."""

    def losses(self, _: int) -> list[float]:
        """None."""
        return []

    def write(self, *_: Any) -> None:
        """Nothing; so do the others."""

    flush = sync = close = write


def records_until(path: Path, step: int, console: Console) -> list[dict[str, Any]]:
    """The records up to a step, of all kinds, in order, each step once; says what is missing."""
    kept, seen = [], set()
    for record in _read(path).records:
        key = (record["kind"], record["step"])
        if record["step"] <= step and key not in seen:
            seen.add(key)
            kept.append(record)
    missing = [n for n in range(1, step + 1) if (TRAIN, n) not in seen]
    if missing:
        _warn(
            console,
            f"{path} lacks {len(missing)} of the {step} steps behind the checkpoint, the first is "
            f"{missing[0]}: the run goes on, and its curves will have a gap",
        )
    return kept


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of records, whole or not at all."""
    write_atomically(path, "".join(map(_line, records)).encode())


class _Found(NamedTuple):
    records: list[dict[str, Any]]
    unreadable: int


def _read(path: Path) -> _Found:
    """The records of a file, and how many lines are none.

    The last line may be half a record, which a kill leaves behind: it does not count.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records, unreadable = [], 0
    for number, line in enumerate(lines, start=1):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if (
            isinstance(record, dict)
            and record.get("kind") in (TRAIN, VALIDATION, MONITOR)
            and type(record.get("step")) is int
        ):
            records.append(record)
        elif number < len(lines):
            unreadable += 1
    return _Found(records, unreadable)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [*map(_finite, value)] if isinstance(value, list | tuple) else value


def _warn(console: Console, message: str) -> None:
    console.print(message, style="bold yellow", markup=False, highlight=False, soft_wrap=True)
