"""A folder's seal: the size and the SHA-256 of every file in it, and of the seal itself.

What is sealed can be checked before anything of it is read: a flipped byte, a file that is cut or
missing, JSON that is none are all found here, by one comparison, whoever wrote the files. A seal is
the last file written into a folder, so a folder without one was never finished, or was damaged.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "seal.json"


class Damaged(ValueError):
    """A sealed folder does not hold what it was sealed with; the message says what is wrong."""


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Seals a folder whose files are complete; they and the seal are on disk when this returns.

    Args:
        folder: Its files, in folders of any depth, are read once.
        facts: What the seal says besides, as JSON can hold it.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _digest(path)]
        sync(path)
    content: dict[str, Any] = {**facts, "files": files}
    content["seal"] = _own_digest(content)
    path = folder / SEAL
    path.write_text(json.dumps(content, indent=1) + "\n")
    sync(path)
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(directory)


def read_seal(folder: Path) -> dict[str, Any]:
    """What a folder's seal says, which is checked itself; the files are not.

    Raises:
        Damaged: There is no seal, or it is not as it was written.
    """
    try:
        content = json.loads((folder / SEAL).read_bytes())
        whole = content.pop("seal") == _own_digest(content) and isinstance(content["files"], dict)
    except FileNotFoundError as error:
        present = folder.is_dir() and any(folder.iterdir())
        raise Damaged(f"its {SEAL} is missing" if present else "it is empty") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"its {SEAL} cannot be read ({type(error).__name__})") from error
    if not whole:
        raise Damaged(f"its {SEAL} is not as it was written")
    return content


def check(folder: Path, *, only: str = "") -> dict[str, Any]:
    """Compares a folder's files with its seal, and returns what the seal says.

    Args:
        folder: A sealed folder; its files are read once.
        only: A folder in it: the files elsewhere are not read.

    Raises:
        Damaged: A file is missing, has another length, or other bytes.
    """
    content = read_seal(folder)
    for name, (size, digest) in content["files"].items():
        if only and not name.startswith(f"{only}/"):
            continue
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise Damaged(f"{name} has {found:,} bytes, and had {size:,} when it was saved")
            if _digest(path) != digest:
                raise Damaged(f"{name} does not hold the bytes that were saved")
        except OSError as error:
            wrong = "is missing" if isinstance(error, FileNotFoundError) else f"fails: {error}"
            raise Damaged(f"{name} {wrong}") from error
    return content


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
