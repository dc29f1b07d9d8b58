"""A file of text as people have it: compressed or not, in UTF-8 or UTF-16, with any line ends.

What a file is, its bytes say and not its name: gzip and Zstandard are known by their first ones, an
encoding by its byte order mark, and a picture by not being text. Text without a mark is UTF-8; no
other encoding is guessed, since a wrong guess gives text that is wrong without a word.
"""

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from examples.moonlight.common.untrusted import MEBIBYTE, check_file, shown_name

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PARQUET = b"PAR1"
_UTF8, _UTF16 = ("UTF-8", "utf-8"), "UTF-16"
_MARKS = {
    b"\xef\xbb\xbf": _UTF8,
    b"\xff\xfe": (_UTF16, "utf-16-le"),
    b"\xfe\xff": (_UTF16, "utf-16-be"),
}

# By their first bytes, or, of tar, by those at 257: only what is no text is looked up here.
_TAR, _TAR_AT = b"ustar", 257
_UNPACK, _CONVERT = "unpack it first", "convert it or leave it out"
_KINDS = {
    b"\x89PNG": ("PNG", _CONVERT),
    b"\xff\xd8\xff": ("JPEG", _CONVERT),
    b"GIF8": ("GIF", _CONVERT),
    b"RIFF": ("RIFF", _CONVERT),
    b"%PDF": ("PDF", _CONVERT),
    PARQUET: ("Parquet", "make tokens of it with python -m examples.moonlight.data.prepare first"),
    b"PK\x03\x04": ("zip", _UNPACK),
    b"\xfd7zXZ": ("xz", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
}


class NotText(ValueError):
    """A file that holds something else than text.

    Args:
        path: The file.
        head: Its first bytes.
        encoding: The encoding that it would have.
        where: The first place that shows that it is no text.

    Attributes:
        kind: What it is, in one or two words.
    """

    def __init__(self, path: Path, head: bytes, encoding: str, where: str):
        found = next((what for magic, what in _KINDS.items() if head.startswith(magic)), None)
        if head[_TAR_AT:].startswith(_TAR):
            found = "tar", _UNPACK
        self.kind, remedy = found or (f"not {encoding}", _CONVERT)
        what = f"{self.kind}, not text" if found else f"not {encoding} text"
        super().__init__(f"{shown_name(path)} is {what} ({where}): {remedy}")


class TooLong(ValueError):
    """A file that holds more bytes of text than `limit`."""

    def __init__(self, path: Path, limit: int):
        self.limit = limit
        super().__init__(f"{shown_name(path)} has more than {limit:,} bytes of text")


def is_jsonl(path: Path) -> bool:
    """Whether a file's name says that it has a JSON object a line: `.jsonl`, packed or not."""
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")


def first_bytes(path: Path) -> bytes:
    """A file's first bytes, as it lies there.

    Raises:
        FileNotFoundError: There is nothing.
        PermissionError: It may not be read.
        ValueError: It is no regular file.
    """
    check_file(path)
    with _opened(path) as file:
        return file.read(len(PARQUET))


def read_text_file(path: Path, *, limit: int | None = None) -> str:
    r"""Reads a text, unpacked and without its byte order mark; line ends of `\r\n` become `\n`.

    Args:
        path: The file: UTF-8, or UTF-16 with a byte order mark; gzip, Zstandard or neither.
        limit: The most bytes, once unpacked; None is any number.

    Raises:
        FileNotFoundError: There is nothing.
        PermissionError: It may not be read.
        RuntimeError: It is packed with Zstandard, and pyarrow is not installed.
        NotText: It holds something else.
        TooLong: It holds more than `limit` bytes.
        ValueError: It is no regular file, damaged as a packed file, or changes while it is read.
    """
    return "".join(TextFile(path, limit=limit))


class TextFile:
    """The same, in blocks: iterating gives pieces of the text, which no memory need hold whole.

    Args:
        path: The file.
        limit: The most bytes, once unpacked; None is any number.
        block: Bytes of a piece, at most, once unpacked.

    Attributes:
        read: How many bytes of the file, as it lies there, are behind.
    """

    def __init__(self, path: Path, *, limit: int | None = None, block: int = 16 * MEBIBYTE):
        self._path, self._limit, self._block = path, limit, block
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        path, size = self._path, check_file(self._path)
        with _opened(path) as file:
            magic = file.read(len(_ZSTANDARD))
            file.seek(0)
            unpacked = _unpacked(file, magic, path, self._block)
            blocks = unpacked or _whole(file, path, size, self._block)
            for text in _decode(_bounded(blocks, path, size, self._limit), path):
                self.read = size if file.closed else file.tell()
                yield text


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except PermissionError as error:
        raise PermissionError(
            f"{shown_name(path)} may not be read by this user: change its permissions, or leave it "
            "out"
        ) from error


def _whole(file: BinaryIO, path: Path, size: int, most: int) -> Iterator[bytes]:
    """A file's bytes, no further than it was long: some call themselves empty and never end."""
    left = size + 1
    while left and (block := file.read(min(most, left))):
        left -= len(block)
        yield block
    if not left:
        raise ValueError(f"{shown_name(path)} changes while it is read: copy it, and read the copy")


def _unpacked(file: BinaryIO, magic: bytes, path: Path, most: int) -> Iterator[bytes] | None:
    """A packed file's content; None if it is not packed."""
    if magic.startswith(_GZIP):
        damage = (EOFError, gzip.BadGzipFile, zlib.error)
        return _blocks(gzip.GzipFile(fileobj=file), "gzip", damage, path, most)
    if magic == _ZSTANDARD:
        pyarrow = import_pyarrow(f"{shown_name(path)} is packed with Zstandard")
        # The package zstandard takes a file that was cut off for a whole one (0.25); this does not.
        unpacked = pyarrow.CompressedInputStream(file, "zstd")
        return _blocks(unpacked, "Zstandard", (OSError,), path, most)
    return None


def _blocks(
    unpacked: Any, kind: str, damage: tuple[type[Exception], ...], path: Path, most: int
) -> Iterator[bytes]:
    try:
        with unpacked:
            while block := unpacked.read(most):
                yield block
    except damage as error:
        raise ValueError(
            f"{shown_name(path)} is a damaged {kind} file ({error}): fetch it again"
        ) from error


def import_pyarrow(what: str) -> Any:
    """The package pyarrow, which not all need.

    Args:
        what: What it is needed for, in a clause.

    Raises:
        RuntimeError: It is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{what}, which the package pyarrow reads: pip install pyarrow, or "
            'pip install -e ".[examples,data]"'
        ) from error
    return pyarrow


def _bounded(blocks: Iterator[bytes], path: Path, size: int, limit: int | None) -> Iterator[bytes]:
    """The blocks, of which there may be too many: once the first was found to be text."""
    read = 0
    for block in blocks:
        yield block
        read += len(block)
        if limit is not None and max(read, size) > limit:
            raise TooLong(path, limit)


def _decode(blocks: Iterator[bytes], path: Path) -> Iterator[str]:
    first = b""
    while len(first) < len(PARQUET) and (block := next(blocks, b"")):
        first += block  # packed files may begin with less than a mark
    marks = (item for item in _MARKS.items() if first.startswith(item[0]))
    mark, (encoding, codec) = next(marks, (b"", _UTF8))
    head, read, characters = first[: _TAR_AT + len(_TAR)], len(mark), 0
    decoder = codecs.getincrementaldecoder(codec)()
    held = ""
    for block in itertools.chain([first[len(mark) :]], blocks, [None]):
        # No text has zero bytes: a file that is all holes is known by its first block.
        if encoding != _UTF16 and block and (zero := block.find(0)) >= 0:
            raise NotText(path, head, encoding, f"byte {read + zero} is zero")
        kept = len(decoder.getstate()[0])
        try:
            text = held + decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            raise NotText(path, head, encoding, f"byte {read - kept + error.start}") from error
        if (zero := text.find("\0", len(held))) >= 0:
            raise NotText(path, head, encoding, f"character {characters + zero} is zero")
        read += len(block or b"")
        # The other half of a line end may stand in the next block.
        held = "\r" if block is not None and text.endswith("\r") else ""
        text = text.removesuffix(held)
        characters += len(text)
        yield text.replace("\r\n", "\n")
