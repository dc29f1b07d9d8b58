"""Where the text comes from: documents, their hash, and which of them are held out.

The default corpus is one that every machine already has: the source files of Python's own standard
library, about 11 MB. Left out are tests, the build's own configuration files, which differ from
machine to machine, and `pydoc_data`: one generated dump of the language reference, larger than the
rest of the held-out set that it would fall into.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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
            are left out), or None for the Python standard library's own source files.

    Returns:
        The documents, never an empty list.

    Raises:
        FileNotFoundError: nothing is at ``path``, or this Python has no standard library sources.
        ValueError: a line or a file does not hold what it should; the message says which.
    """
    if path is None:
        documents = _standard_library()
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        documents = _read_files(path, (f for f in files if not _is_hidden(f.relative_to(path))))
    elif path.suffix == ".jsonl":
        documents = _read_jsonl(path)
    elif path.is_file():
        documents = [Document(path.name, _read_text(path))]
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


def _read_files(root: Path, files: Iterable[Path]) -> list[Document]:
    return [Document(file.relative_to(root).as_posix(), _read_text(file)) for file in files]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out"
        ) from error


def _read_jsonl(path: Path) -> list[Document]:
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(
                f'{path}, line {number}: expected an object {{"text": "..."}}, got {line[:80]!r}'
            )
        name = hashlib.sha256(record["text"].encode()).hexdigest()
        documents.append(Document(name, record["text"]))
    return documents


def _split_tail(document: Document) -> tuple[list[Document], list[Document]]:
    lines = document.text.splitlines(keepends=True)
    if len(lines) < 2:
        raise ValueError(
            f"{document.name} is a single line: nothing to hold out; give more lines or documents"
        )
    cut = min(len(lines) - 1, round((1 - VALIDATION_FRACTION) * len(lines)))
    head, tail = "".join(lines[:cut]), "".join(lines[cut:])
    return [Document(document.name, head)], [Document(document.name, tail)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
