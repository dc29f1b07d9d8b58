"""Where checkpoints lie: a folder of a file system, or a prefix of an object store (`gs://`).

Both hold a checkpoint in a folder named after its step, and differ in what makes it whole:

  a file system   it is written under a hidden name, put on disk, and renamed. A folder that has a
                  step's name is whole, or was damaged later.
  an object store  a rename there copies and deletes one object after the other, so it is written
                  under its own name, and the seal, an object that is there at once or not at all,
                  comes last. A folder without a seal was never finished, and counts as absent.

Paths of an object store are those of `etils.epath`, which Orbax uses too.
"""

import importlib.util
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import fsspec.config
from etils import epath

# The last file that is written into a checkpoint: see seal.py.
SEAL = "seal.json"

# What the names of folders begin with that a kill may leave behind, on a file system.
_HALF = (".saving-", ".deleting-", ".copying-")

_BLOCK = 1 << 23  # bytes that are read or copied at a time

# Seconds that a network file system may take to show a file that another host wrote.
_SHOWN = 30.0

Folder = Path | epath.Path


def folder_at(text: str | os.PathLike[str]) -> Folder:
    """The folder that a user's text names.

    Args:
        text: A path, or `gs://bucket/prefix`.

    Raises:
        ValueError: It is of an object store that is not supported, or names no bucket; or the
            client of Google Cloud Storage is not installed.
    """
    path = os.fspath(text)
    scheme, colon, rest = path.partition(":/")
    if not colon or not scheme.isalnum():
        return Path(path)
    if scheme != "gs":
        raise ValueError(f"{path}: expected a path or gs://bucket/prefix, got {scheme}://")
    rest = rest.strip("/")  # a Path has made one slash of two
    if not rest:
        raise ValueError(f"{path}: names no bucket: write gs://bucket/prefix")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"{path}: Google Cloud Storage needs gcsfs: pip install gcsfs")
    # gcsfs remembers what a prefix held when it was first listed, and other processes write there.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(f"gs://{rest}")


def is_remote(folder: PurePath) -> bool:
    """Whether a folder is one of an object store."""
    return "://" in os.fspath(folder)


def absolute(folder: Folder) -> Folder:
    """A folder, wherever the program goes meanwhile."""
    return folder.absolute() if isinstance(folder, Path) else folder


def is_whole(folder: Folder) -> bool:
    """Whether a checkpoint's folder was finished; damage is not looked for."""
    return (folder / SEAL).exists() if is_remote(folder) else folder.exists()


def kept_steps(directory: Folder, prefix: str = "") -> list[int]:
    """The steps that a run's folder of checkpoints keeps, in order; the folder is left as it is."""
    return sorted(step for step, folder in _named(directory, prefix) if is_whole(folder))


def unfinished(directory: Folder, prefix: str = "") -> list[Folder]:
    """What a killed process left in a folder of checkpoints, half-written or half-deleted."""
    if is_remote(directory):
        return [folder for _, folder in _named(directory, prefix) if not is_whole(folder)]
    # Beside other files (`prefix`), not all that is hidden is ours.
    return [
        path
        for path in directory.iterdir()
        if path.name.startswith(_HALF) or (path.name.startswith(".") and not prefix)
    ]


def _named(directory: Folder, prefix: str) -> Iterator[tuple[int, Folder]]:
    for path in directory.iterdir() if directory.is_dir() else ():
        step = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and step.isascii() and step.isdecimal():
            yield int(step), path


def draft(final: Folder, step: int, doing: str = "saving") -> Folder:
    """Where a checkpoint is written before it is whole."""
    return final if is_remote(final) else final.parent / f".{doing}-{step}"


def publish(written: Folder, final: Folder) -> None:
    """Gives a sealed checkpoint, with all its files on disk, its name."""
    if written != final:
        written.rename(final)
        sync(final.parent)


def delete(folder: Folder, step: int) -> None:
    """Deletes a checkpoint; killed half-way, it is gone all the same."""
    if is_remote(folder):
        (folder / SEAL).unlink()
        remove(folder)
    else:
        doomed = folder.parent / f".deleting-{step}-{uuid.uuid4().hex}"
        folder.rename(doomed)
        remove(doomed)


def remove(path: Folder) -> None:
    """Removes a file or a folder, with all that is in it."""
    if not path.is_dir():
        path.unlink()
    elif isinstance(path, epath.Path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def copy(source: Folder, target: Folder) -> None:
    """Copies a checkpoint's files, the seal last, between any two places."""
    for name in sorted(files(source), key=lambda name: name == SEAL):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as read, path.open("wb") as written:
            shutil.copyfileobj(read, written, _BLOCK)


def files(folder: Folder, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The files in a folder, by their names from there, in order.

    Args:
        folder: Searched in all its depth.
        wanted: Asked of each file and folder: what is not wanted is not looked into.
    """
    found, left = [], [(folder, "")]
    while left:
        inner, before = left.pop()
        for path in inner.iterdir():
            name = f"{before}{path.name}"
            if not wanted(name):
                continue
            if path.is_dir():
                left.append((path, f"{name}/"))
            else:
                found.append(name)
    return sorted(found)


def size(path: Folder) -> int:
    """Bytes of a file."""
    if isinstance(path, epath.Path):
        return path.stat().length
    return path.stat().st_size


def blocks(path: Folder) -> Iterator[bytes]:
    """The bytes of a file, some at a time."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def sync(path: Folder) -> None:
    """Waits until a file, or the names in a folder, are on disk; an object is when it is there."""
    if is_remote(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_shown(there: Callable[[], bool]) -> bool:
    """Whether something is there, also for a network file system that shows it late."""
    deadline = time.monotonic() + _SHOWN
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
