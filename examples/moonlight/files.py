"""Files: written whole or not at all, and read with an error that says what is wrong with them."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a JSON file, in which no key occurs twice.

    Args:
        path: The file.
        missing_ok: Whether a file that is not there counts as an empty object.

    Raises:
        FileNotFoundError: The file is not there, and has to be.
        ValueError: It holds something else; the message names file and line.
    """
    if missing_ok and not path.is_file():
        return {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path}: {repeated[0]!r} occurs twice")
        return dict(pairs)

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a run killed half-way, never meets a part of it.

    The bytes are on disk before the file has its name, also after a loss of power. The temporary
    name is hidden and unique: two processes may write the same file at the same time, and the last
    one wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
