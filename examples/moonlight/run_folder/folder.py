"""A run's folder: what was asked for, whether a new call asks for the same, and who works in it.

Of several processes the first looks, writes and locks; the others learn how that ended.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.common.processes.agreement import everywhere_equal, of_first
from examples.moonlight.run_folder.flags import PRETRAINING, Flags
from examples.moonlight.run_folder.lock import RunLock
from examples.moonlight.run_folder.storage import Folder, folder_at

SETTINGS = "settings.json"
RESULTS = "results.json"

# The folder of a run's checkpoints, in the run's, unless its settings name another.
CHECKPOINTS, ELSEWHERE = "checkpoints", "checkpoint_dir"

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
        The lock, held until the context ends: to be checked before anything is saved. Of several
        processes the first holds it.

    Raises:
        FileExistsError: The folder is not empty and `resume` is False, or what it holds is no run.
        FileNotFoundError: There is no run, and `must_exist` is True.
        FolderInUse: Another process works in it.
        ValueError: The run there was started with other settings, or they cannot be read; or the
            processes were started with different ones.
        ElsewhereFailed: One of these, in the first process.
    """
    asked = json.loads(json.dumps(dict(settings)))
    everywhere_equal(asked, "the settings")
    lock = RunLock(folder, flags)
    with contextlib.ExitStack() as held:

        def enter() -> None:
            _check(folder, asked, flags, resume=resume, must_exist=must_exist)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(
                    f"{flags.output} {folder}: the folder cannot be made ({error.strerror}); "
                    "choose another"
                ) from error
            held.enter_context(lock)
            # Again: another process may have begun, and ended, in between.
            if not _check(folder, asked, flags, resume=resume, must_exist=must_exist):
                text = json.dumps(asked, indent=2)
                write_atomically(folder / SETTINGS, f"{text}\n".encode())

        of_first(enter)
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
        ElsewhereFailed: One of these, in the first process.
    """
    return of_first(lambda: _is_occupied(folder, resume=resume, must_exist=must_exist, flags=flags))


def _is_occupied(folder: Path, *, resume: bool, must_exist: bool, flags: Flags) -> bool:
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


def checkpoints_of(folder: Path) -> Folder:
    """Where the checkpoints of a run lie.

    Args:
        folder: The run's, with its settings.

    Raises:
        ValueError: The settings cannot be read, or name a place that cannot be.
    """
    elsewhere = read_json(folder / SETTINGS, missing_ok=True).get(ELSEWHERE)
    if elsewhere is None:
        return folder / CHECKPOINTS
    if not isinstance(elsewhere, str):
        raise ValueError(f"{folder / SETTINGS}: {ELSEWHERE}: expected a path, got {elsewhere!r}")
    return folder_at(elsewhere)


def claim_checkpoints(
    directory: Folder, settings: Mapping[str, Any], *, resume: bool, flags: Flags = PRETRAINING
) -> None:
    """Makes sure that a folder of checkpoints outside of the run's is this run's.

    It keeps the run's settings too: a run whose folder was lost with its host goes on from it, and
    no other run does.

    Raises:
        FileExistsError: It holds a run's checkpoints, and `resume` is False.
        ValueError: That run was started with other settings.
        OSError: It cannot be read or written.
        ElsewhereFailed: One of these, in the first process.
    """
    asked, path = json.loads(json.dumps(dict(settings))), directory / SETTINGS

    def claim() -> None:
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{json.dumps(asked, indent=2)}\n".encode())
            return
        if not resume:
            raise FileExistsError(
                f"{directory} holds the checkpoints of a run: continue it with {flags.resume}, or "
                "choose another --checkpoint-dir"
            )
        try:
            there = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected the settings of a run ({error})") from error
        _check_same(directory, there, asked, flags)

    of_first(claim)


def _check(
    folder: Path, asked: dict[str, Any], flags: Flags, *, resume: bool, must_exist: bool
) -> bool:
    """Whether there is a run in the folder, which then is the one that is asked for."""
    occupied = _is_occupied(folder, resume=resume, must_exist=must_exist, flags=flags)
    if occupied:
        _check_same(folder, read_json(folder / SETTINGS), asked, flags)
    return occupied


def _check_same(folder: Folder, there: dict[str, Any], asked: dict[str, Any], flags: Flags) -> None:
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
