"""A run's folder: what was asked for, whether a new call asks for the same, and who works in it."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.run_folder.flags import PRETRAINING, Flags
from examples.moonlight.run_folder.lock import RunLock

SETTINGS = "settings.json"
RESULTS = "results.json"

# Settings younger than the first runs, with what those had: such a run can still be resumed.
_LATER = {"muon_heads": "joint"}


@contextlib.contextmanager
def open_run_folder(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    must_exist: bool = False,
    flags: Flags = PRETRAINING,
) -> Iterator[RunLock]:
    """Creates a run's folder, or enters one that was created with the same settings, and locks it.

    Args:
        folder: Where the run keeps everything.
        settings: Whatever changes the run's numbers, as JSON can hold it.
        resume: Continue what is there. Nothing there, or only an empty folder, is a fresh start.
        must_exist: It is not: there has to be a run.
        flags: What the program calls its flags.

    Yields:
        The lock, held until the context ends: to be checked before anything is saved.

    Raises:
        FileExistsError: The folder is not empty and `resume` is False, or what it holds is no run.
        FileNotFoundError: There is no run, and `must_exist` is True.
        FolderInUse: Another process works in it.
        ValueError: The run there was started with other settings, or they cannot be read.
    """
    asked = json.loads(json.dumps(dict(settings)))
    _check(folder, asked, flags, resume=resume, must_exist=must_exist)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{flags.output} {folder}: the folder cannot be made ({error.strerror}); choose another"
        ) from error
    with RunLock(folder, flags) as lock:
        # Again: another process may have begun, and ended, in between.
        occupied = _check(folder, asked, flags, resume=resume, must_exist=must_exist)
        if not occupied:
            text = json.dumps(asked, indent=2)
            write_atomically(folder / SETTINGS, f"{text}\n".encode())
        yield lock


def check_run_folder(
    folder: Path, *, resume: bool, must_exist: bool = False, flags: Flags = PRETRAINING
) -> bool:
    """Refuses a folder that no run can have, as `open_run_folder` does, by its files' names alone.

    Returns:
        Whether there is a run in it.

    Raises:
        FileExistsError: The folder is not empty and `resume` is False, or what it holds is no run.
        FileNotFoundError: There is no run, and `must_exist` is True.
    """
    path = folder / SETTINGS
    if must_exist and not path.exists():
        raise FileNotFoundError(f"{flags.step or flags.resume}: no run was started in {folder}")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{flags.output} {folder} is a file: choose a folder")
    # A hidden file is what a kill in the middle of an atomic write leaves behind.
    entries = folder.iterdir() if folder.exists() else ()
    occupied = any(not entry.name.startswith(".") for entry in entries)
    if occupied and not resume:
        raise FileExistsError(
            f"{folder} is not empty: continue that run with {flags.resume}, or choose another "
            f"{flags.output}"
        )
    if occupied and not path.exists():
        raise FileExistsError(
            f"{flags.resume}: {folder} holds files but no {SETTINGS}, so no run was started "
            f"there; choose another {flags.output}"
        )
    return occupied


def _check(
    folder: Path, asked: dict[str, Any], flags: Flags, *, resume: bool, must_exist: bool
) -> bool:
    """Whether there is a run in the folder, which then is the one that is asked for."""
    occupied = check_run_folder(folder, resume=resume, must_exist=must_exist, flags=flags)
    if occupied:
        _check_same(folder, read_json(folder / SETTINGS), asked, flags)
    return occupied


def _check_same(folder: Path, there: dict[str, Any], asked: dict[str, Any], flags: Flags) -> None:
    there = {name: _LATER[name] for name in _LATER.keys() & asked.keys()} | there
    changed = [
        f"{name} was {there.get(name)!r} and is now {asked.get(name)!r}"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    ]
    if changed:
        branch = ""
        if flags.branch:
            branch = (
                f"; begin there in a new folder, with {flags.branch}, where the model, the data "
                "and the batches stay"
            )
        raise ValueError(
            f"{flags.resume}: the run in {folder} was started with other settings: "
            f"{'; '.join(changed)}. Ask for the same{branch}; or choose another {flags.output}"
        )
