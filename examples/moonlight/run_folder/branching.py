"""A run that goes back to an earlier checkpoint, and a run that begins at another one's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from examples.moonlight.common.files import read_json
from examples.moonlight.common.processes.agreement import of_first
from examples.moonlight.data.batches import Span, windows_read
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.folder import RESULTS, SETTINGS, checkpoints_of
from examples.moonlight.run_folder.reading import check_checkpoint, copy_checkpoint, read_progress
from examples.moonlight.run_folder.storage import Folder, kept_steps

# What the weights, the optimizer's state and the place in the data mean something under.
_SHARED_SETTINGS = (
    "config",
    "corpus",
    "optimizer",
    "batch_size",
    "sequence_length",
    "data_seed",
)


class Branch(NamedTuple):
    """Where a run begins: another run's folder, and a step of it."""

    folder: Path
    step: int


def go_back(folder: Path, checkpoints: Checkpoints, step: int, console: Console) -> None:
    """Deletes what a run has done after a step, and says what.

    Its metrics are cut off when they are next opened.

    Raises:
        ValueError: The step's checkpoint is not kept; the message lists those that are.
        Damaged: It is not what was saved. Nothing was deleted.
    """
    kept = checkpoints.all_steps()
    if step not in kept:
        raise ValueError(
            f"--resume-step {step}: {folder} keeps no checkpoint of that step; it keeps "
            f"{', '.join(map(str, kept)) or 'none'}"
        )
    check_checkpoint(checkpoints.directory, step)
    later = [str(other) for other in kept if other > step]
    if later or (folder / RESULTS).exists():
        console.print(
            f"going back to step {step}: deleting the checkpoints "
            f"{', '.join(later) or '(none)'}, all metrics after step {step}, and the results"
        )
    of_first(lambda: (folder / RESULTS).unlink(missing_ok=True))
    checkpoints.delete_after(step)


def find_branch(
    text: str | None, checkpoints: Folder, settings: Mapping[str, Any], spans: Sequence[Span]
) -> Branch | None:
    """Where a new run is to begin; None if that is not asked for, or done already.

    Args:
        text: RUN@STEP, or None.
        checkpoints: Where the new run's checkpoints will be.
        settings: The new run's settings.
        spans: Its mixes of the data.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: The text cannot be read; there is no such checkpoint, or it does not fit.
    """
    if text is None or of_first(lambda: bool(kept_steps(checkpoints))):
        return None
    branch = Branch(*parse_branch(text))
    if not (branch.folder / SETTINGS).is_file():
        raise FileNotFoundError(f"--branch-from {text}: {branch.folder} holds no run")
    kept = of_first(lambda: kept_steps(checkpoints_of(branch.folder)))
    if branch.step not in kept:
        raise ValueError(
            f"--branch-from {text}: that run keeps no checkpoint of step {branch.step}; it keeps "
            f"{', '.join(map(str, kept)) or 'none'}"
        )
    if branch.step >= settings["steps"]:
        raise ValueError(
            f"--branch-from {text}: this run ends after {settings['steps']} steps; nothing would "
            "be left to train"
        )
    there = read_json(branch.folder / SETTINGS)
    here = json.loads(json.dumps(dict(settings)))
    changed = [
        f"{name} was {there.get(name)!r} and is now {here.get(name)!r}"
        for name in _SHARED_SETTINGS
        if there.get(name) != here.get(name)
    ]
    if changed:
        raise ValueError(
            f"--branch-from {text}: a branch keeps model, optimizer, data and batches: "
            f"{'; '.join(changed)}"
        )
    read = read_progress(checkpoints_of(branch.folder), branch.step)["read"]
    ours = windows_read(spans, sum(read.values()))
    if ours != read:
        raise ValueError(
            f"--branch-from {text}: that run has read {read} windows of its sources, and by this "
            f"run's --mix it would have been {ours}: only later stages can be mixed otherwise"
        )
    return branch


def parse_branch(text: str) -> tuple[Path, int]:
    """The folder and the step of RUN@STEP.

    Raises:
        ValueError: It is not of that form.
    """
    folder, at, step = text.rpartition("@")
    if not at or not folder or not step.isdecimal():
        raise ValueError(f"--branch-from {text}: write RUN@STEP, such as runs/moonlight@1000")
    return Path(folder), int(step)


def copy_branch(branch: Branch, folder: Path, checkpoints: Folder, console: Console) -> None:
    """Copies a run's metrics and checkpoint of a step; the checkpoint last, whole or not at all."""

    def copy_records() -> None:
        records = metrics.records_until(branch.folder / metrics.FILE, branch.step, console)
        metrics.write_records(folder / metrics.FILE, records)

    of_first(copy_records)
    copy_checkpoint(checkpoints_of(branch.folder), branch.step, checkpoints)
