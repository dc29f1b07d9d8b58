"""Where the text comes from: documents, their hash, and which of them are held out.

The default corpus is one that every machine already has: the source files of Python's own standard
library, about 11 MB. Left out are tests, the build's own configuration files, which differ from
machine to machine, and `pydoc_data`: one generated dump of the language reference, larger than the
rest of the held-out set that it would fall into.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from examples.moonlight.common.json_text import read_jsonl
from examples.moonlight.common.untrusted import (
    check_file,
    check_inside,
    lone_surrogate,
    read_text,
    shown_name,
)

# One document in twenty is held out, as in most pre-training reports: enough for a steady estimate.
VALIDATION_FRACTION = 0.05

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class Document(NamedTuple):
    """One text and the name that decides whether it is held out."""

    name: str
    text: str


def load_documents(path: Path | None) -> list[Document]:
    """Reads the corpus, in an order that does not depend on the file system.

    Args:
        path: a UTF-8 text file (one document), a ``.jsonl`` file with one ``{"text": ...}`` a line
            (one document a line), a folder of UTF-8 text files (one document a file; hidden files
            are left out, and so are links to folders inside, whose files are read where they lie),
            or None for the Python standard library's own source files. A byte order mark is left
            out.

    Returns:
        The documents, never an empty list.

    Raises:
        FileNotFoundError: nothing is at ``path``, or this Python has no standard library sources.
        ValueError: a line or a file does not hold what it should, is no regular file, a link out
            of the folder, or has a name that is not UTF-8, or all files together are more than the
            memory holds; the message says which.
    """
    if path is None:
        documents = _standard_library()
    elif path.is_dir():
        documents = _read_files(path, _files(path))
    elif path.exists():
        _check_memory(path, check_file(path))
        if path.suffix == ".jsonl":
            documents = _read_jsonl(path)
        else:
            documents = [Document(shown_name(path.name), read_text(path))]
    else:
        raise FileNotFoundError(
            f"--data {path}: no such file or folder; give a text file, a .jsonl file or a folder"
        )
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"--data {path}: no text in it")
    return documents


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Holds out the documents whose names hash lowest; a lone document gives up its tail.

    A document's side depends on the names only, so it is the same on every machine and in every
    run. Documents of one name fall on the same side: a jsonl line is named by its content, so a
    repeated line can't be trained on and validated on.

    Returns:
        (training, validation), disjoint and together all documents.

    Raises:
        ValueError: the documents leave one side empty.
    """
    if len(documents) == 1:
        return _split_tail(documents[0])
    keys = [hashlib.sha256(document.name.encode()).digest() for document in documents]
    held_out_count = max(1, round(VALIDATION_FRACTION * len(documents)))
    cutoff = sorted(keys)[held_out_count - 1]
    train = [document for document, key in zip(documents, keys, strict=True) if key > cutoff]
    validation = [document for document, key in zip(documents, keys, strict=True) if key <= cutoff]
    if not train:
        raise ValueError(
            f"all {len(documents)} documents are the same text: nothing to train on once one is "
            "held out; give more data"
        )
    return train, validation


def hash_documents(documents: Iterable[Document]) -> str:
    """The corpus' name: 16 hexadecimal digits over every document's name and text."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name.encode(), text.encode()):
            # Lengths keep ("ab", "c") and ("a", "bc") apart.
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file
        for file in root.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(file.relative_to(root).parts)
        and not file.name.startswith("_sysconfigdata")
        and not file.relative_to(root).parts[0].startswith("config-")
    )
    if not files:
        raise FileNotFoundError(
            f"no Python source files under {root}; name a text to train on with --data PATH"
        )
    return _read_files(root, files)


def _files(root: Path) -> list[Path]:
    """The files under a folder, but for hidden ones; what is neither file nor folder is refused."""
    files, folders, size = [], [root], 0
    while folders:
        with os.scandir(folders.pop()) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            path = Path(entry.path)
            if lone_surrogate(entry.name) is not None:
                raise ValueError(
                    f"{shown_name(path)}: the file's name is not UTF-8, and names decide what is "
                    "held out: rename it"
                )
            check_inside(path, root)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif not entry.is_dir():
                size += check_file(path)
                files.append(path)
    _check_memory(root, size)
    return sorted(files)


def _check_memory(path: Path, size: int) -> None:
    """Refuses more text than half of the memory, before any is read: tokens take as much again."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows does not tell in this way
        return
    if size > memory // 2:
        raise ValueError(
            f"--data {shown_name(path)}: {size:,} bytes of text, which with tokens have to fit "
            f"into this machine's memory of {memory:,}: give a part of it"
        )


def _read_files(root: Path, files: Iterable[Path]) -> list[Document]:
    return [Document(file.relative_to(root).as_posix(), read_text(file)) for file in files]


def _read_jsonl(path: Path) -> list[Document]:
    return [
        Document(hashlib.sha256(text.encode()).hexdigest(), text)
        for _, text in read_jsonl(path, "text")
    ]


def _split_tail(document: Document) -> tuple[list[Document], list[Document]]:
    lines = document.text.splitlines(keepends=True)
    if len(lines) < 2:
        raise ValueError(
            f"{document.name} is a single line: nothing to hold out; give more lines or documents"
        )
    cut = min(len(lines) - 1, round((1 - VALIDATION_FRACTION) * len(lines)))
    head, tail = "".join(lines[:cut]), "".join(lines[cut:])
    return [Document(document.name, head)], [Document(document.name, tail)]
