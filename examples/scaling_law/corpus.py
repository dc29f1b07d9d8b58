"""Bytes to train on, in two parts that share no file: one to tune on, one to report.

The third, `distinct`, is the reported part without the files that mostly repeat others: of the
standard library, many tables of character encodings, nearly equal, of which some are held out.

A file's part, and whether it is held out, follow from the files' names. The default corpus is the
Python standard library's sources, which every machine has and which differ between Python
releases: the hash of the text is part of every result. It has the tables that the Moonlight example
leaves out, since the committed results were measured with them.

    python -m examples.scaling_law.corpus      how large the parts are, and how much is repeated
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich
from rich.table import Table

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.data.corpus import (
    Document,
    hash_documents,
    load_documents,
    split_documents,
    standard_library,
)
from examples.scaling_law.protocol import Run

# The main study reads each of its bytes about once; tuning reads its fewer bytes more often.
TUNING_SHARE = 0.3

# A file is left out of `distinct` if this share of the bytes in its longer lines is in lines that
# another file has, too.
_REPEATED_SHARE = 0.5
_LONG_LINE = 25

# Repeating text up to four times is nearly as good as new text (Muennighoff et al. 2023).
MAX_EPOCHS = 4


class Part(NamedTuple):
    """Training and held-out bytes of one part, uint8 `[bytes]`."""

    train: np.ndarray
    validation: np.ndarray


class Corpus(NamedTuple):
    """All parts, and the hash over every file's name and text."""

    hash: str
    tuning: Part
    study: Part
    distinct: Part | None

    def part(self, run: Run) -> Part:
        """What a run reads.

        Raises:
            ValueError: It would read its text more than `MAX_EPOCHS` times, or there is none.
        """
        part: Part | None = getattr(self, run.part)
        if part is None:
            raise ValueError("the files of this corpus all repeat each other: give another --data")
        epochs = run.trained_tokens / len(part.train)
        if epochs > MAX_EPOCHS:
            raise ValueError(
                f"a run of {run.trained_tokens:,} tokens would read the {len(part.train):,} bytes "
                f"of its part of the corpus {epochs:.1f} times, and more than {MAX_EPOCHS} times "
                "no longer counts as new text: give a larger corpus with --data, or train a "
                "smaller size"
            )
        return part


def load_corpus(path: Path | None, *, tell: Callable[[str], object] = print) -> Corpus:
    """Reads a corpus and divides it.

    Args:
        path: A folder of text files or a .jsonl file; None is the standard library's sources.
        tell: Is given a sentence on what the folder has that is no text; see `load_documents`.

    Raises:
        FileNotFoundError, ValueError: It cannot be read, or has too few documents for two parts.
    """
    documents = standard_library(tables=True) if path is None else load_documents(path, tell=tell)
    ranks = sorted({_rank(document.name) for document in documents})
    if len(ranks) < 4:
        raise ValueError(
            f"--data {path}: {len(ranks)} different documents are too few to tune on some and "
            "report others, with some of each held out; give a folder of files, or a .jsonl file"
        )
    cutoff = ranks[min(max(2, round(TUNING_SHARE * len(ranks))), len(ranks) - 2) - 1]
    tuning = [document for document in documents if _rank(document.name) <= cutoff]
    study = [document for document in documents if _rank(document.name) > cutoff]
    distinct = _without_repeats(study)
    return Corpus(
        hash_documents(documents),
        _part(tuning),
        _part(study),
        _part(distinct) if len(distinct) > 1 else None,
    )


def repeated_share(part: Part) -> float:
    """The share of held-out bytes that are in longer lines which training text has, too."""
    train, held_out = (half.tobytes().replace(b"\0", b"\n").splitlines() for half in part)
    known = set(train)
    repeated = (len(line) for line in held_out if len(line) >= _LONG_LINE and line in known)
    return sum(repeated) / len(part.validation)


def _without_repeats(documents: list[Document]) -> list[Document]:
    """Leaves out files that mostly repeat others."""
    lines = [
        [line for line in document.text.splitlines() if len(line) >= _LONG_LINE]
        for document in documents
    ]
    files_with = collections.Counter(line for each in lines for line in set(each))

    def repeated(each: list[str]) -> float:
        total = sum(map(len, each))
        return sum(len(line) for line in each if files_with[line] > 1) / total if total else 0.0

    pairs = zip(documents, lines, strict=True)
    return [document for document, each in pairs if repeated(each) < _REPEATED_SHARE]


def _part(documents: list[Document]) -> Part:
    train, validation = split_documents(sorted(documents, key=lambda document: document.name))
    return Part(_bytes(train), _bytes(validation))


def _bytes(documents: list[Document]) -> np.ndarray:
    # A zero byte, which source files have not, between documents.
    text = b"\0".join(document.text.encode() for document in documents)
    return np.frombuffer(text, np.uint8)


def _rank(name: str) -> bytes:
    # Salted: the same hash without salt decides who is held out.
    return hashlib.sha256(b"part:" + name.encode()).digest()


@dataclasses.dataclass(frozen=True)
class Args:
    """Prints the parts of a corpus."""

    data: Path | None = None
    """Folder of text files or .jsonl file; left out, the Python standard library's own source."""


def main(args: Args) -> None:
    """Prints a line for each part."""
    corpus = load_corpus(args.data)
    table = Table(title=f"corpus {corpus.hash}")
    for i, column in enumerate(("part", "files", "bytes", "held out", "repeated")):
        table.add_column(column, justify="right" if i else "left")
    for name in ("tuning", "study", "distinct"):
        part: Part | None = getattr(corpus, name)
        if part is not None:
            files = sum(int(np.sum(half == 0)) + 1 for half in part)
            sizes = (files, len(part.train), len(part.validation))
            table.add_row(name, *(f"{size:,}" for size in sizes), f"{repeated_share(part):.1%}")
    rich.print(table)
    rich.print(
        f"repeated: of the held-out bytes, those in lines of {_LONG_LINE} bytes or more that "
        "training files have, too"
    )


if __name__ == "__main__":
    CommandLine("examples.scaling_law.corpus", Args, __doc__).run(main)
