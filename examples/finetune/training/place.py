"""Where a run works, and from which of its checkpoints it goes on."""

import re
import time
from pathlib import Path
from typing import NamedTuple

from examples.finetune.args import Args
from examples.moonlight.run_folder.flags import Flags
from examples.moonlight.run_folder.folder import SETTINGS
from examples.moonlight.run_folder.storage import kept_steps

# ms-swift's names: output/checkpoint-20.
PREFIX = "checkpoint-"
ARGS = "args.json"
FLAGS = Flags(resume="--resume_from_checkpoint", output="--output_dir", step="", branch="")


class Place(NamedTuple):
    """Where a run works.

    Attributes:
        folder: Its output folder.
        resume: Whether to go on with what is there.
        step: The checkpoint to go on from; None is the newest.
    """

    folder: Path
    resume: bool
    step: int | None


def find_place(args: Args) -> Place:
    """Reads `--output_dir`, `--add_version` and `--resume_from_checkpoint`.

    Raises:
        FileNotFoundError: The checkpoint to go on from is not there.
        ValueError: It is in another folder than the one that is asked for.
    """
    asked = args.resume_from_checkpoint
    if asked is None:
        folder = args.output_dir
        if args.add_version:
            folder = folder / f"v{_next_version(folder)}-{time.strftime('%Y%m%d-%H%M%S')}"
        return Place(folder, resume=False, step=None)
    step = step_of(asked)
    folder = asked if step is None else asked.parent
    inside = folder.absolute() == args.output_dir.absolute() or (
        folder.absolute().parent == args.output_dir.absolute()
    )
    if args.output_dir != Args.output_dir and not inside:
        raise ValueError(
            f"{FLAGS.resume} {asked}: that run works in {folder}, and --output_dir is "
            f"{args.output_dir}: leave --output_dir out, or give {folder}"
        )
    if step is None and not folder.is_dir():
        raise FileNotFoundError(
            f"{FLAGS.resume} {asked}: there is no such folder; leave it out to begin a run"
        )
    if step is not None and not asked.is_dir():
        kept = ", ".join(map(str, kept_steps(folder, PREFIX))) or "none"
        raise FileNotFoundError(
            f"{FLAGS.resume} {asked}: there is no such checkpoint; {folder} keeps those of the "
            f"steps {kept}"
        )
    if step is not None and not (folder / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{FLAGS.resume} {asked}: {folder} holds no {SETTINGS}, so the run that made the "
            "checkpoint was elsewhere: give the checkpoint in its own output folder"
        )
    return Place(folder, resume=True, step=step)


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, from its name; None of any other folder."""
    found = re.fullmatch(rf"{PREFIX}([0-9]+)", folder.name)
    return int(found[1]) if found else None


def _next_version(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(r"v([0-9]+)-", name))]
    return max(numbers, default=-1) + 1
