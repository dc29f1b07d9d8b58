"""Where the text comes from: documents, their hash, and which of them are held out.

The default corpus is one that every machine already has: the source files of Python's own standard
library, about 10 MB. Left out are tests, the build's own configuration files, which differ from
machine to machine, `pydoc_data`, one generated dump of the language reference, larger than the rest
of the held-out set that it would fall into, and tables: the package `encodings`, and each file of
which more than half is literals (`is_table`). The tables of encodings, nearly equal to each other,
are an eighth of the library, and what a model would learn before anything else.
"""

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.moonlight.common.json_text import parse_jsonl
from examples.moonlight.common.untrusted import check_file, check_inside, lone_surrogate, shown_name
from examples.moonlight.data.text_files import NotText, TooLong, is_jsonl, read_text_file

# One document in twenty is held out, as in most pre-training reports: enough for a steady estimate.
VALIDATION_FRACTION = 0.05

# A lone text gives up its last lines, where there are enough for some to be about that share.
_FEW_LINES = 20

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_TABLES = "encodings/"

# A line of code that has nothing but literals, and what stands between them; perhaps a comment.
_STRING = r"""[rbuRBU]{0,2}(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
_NUMBER = r"\d\w*+(?:\.\w*+)?|None|True|False"
_LITERALS = re.compile(rf"(?:{_STRING}|{_NUMBER}|[-+*,:()\[\]{{}}\s])++(?:#.*)?")

# Of each kind of file that is left out, so many are named.
_NAMED = 3


class Document(NamedTuple):
    """One text and the name that decides whether it is held out."""

    name: str
    text: str


class LeftOut(NamedTuple):
    """A file, or a line of one, that is no document: its name and what it is."""

    name: str
    kind: str


class Tally:
    """How much is left out, of each kind, and the names of the first.

    Args:
        counts: What `counts` was, to go on from there.

    Attributes:
        counts: How many there are of each kind, and the names of some, as JSON can hold them.
    """

    def __init__(self, counts: Mapping[str, Sequence[Any]] | None = None):
        self.counts = {kind: [count, [*names]] for kind, (count, names) in (counts or {}).items()}

    def add(self, left_out: Iterable[LeftOut]) -> None:
        """Counts some more."""
        for name, kind in left_out:
            counted = self.counts.setdefault(kind, [0, []])
            counted[0] += 1
            if len(counted[1]) < _NAMED:
                counted[1].append(shown_name(name))

    def __str__(self) -> str:
        return ", ".join(
            f"{count:,} {kind} ({'; '.join(names)}{'; ...' * (count > len(names))})"
            for kind, (count, names) in sorted(self.counts.items())
        )


def load_documents(path: Path | None, *, tell: Callable[[str], object] = print) -> list[Document]:
    """Reads the corpus, in an order that does not depend on the file system.

    Args:
        path: A text file (one document), a ``.jsonl`` file with one ``{"text": ...}`` a line (one
            document a line), a folder of such files, or None for the standard library's own source
            files. `text_files` says which encodings are read, and gzip is. Of a folder, hidden
            files are left out, and so are links to folders inside, whose files are read where they
            lie; a ``.jsonl`` file whose first line is no such object is one document there.
        tell: Is given a sentence on what a folder has besides texts, if it has: pictures, files in
            other encodings, empty ones.

    Returns:
        The documents, never an empty list.

    Raises:
        FileNotFoundError: Nothing is at ``path``, or this Python has no standard library sources.
        PermissionError: A file or a folder may not be read.
        ValueError: A line or a lone file does not hold what it should, a file is no regular one, a
            link out of the folder, damaged, or has a name that is not UTF-8, or all texts together
            are more than the memory holds; the message says which.
    """
    if path is None:
        return standard_library()
    if not path.exists():
        raise FileNotFoundError(
            f"--data {shown_name(path)}: no such file or folder; give a text file, a .jsonl file "
            "or a folder"
        )
    documents, left_out = _read_files(path, list_files(path) if path.is_dir() else [path])
    tally = Tally()
    tally.add(left_out)
    words = str(tally)
    if not documents:
        found = f", only {words}" if path.is_dir() and words else ""
        raise ValueError(f"--data {shown_name(path)}: no text in it{found}; give a file with text")
    if words:
        tell(f"--data {shown_name(path)}: left out what is no text: {words}")
    return documents


def standard_library(*, tables: bool = False) -> list[Document]:
    """The source files of this Python's standard library.

    Args:
        tables: Whether the tables are among them.

    Raises:
        FileNotFoundError: There are none.
    """
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
    documents, _ = _read_files(root, files)
    if tables:
        return documents
    return [
        document
        for document in documents
        if not document.name.startswith(_TABLES) and not is_table(document.text)
    ]


def is_table(source: str) -> bool:
    """Whether more than half of a program's code is in lines that have nothing but literals.

    Comments and blank lines are no code, and what stands in triple quotes is no literal here.
    """
    lines = [line.strip() for line in source.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    literals = sum(len(line) for line in lines if _LITERALS.fullmatch(line))
    return 2 * literals > sum(map(len, lines))


def split_documents(
    documents: list[Document], fraction: float = VALIDATION_FRACTION
) -> tuple[list[Document], list[Document]]:
    """Holds out the documents whose names hash lowest; a lone document gives up its tail.

    A document's side depends on the names only, so it is the same on every machine and in every
    run. Documents of one name fall on the same side: a jsonl line is named by its content, so a
    repeated line can't be trained on and validated on.

    Args:
        documents: At least one.
        fraction: The share of documents, or of a lone one's lines, to hold out.

    Returns:
        (training, validation), disjoint and together all documents.

    Raises:
        ValueError: the documents leave one side empty.
    """
    if len(documents) == 1:
        return _split_tail(documents[0], fraction)
    keys = [_key(document.name) for document in documents]
    held_out_count = max(1, round(fraction * len(documents)))
    cutoff = sorted(keys)[held_out_count - 1]
    train = [document for document, key in zip(documents, keys, strict=True) if key > cutoff]
    validation = [document for document, key in zip(documents, keys, strict=True) if key <= cutoff]
    if not train:
        raise ValueError(
            f"all {len(documents)} documents are the same text: nothing to train on once one is "
            "held out; give more data"
        )
    return train, validation


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is held out where all together are too many to be counted first.

    Its text alone decides: of texts that repeat, in one source or in several, none is trained on
    and held out.

    Args:
        document: The document.
        fraction: The share of documents to hold out.
    """
    return int.from_bytes(_key(_digest(document.text))[:8]) < fraction * 2**64


def has_few_lines(text: str) -> bool:
    """Whether a lone text is divided between two words, and not between two lines."""
    return len(text.splitlines()) < _FEW_LINES


def hash_documents(documents: Iterable[Document]) -> str:
    """The corpus' name: 16 hexadecimal digits over every document's name and text."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name.encode(), text.encode()):
            # Lengths keep ("ab", "c") and ("a", "bc") apart.
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def list_files(root: Path) -> list[Path]:
    """The files under a folder, but for hidden ones; what is neither file nor folder is refused."""
    files, folders = [], [root]
    while folders:
        for entry in _entries(folders.pop()):
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
                check_file(path)
                files.append(path)
    return sorted(files)


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except PermissionError as error:
        raise PermissionError(
            f"{shown_name(folder)} may not be read by this user: change its permissions, or leave "
            "it out"
        ) from error


def _read_files(path: Path, files: Sequence[Path]) -> tuple[list[Document], list[LeftOut]]:
    """The documents of a folder's files, or of a lone file, which has to be a text."""
    left = _most_text(path, files)
    documents, left_out = [], []
    for file in files:
        lone = file == path
        name = shown_name(path.name) if lone else file.relative_to(path).as_posix()
        try:
            text = read_text_file(file, limit=left)
        except NotText as error:
            if lone:
                raise
            left_out.append(LeftOut(name, error.kind))
            continue
        except TooLong as error:
            raise _too_large(path, f"more than {error.limit:,}") from error
        if left is not None:
            left -= len(text)
        if is_jsonl(file) and (lone or begins_with_a_text(text)):
            found = line_documents(text, file, name)
        else:
            found = [(name, Document(name, text))]
        parted = part_empty(found)
        documents += parted[0]
        left_out += parted[1]
    return documents, left_out


def line_documents(
    text: str, path: Path, name: str, *, field: str = "text", start: int = 1
) -> Iterator[tuple[str, Document]]:
    """The documents of a text that has a JSON object a line, each with where it stands.

    A document is named by its content.

    Args:
        text: The lines.
        path: Their file, for messages.
        name: What the file is called in its folder.
        field: What holds each object's text.
        start: The number of the first line.

    Raises:
        ValueError: A line does not hold such an object; the message names file and line.
    """
    for number, line in parse_jsonl(text, path, field, start=start):
        yield f"{name}, line {number}", Document(_digest(line), line)


def part_empty(found: Iterable[tuple[str, Document]]) -> tuple[list[Document], list[LeftOut]]:
    """The documents that have a text, and where those stand that have none."""
    documents, left_out = [], []
    for where, document in found:
        if document.text.strip():
            documents.append(document)
        else:
            left_out.append(LeftOut(where, "empty"))
    return documents, left_out


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def begins_with_a_text(text: str, field: str = "text") -> bool:
    """Whether the first line is an object with a text, by the looks of it."""
    try:
        first = json.loads(text.lstrip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get(field), str)


def _most_text(path: Path, files: Sequence[Path]) -> int | None:
    """Half of the memory in bytes, as tokens take as much again; more text is refused at once."""
    if (memory := _memory()) is None:
        return None
    sizes = {file: check_file(file) for file in files}
    if sum(sizes.values()) > memory // 2:
        size = sum(size for file, size in sizes.items() if _begins_as_text(file))
        if size > memory // 2:
            raise _too_large(path, f"{size:,}")
    return memory // 2


def _memory() -> int | None:
    """This machine's memory in bytes, if it says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows does not tell in this way
        return None


def _begins_as_text(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" not in opened.read(4096)


def _too_large(path: Path, size: str) -> ValueError:
    return ValueError(
        f"--data {shown_name(path)}: {size} bytes of text, which with tokens have to fit into this "
        f"machine's memory of {_memory():,}: give a part of it"
    )


def _split_tail(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    if not has_few_lines(text):
        lines = text.splitlines(keepends=True)
        cut = len("".join(lines[: round((1 - fraction) * len(lines))]))
    else:
        # Between two words, if there are any in the last tenth.
        most = round((1 - fraction) * len(text))
        least = round((1 - 2 * fraction) * len(text))
        cut = next((i for i in range(most, least, -1) if text[i - 1].isspace()), most)
    head, tail = text[:cut], text[cut:]
    if not head.strip() or not tail.strip():
        raise ValueError(
            f"{document.name} has {len(text):,} characters: too few to hold some out; give more "
            "text or documents"
        )
    return [Document(document.name, head)], [Document(document.name, tail)]
