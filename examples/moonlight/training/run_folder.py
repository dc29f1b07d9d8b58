"""A run's folder: what was asked for, and whether a new call asks for the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.moonlight.files import write_atomically

SETTINGS = "settings.json"


def open_run_folder(
    folder: Path, settings: Mapping[str, Any], *, resume: bool, must_exist: bool = False
) -> None:
    """Creates a run's folder, or enters one that was created with the same settings.

    Args:
        folder: Where the run keeps everything.
        settings: Whatever changes the run's numbers, as JSON can hold it.
        resume: Continue what is there. Nothing there, or only an empty folder, is a fresh start.
        must_exist: It is not: there has to be a run.

    Raises:
        FileExistsError: The folder is not empty and `resume` is False, or what it holds is no run.
        FileNotFoundError: There is no run, and `must_exist` is True.
        ValueError: The run there was started with other settings.
    """
    path = folder / SETTINGS
    if must_exist and not path.exists():
        raise FileNotFoundError(f"--resume-step: no run was started in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    # A hidden file is what a kill in the middle of an atomic write leaves behind.
    occupied = any(not entry.name.startswith(".") for entry in folder.iterdir())
    if occupied and not resume:
        raise FileExistsError(
            f"{folder} is not empty: continue that run with --resume, or choose another "
            "--output-dir"
        )
    if occupied and not path.exists():
        raise FileExistsError(
            f"--resume: {folder} holds files but no {SETTINGS}, so no run was started there; "
            "choose another --output-dir"
        )
    asked = json.loads(json.dumps(dict(settings)))
    if occupied:
        _check_same(folder, json.loads(path.read_text()), asked)
    else:
        write_atomically(path, (json.dumps(asked, indent=2) + "\n").encode())


def _check_same(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = [
        f"{name} was {there.get(name)!r} and is now {asked.get(name)!r}"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    ]
    if changed:
        raise ValueError(
            f"--resume: the run in {folder} was started with other settings: {'; '.join(changed)}. "
            "Ask for the same, or choose another --output-dir"
        )
