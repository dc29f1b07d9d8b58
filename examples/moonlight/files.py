"""Files that are either whole or not there."""

import uuid
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a run killed half-way, never meets a part of it.

    The temporary name is hidden and unique: two processes may write the same file at the same time,
    and the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
