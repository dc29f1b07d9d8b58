"""Bytes to train on, in two parts that share no file: one to tune on, one to report.

A file's part and whether it is held out follow from its name alone. The default corpus is the
Python standard library's sources, which every machine has and which differ between Python
releases: the hash of the text is part of every result.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.moonlight.data.corpus import (
    Document,
    hash_documents,
    load_documents,
    split_documents,
)

# The largest study reads each of its bytes about once; tuning reads its fewer bytes more often.
TUNING_SHARE = 0.3

# Repeating text up to four times is nearly as good as new text (Muennighoff et al. 2023).
MAX_EPOCHS = 4


class Part(NamedTuple):
    """Training and held-out bytes of one part, uint8 `[bytes]`."""

    train: np.ndarray
    validation: np.ndarray


class Corpus(NamedTuple):
    """Both parts, and the hash over every file's name and text."""

    hash: str
    tuning: Part
    study: Part


def load_corpus(path: Path | None) -> Corpus:
    """Reads a corpus and divides it.

    Args:
        path: A folder of text files or a .jsonl file; None is the standard library's sources.

    Raises:
        FileNotFoundError, ValueError: It cannot be read, or has too few documents for two parts.
    """
    documents = load_documents(path)
    if len(documents) < 4:
        raise ValueError(
            f"--data {path}: {len(documents)} documents are too few to tune on some and report "
            "others, with some of each held out; give a folder of files, or a .jsonl file"
        )
    ranked = sorted(documents, key=lambda document: _rank(document.name))
    count = min(max(2, round(TUNING_SHARE * len(ranked))), len(ranked) - 2)
    return Corpus(hash_documents(documents), _part(ranked[:count]), _part(ranked[count:]))


def _part(documents: list[Document]) -> Part:
    train, validation = split_documents(sorted(documents, key=lambda document: document.name))
    return Part(_bytes(train), _bytes(validation))


def _bytes(documents: list[Document]) -> np.ndarray:
    # A zero byte, which no text has, ends each document.
    text = b"\0".join(document.text.encode() for document in documents)
    return np.frombuffer(text, np.uint8)


def _rank(name: str) -> bytes:
    # Salted: the same hash without salt decides who is held out.
    return hashlib.sha256(b"part:" + name.encode()).digest()
