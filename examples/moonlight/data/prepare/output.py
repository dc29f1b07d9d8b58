"""The folder of a prepared corpus while it is written: what is on disk counts, and nothing else.

Tokens are appended to the shards in the order of the texts. Now and then what was appended is
brought to the disk, and then a note of how far that is gets its place (`unfinished.json`). Ended at
any moment, the program cuts the shards to the last note, and goes on from there.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from tokenizers import Tokenizer

from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.common.untrusted import MEBIBYTE, shown_name
from examples.moonlight.data.corpus import Tally
from examples.moonlight.data.prepare.encoding import Encoded
from examples.moonlight.data.prepare.pieces import START, Piece, Place
from examples.moonlight.data.prepared import (
    DTYPES,
    MANIFEST,
    TRAIN,
    UNFINISHED,
    VALIDATION,
    Manifest,
    Shard,
    digest_of,
    shard_name,
)
from examples.moonlight.data.tokenizer import TOKENIZER

LOCK = ".lock"

# Tokens of a shard: files of 2 or 4 GiB, of which a process can have a thousand open.
SHARD = 2**30

# Seconds between two notes of how far the disk is.
INTERVAL = 5.0


@dataclasses.dataclass
class Progress:
    """How far a corpus is written.

    Attributes:
        place: Where the next piece of the texts begins.
        read: Bytes of the files that are behind.
        documents: Documents so far.
        held_out: How many of them are held out.
        text: Bytes of their text.
        left_out: What is no text, see `Tally`.
        tokens: Tokens by kind.
        shards: The SHA-256 of each full shard, by kind.
    """

    place: Place = START
    read: int = 0
    documents: int = 0
    held_out: int = 0
    text: int = 0
    left_out: Tally = dataclasses.field(default_factory=Tally)
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    shards: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: {TRAIN: [], VALIDATION: []}
    )

    def record(self) -> dict[str, Any]:
        """What `unfinished.json` has of it."""
        return vars(self) | {"left_out": self.left_out.counts}

    @classmethod
    def read_from(cls, record: Mapping[str, Any]) -> "Progress":
        """Inverts `record`."""
        progress = cls(**record)
        progress.place, progress.left_out = Place(*progress.place), Tally(record["left_out"])
        return progress


class Output:
    """A corpus in the making: a context, in which no other process may write the folder.

    Args:
        folder: Where it goes. What an earlier process began there is gone on with.
        settings: What decides which tokens are written: as JSON can hold it.
        tokenizer: Is copied there.
        dtype: "uint16" or "uint32".
        shard: Tokens of a file.

    Attributes:
        progress: How far it is.
        finished: What an earlier process finished; None if there is something to do.

    Raises:
        FileExistsError: The folder holds something else.
        RuntimeError: Another process works there.
        ValueError: The folder holds a corpus of other texts or settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        tokenizer: Tokenizer,
        dtype: str,
        *,
        shard: int = SHARD,
    ):
        self._folder, self._settings = folder, dict(settings)
        self._tokenizer, self._dtype, self._shard = tokenizer, DTYPES[dtype], shard
        self._written = {kind: _Shards(self, kind) for kind in (TRAIN, VALIDATION)}
        self._noted = time.monotonic()
        self.progress = Progress()
        self.finished: dict[str, Any] | None = None

    def __enter__(self) -> "Output":
        folder = self._folder
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"--output {shown_name(folder)} is a file: choose a folder")
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if names - {LOCK} and not names & {MANIFEST, UNFINISHED}:
            raise FileExistsError(
                f"--output {shown_name(folder)} is not empty: choose another folder"
            )
        self._lock = filelock.FileLock(folder / LOCK, thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise RuntimeError(
                f"--output {shown_name(folder)} is in use by another process: wait until it ends, "
                "or choose another folder"
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # No note here: an error, or Ctrl-C, may have come between the two kinds of a piece.
        for shards in self._written.values():
            shards.close()
        self._lock.release()

    def _open(self) -> None:
        manifest, note = self._folder / MANIFEST, self._folder / UNFINISHED
        if manifest.exists():
            self.finished = read_json(manifest)
            self._compare(self.finished.get("settings", {}))
        elif note.exists():
            found = read_json(note)
            self._compare(found.get("settings", {}))
            self.progress = Progress.read_from(found["progress"])
        else:
            self._write_note()
        if self.finished is None:
            write_atomically(self._folder / TOKENIZER, self._tokenizer.to_str().encode())
            for shards in self._written.values():
                shards.open()

    def _compare(self, there: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {there.get(name)} and is now {value}"
            for name, value in self._settings.items()
            if there.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"--output {shown_name(self._folder)} holds a corpus of other texts or settings: "
                f"{'; '.join(changed)}; choose another folder, or remove it"
            )

    def add(self, piece: Piece, encoded: Encoded) -> None:
        """Appends a piece's tokens."""
        progress = self.progress
        for kind, tokens in ((TRAIN, encoded.train), (VALIDATION, encoded.validation)):
            self._written[kind].add(tokens)
        progress.place, progress.read = piece.end, piece.read
        progress.documents += encoded.documents
        progress.held_out += encoded.held_out
        progress.text += encoded.text
        progress.left_out.add([*piece.left_out, *encoded.left_out])
        if time.monotonic() - self._noted > INTERVAL:
            self.note()

    def note(self) -> None:
        """Brings what was appended to the disk, and notes it."""
        for shards in self._written.values():
            shards.sync()
        self._write_note()
        self._noted = time.monotonic()

    def _write_note(self) -> None:
        content = {"settings": self._settings, "progress": self.progress.record()}
        write_atomically(self._folder / UNFINISHED, json.dumps(content).encode())

    def finish(self, vocabulary: int, end_of_text: int) -> dict[str, Any]:
        """Writes `tokens.json`, and returns what it holds.

        Args:
            vocabulary: The tokenizer's largest id, and 1.
            end_of_text: The id behind every document.
        """
        self.note()
        progress = self.progress
        manifest = Manifest(
            self._dtype.name,
            vocabulary,
            end_of_text,
            digest_of(self._folder / TOKENIZER),
            self._written[TRAIN].shards(),
            self._written[VALIDATION].shards(),
        )
        record = manifest.record() | {
            "documents": progress.documents,
            "held_out_documents": progress.held_out,
            "text_bytes": progress.text,
            "left_out": progress.left_out.counts,
            "settings": self._settings,
        }
        write_atomically(self._folder / MANIFEST, json.dumps(record, indent=2).encode())
        (self._folder / UNFINISHED).unlink()
        self.finished = record
        return record


class _Shards:
    """The files of one kind; full ones are closed, and have their digest in the progress."""

    def __init__(self, output: Output, kind: str):
        self._output, self._kind = output, kind
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    @property
    def _full(self) -> list[str]:
        return self._output.progress.shards[self._kind]

    @property
    def _in_last(self) -> int:
        """Tokens of the shard that is not full."""
        total = self._output.progress.tokens[self._kind]
        return total - len(self._full) * self._output._shard

    def _path(self, number: int) -> Path:
        return self._output._folder / shard_name(self._kind, number)

    def open(self) -> None:
        """Opens the last shard, cut to what was noted; later ones are removed."""
        last = len(self._full)
        for path in self._output._folder.glob(f"{self._kind}-*.bin"):
            if path.name > shard_name(self._kind, last):
                path.unlink()
        for number in range(last):
            self._check(number, self._output._shard)
        path = self._path(last)
        path.touch()
        size = self._check(last, self._in_last)
        self._digest = hashlib.sha256()
        with path.open("rb") as file:
            left = size
            while left:
                block = file.read(min(left, 16 * MEBIBYTE))
                self._digest.update(block)
                left -= len(block)
        self._file = path.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)

    def _check(self, number: int, tokens: int) -> int:
        """Checks that a shard has what was noted, at least, and returns its bytes."""
        path, size = self._path(number), tokens * self._output._dtype.itemsize
        if (there := path.stat().st_size if path.exists() else 0) < size:
            raise ValueError(
                f"{shown_name(path)} has {there:,} bytes, and had {size:,} when it was written: "
                "remove the folder, and begin again"
            )
        return size

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens; where a shard is full, to the next one."""
        assert self._file is not None
        while len(tokens):
            part = tokens[: self._output._shard - self._in_last]
            content = part.astype(self._output._dtype, copy=False).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._output.progress.tokens[self._kind] += len(part)
            tokens = tokens[len(part) :]
            if self._in_last == self._output._shard:
                self.sync()
                self._file.close()
                self._full.append(self._digest.hexdigest())
                self._digest = hashlib.sha256()
                self._file = self._path(len(self._full)).open("wb")

    def sync(self) -> None:
        """Brings the last shard to the disk."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def shards(self) -> tuple[Shard, ...]:
        """All shards; an empty last one is removed."""
        size, last = self._output._shard, self._in_last
        full = tuple(Shard(size, digest) for digest in self._full)
        if last:
            return (*full, Shard(last, self._digest.hexdigest()))
        self._path(len(full)).unlink()
        return full
