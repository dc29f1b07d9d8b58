"""Files: written whole or not at all, and read with an error that says what is wrong with them."""

import os
import uuid
from pathlib import Path
from typing import Any

from examples.moonlight.common.json_text import MAX_JSON, check_plain, parse_json
from examples.moonlight.common.untrusted import check_inside, decode, is_there, read_bytes


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a JSON file, in which no key occurs twice.

    Args:
        path: The file.
        missing_ok: Whether a file that is not there counts as an empty object.

    Raises:
        FileNotFoundError: The file is not there, and has to be.
        ValueError: It holds something else, is no regular file, or is a link out of its folder; the
            message names file and line, or the field.
    """
    if missing_ok and not is_there(path):
        return {}
    check_inside(path, path.parent)
    content = parse_json(decode(read_bytes(path, limit=MAX_JSON), path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    check_plain(content, path)
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
