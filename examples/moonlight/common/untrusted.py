"""Files that come from elsewhere: read in bounded time and memory, or refused by name.

A model's folder or a corpus may be damaged, or written to do harm. So nothing here waits for a pipe
or a device, reads more than a file of its kind ever holds, or follows a link out of the folder that
was given; and what a message repeats of a file is short and printable.
"""

import os
import reprlib
import stat
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20

_BOM = b"\xef\xbb\xbf"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as a message shows it: at most some lines, and every character printable."""
    return _SHORT.repr(value)


def shown_name(name: object) -> str:
    """A name as it is if it can be printed, else as Python writes it."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 300 else shown(text)


def lone_surrogate(text: str) -> int | None:
    """Where a text has half of a pair of UTF-16, which is no character and cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def is_there(path: Path) -> bool:
    """Whether something has that name; a link to nothing has: it is a mistake, not an absence."""
    return os.path.lexists(path)


def check_inside(path: Path, folder: Path) -> None:
    """Refuses a link that leads out of a folder: its content would be read, copied or exported.

    Hugging Face's cache is one exception: its `snapshots/REVISION` hold links into `blobs`.

    Raises:
        ValueError: The path is such a link, or a link to itself.
    """
    if not path.is_symlink():
        return
    try:
        target, home = path.resolve(), folder.resolve()
    except (RuntimeError, OSError) as error:  # what Python makes of a loop differs by its version
        raise ValueError(f"{shown_name(path)} is a link to itself: remove it") from error
    homes = [home] + [up.parent / "blobs" for up in home.parents if up.name == "snapshots"]
    if not any(target.is_relative_to(inside) for inside in homes):
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        remedy = "remove it"
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            what = "folder" if stat.S_ISDIR(mode) else "file"
            remedy = f"copy the {what} into the folder, or give the folder in which it lies"
        raise ValueError(
            f"{shown_name(path)} is a link to {shown_name(target)}, out of the folder: {remedy}"
        )


def check_file(path: Path, *, limit: int | None = None) -> int:
    """Checks, without opening it, that something can be read to its end, and returns its size.

    Args:
        path: What is to be read.
        limit: The most bytes that a file of its kind has; None is any number.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is no regular file, or a larger one.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        name = shown_name(path)
        if path.is_symlink():
            raise FileNotFoundError(
                f"{name} is a link to a file that is not there: bring the file, or remove the link"
            ) from error
        raise FileNotFoundError(f"{name} is not there") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(
            f"{shown_name(path)} is {kind}, where a file is expected: give a file, or leave it out"
        )
    if limit is not None and status.st_size > limit:
        raise ValueError(
            f"{shown_name(path)} has {status.st_size:,} bytes, and such a file at most {limit:,}: "
            "it is damaged or another one; fetch it again"
        )
    return status.st_size


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Reads a regular file whole.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is no regular file, or larger than `limit`.
    """
    size = check_file(path, limit=limit)
    with path.open("rb") as file:
        # One byte more: files of the system call themselves empty and never end.
        content = file.read(size + 1)
    if len(content) > size:
        raise ValueError(f"{shown_name(path)} changes while it is read: copy it, and read the copy")
    return content


def read_text(path: Path, *, limit: int | None = None) -> str:
    """Reads UTF-8 text; a byte order mark before it is no part of it.

    Args:
        path: The file.
        limit: The most bytes; None is any number. A file that is all holes is refused at its first
            block in any case, since no text has zero bytes.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is no regular file, larger than `limit`, or no such text.
    """
    size = check_file(path, limit=limit)
    blocks, read = [], 0
    with path.open("rb") as file:
        while block := file.read(min(16 * MEBIBYTE, size + 1 - read)):
            if (zero := block.find(0)) >= 0:
                raise ValueError(
                    f"{shown_name(path)} is not UTF-8 text (byte {read + zero} is zero); convert "
                    "it or leave it out"
                )
            blocks.append(block)
            read += len(block)
    if read > size:
        raise ValueError(f"{shown_name(path)} changes while it is read: copy it, and read the copy")
    return decode(b"".join(blocks), path)


def decode(content: bytes, path: Path) -> str:
    """The text of a file's content, without a byte order mark.

    Raises:
        ValueError: It is not UTF-8; the message says from which byte on.
    """
    start = len(_BOM) if content.startswith(_BOM) else 0
    try:
        return content[start:].decode() if start else content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown_name(path)} is not UTF-8 text (byte {error.start + start}); convert it or "
            "leave it out"
        ) from error
