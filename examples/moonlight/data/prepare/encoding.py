"""One piece of a corpus, made tokens, by a process that does nothing else."""

import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.moonlight.common.untrusted import MEBIBYTE
from examples.moonlight.data.corpus import (
    Document,
    LeftOut,
    is_held_out,
    line_documents,
    part_empty,
    split_documents,
)
from examples.moonlight.data.prepare.pieces import Block, Piece
from examples.moonlight.data.tokenized import Vocabulary, encode_texts, read_vocabulary

# Characters that are encoded at a time: `tokenizers` takes about 150 bytes for each token of them.
_AT_A_TIME = MEBIBYTE

# A text longer than that is encoded in stretches, cut behind a line that another follows at once,
# or between two words: the byte-pair encodings of Moonlight, GPT-2, Qwen2 and Llama 3 merge nothing
# across. A place for it is looked for in the last characters of a stretch.
_STRETCH, _LAST = 2 * MEBIBYTE, 64 * 1024
_CUT = re.compile(r"\w(?:\n(?=\w)|(?= \w))")


class Settings(NamedTuple):
    """What all pieces are encoded with.

    Attributes:
        tokenizer: The folder or the file of the tokenizer.
        field: Where the text of an object or a row is.
        held_out: The share of documents to hold out.
        dtype: The type of the tokens, "uint16" or "uint32".
    """

    tokenizer: Path
    field: str
    held_out: float
    dtype: str


class Encoded(NamedTuple):
    """The tokens of a piece.

    Attributes:
        train: Token ids, of the settings' type [N]; every document ends in the end of text.
        validation: The tokens of the held-out documents, likewise.
        documents: How many of both.
        held_out: How many of them are held out.
        text: Bytes of their text, in UTF-8.
        left_out: The documents that have no text.
    """

    train: np.ndarray
    validation: np.ndarray
    documents: int
    held_out: int
    text: int
    left_out: Sequence[LeftOut]


_settings: Settings | None = None
_vocabulary: Vocabulary | None = None


def start(settings: Settings) -> None:
    """Makes a process ready to encode, which ends when its parent does, however that ends."""
    global _settings, _vocabulary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    # One thread each: the processes are as many as the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if (parent := parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _settings, _vocabulary = settings, read_vocabulary(settings.tokenizer)


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def encode_here(piece: Piece, alone: bool) -> Encoded:
    """Encodes a piece, in a process that `start` made ready; see `encode`."""
    assert _settings is not None and _vocabulary is not None
    return encode(piece, alone, _settings, _vocabulary)


def encode(piece: Piece, alone: bool, settings: Settings, vocabulary: Vocabulary) -> Encoded:
    """Encodes a piece.

    Args:
        piece: The texts.
        alone: Whether it is the whole corpus: then exactly the share to hold out is held out, as
            where a training reads the texts itself.
        settings: How.
        vocabulary: The settings' tokenizer.

    Raises:
        ValueError: A line does not hold what it should, or the tokenizer fails.
    """
    documents: list[Document] = []
    left_out: list[LeftOut] = []
    for block in piece.blocks:
        found, empty = part_empty(_documents(block, settings.field))
        documents += found
        left_out += empty
    if not documents:
        train, validation = [], []
    elif alone:
        train, validation = split_documents(documents, settings.held_out)
    else:
        sides: tuple[list[Document], list[Document]] = ([], [])
        for document in documents:
            sides[is_held_out(document, settings.held_out)].append(document)
        train, validation = sides
    return Encoded(
        _encode(vocabulary, train, settings.dtype),
        _encode(vocabulary, validation, settings.dtype),
        len(documents),
        len(validation),
        sum(len(document.text.encode()) for document in documents),
        left_out,
    )


def _documents(block: Block, field: str) -> Iterator[tuple[str, Document]]:
    source = block.source
    if block.rows is not None:
        for number, row in enumerate(block.rows, block.start):
            where = f"{source.name}, row {number}"
            yield where, Document(where, row or "")
    elif block.start:
        yield from line_documents(
            block.text.decode(), source.path, source.name, field=field, start=block.start
        )
    else:
        yield source.name, Document(source.name, block.text.decode())


def _encode(vocabulary: Vocabulary, documents: Sequence[Document], dtype: str) -> np.ndarray:
    end = np.array([vocabulary.end], dtype)
    encoded: list[np.ndarray] = []
    for batch in _batches(documents):
        texts = [text for text, _ in batch]
        ids = encode_texts(vocabulary.tokenizer, texts)
        for each, (_, ends) in zip(ids, batch, strict=True):
            encoded += [each.astype(dtype), end] if ends else [each.astype(dtype)]
    return np.concatenate(encoded) if encoded else np.zeros(0, dtype)


def _batches(documents: Sequence[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Some texts at a time, each with whether its document ends there."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for stretch in _stretches(document.text):
            batch.append(stretch)
            size += len(stretch[0])
            if size >= _AT_A_TIME:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _stretches(text: str) -> Iterator[tuple[str, bool]]:
    start = 0
    while len(text) - start > _STRETCH:
        stop = start + _STRETCH
        found = _CUT.search(text, stop - _LAST, stop + 1)
        stop = found.end() if found else stop
        yield text[start:stop], False
        start = stop
    yield text[start:], True
