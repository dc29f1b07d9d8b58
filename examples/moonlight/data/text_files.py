"""A file of text as people have it: compressed or not, in UTF-8 or UTF-16, with any line ends.

What a file is, its bytes say and not its name: gzip is known by its first two, an encoding by its
byte order mark, and a picture by not being text. Text without a mark is UTF-8; no other encoding is
guessed, since a wrong guess gives text that is wrong without a word.
"""

import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from examples.moonlight.common.untrusted import MEBIBYTE, check_file, shown_name

_GZIP = b"\x1f\x8b"
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
    b"PAR1": ("Parquet", 'write its texts as a .jsonl file, {"text": ...} a line, first'),
    b"PK\x03\x04": ("zip", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("Zstandard", _UNPACK),
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
    """Whether a file's name says that it has a JSON object a line: `.jsonl` or `.jsonl.gz`."""
    return path.name.removesuffix(".gz").endswith(".jsonl")


def read_text_file(path: Path, *, limit: int | None = None) -> str:
    r"""Reads a text, unpacked and without its byte order mark; line ends of `\r\n` become `\n`.

    Args:
        path: The file: UTF-8, or UTF-16 with a byte order mark; gzip or not.
        limit: The most bytes, once unpacked; None is any number.

    Raises:
        FileNotFoundError: There is nothing.
        PermissionError: It may not be read.
        NotText: It holds something else.
        TooLong: It holds more than `limit` bytes.
        ValueError: It is no regular file, a damaged gzip file, or changes while it is read.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            blocks = _unpacked(file, path) if packed else _whole(file, path, size)
            return _decode(_bounded(blocks, path, size, limit), path)
    except PermissionError as error:
        raise PermissionError(
            f"{shown_name(path)} may not be read by this user: change its permissions, or leave it "
            "out"
        ) from error


def _whole(file: BinaryIO, path: Path, size: int) -> Iterator[bytes]:
    """A file's bytes, no further than it was long: some call themselves empty and never end."""
    left = size + 1
    while left and (block := file.read(min(16 * MEBIBYTE, left))):
        left -= len(block)
        yield block
    if not left:
        raise ValueError(f"{shown_name(path)} changes while it is read: copy it, and read the copy")


def _unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            while block := unpacked.read(16 * MEBIBYTE):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{shown_name(path)} is a damaged gzip file ({error}): fetch it again"
        ) from error


def _bounded(blocks: Iterator[bytes], path: Path, size: int, limit: int | None) -> Iterator[bytes]:
    """The blocks, of which there may be too many: once the first was found to be text."""
    read = 0
    for block in blocks:
        yield block
        read += len(block)
        if limit is not None and max(read, size) > limit:
            raise TooLong(path, limit)


def _decode(blocks: Iterator[bytes], path: Path) -> str:
    first = next(blocks, b"")
    marks = (item for item in _MARKS.items() if first.startswith(item[0]))
    mark, (encoding, codec) = next(marks, (b"", _UTF8))
    head, read, kept = first[: _TAR_AT + len(_TAR)], 0, []
    for block in itertools.chain([first], blocks):
        # No text has zero bytes: a file that is all holes is known by its first block.
        if encoding != _UTF16 and (zero := block.find(0)) >= 0:
            raise NotText(path, head, encoding, f"byte {read + zero} is zero")
        kept.append(block)
        read += len(block)
    try:
        text = b"".join(kept)[len(mark) :].decode(codec)
    except UnicodeDecodeError as error:
        raise NotText(path, head, encoding, f"byte {error.start + len(mark)}") from error
    if (zero := text.find("\0")) >= 0:
        raise NotText(path, head, encoding, f"character {zero} is zero")
    return text.replace("\r\n", "\n")
