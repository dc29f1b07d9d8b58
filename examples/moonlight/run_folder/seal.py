"""A folder's seal: the size and the SHA-256 of every file in it, and of the seal itself.

What is sealed can be checked before anything of it is read: a flipped byte, a file that is cut or
missing, JSON that is none are all found here, by one comparison, whoever wrote the files. A seal is
the last file written into a folder, so a folder without one was never finished, or was damaged.

Where several processes write into a folder, each digests the files that it wrote, and nobody reads
the whole; checking is divided among them as well.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from examples.moonlight.run_folder import storage
from examples.moonlight.run_folder.storage import SEAL, Folder, sync

# Files that are digested at a time, by a process: SHA-256 is one core's work.
_AT_A_TIME = 4

Digests = dict[str, list[Any]]  # by name in the folder: size, and hexadecimal digits


class Damaged(ValueError):
    """A sealed folder does not hold what it was sealed with; the message says what is wrong."""


def digest(folder: Folder, wanted: Callable[[str], bool] = lambda name: True) -> Digests:
    """The digests of the files in a folder, which are complete, and on disk when this returns.

    Args:
        folder: Its files, in folders of any depth, are read once.
        wanted: Asked of each file and folder; what is not wanted is not read.
    """
    names = storage.files(folder, wanted)

    def read(name: str) -> list[Any]:
        found = _digest(folder / name)
        sync(folder / name)
        return found

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def seal(folder: Folder, facts: Mapping[str, Any], digests: Digests | None = None) -> None:
    """Seals a folder whose files are complete; they and the seal are on disk when this returns.

    Args:
        folder: The folder.
        facts: What the seal says besides, as JSON can hold it.
        digests: The digests of all files; left out, the files are read here.
    """
    digests = digest(folder) if digests is None else digests
    content: dict[str, Any] = {**facts, "files": dict(sorted(digests.items()))}
    content["seal"] = _own_digest(content)
    path = folder / SEAL
    path.write_bytes((json.dumps(content, indent=1) + "\n").encode())
    sync(path)
    if not storage.is_remote(folder):
        parents = {parent for name in digests for parent in (folder / name).parents}
        for directory in sorted({folder, *(p for p in parents if folder in p.parents)}):
            sync(directory)


def read_seal(folder: Folder) -> dict[str, Any]:
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


def check(folder: Folder, *, only: str = "", share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Compares a folder's files with its seal, and returns what the seal says.

    Args:
        folder: A sealed folder; its files are read once.
        only: A folder in it: the files elsewhere are not read.
        share: Which share of the files is read, from 0 on.
        shares: Into how many they are divided, of about the same bytes each.

    Raises:
        Damaged: A file is missing, has another length, or other bytes.
    """
    content = read_seal(folder)
    sealed = {
        name: size_and_digest
        for name, size_and_digest in content["files"].items()
        if not only or name.startswith(f"{only}/")
    }
    for name in _shares(sealed, shares)[share]:
        size, digits = sealed[name]
        path = folder / name
        try:
            found = storage.size(path)
            if found != size:
                raise Damaged(f"{name} has {found:,} bytes, and had {size:,} when it was saved")
            if _digest(path)[1] != digits:
                raise Damaged(f"{name} does not hold the bytes that were saved")
        except OSError as error:
            wrong = "is missing" if isinstance(error, FileNotFoundError) else f"fails: {error}"
            raise Damaged(f"{name} {wrong}") from error
    return content


def _shares(sealed: Digests, shares: int) -> list[list[str]]:
    """The files, divided by their sizes: the largest first, each to whom has least."""
    names: list[list[str]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(sealed, key=lambda name: (-sealed[name][0], name)):
        least = loads.index(min(loads))
        names[least].append(name)
        loads[least] += sealed[name][0]
    # In the order of their names where there is one share: what is told of damage is the first.
    return [sorted(share) for share in names]


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Folder) -> list[Any]:
    size, digits = 0, hashlib.sha256()
    for block in storage.blocks(path):
        digits.update(block)
        size += len(block)
    return [size, digits.hexdigest()]
