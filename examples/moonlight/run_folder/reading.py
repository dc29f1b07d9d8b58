"""Checkpoints, or an item of one, as others than the run that wrote them read them.

Of several processes each reads a share of the files, to compare their digests, and then its own
shards. All call these functions, in the same order.
"""

from typing import Any

import orbax.checkpoint as ocp

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import gather, of_first
from examples.moonlight.run_folder import seal, storage
from examples.moonlight.run_folder.engine import MODEL, PROGRESS, restore_arrays, restore_item
from examples.moonlight.run_folder.retention import best_step
from examples.moonlight.run_folder.seal import Damaged
from examples.moonlight.run_folder.storage import Folder, kept_steps

PyTree = Any


def read_folder(folder: Folder, target: PyTree) -> PyTree:
    """Reads the `model` item of one checkpoint, wherever its folder was copied to.

    Args:
        folder: The checkpoint's.
        target: Structure, dtypes and shardings to read into.

    Raises:
        Damaged: It is not what was saved.
    """
    if (damage := agreed_damage(folder, None, MODEL)) is not None:
        raise Damaged(f"{folder}: this checkpoint is damaged: {damage}")
    return restore_item(folder, MODEL, restore_arrays(target))


def check_checkpoint(directory: Folder, step: int, *, only: str = "") -> None:
    """Compares a checkpoint with its seal.

    Args:
        directory: The checkpoints of a run.
        step: The checkpoint's step.
        only: An item: the others are not read.

    Raises:
        Damaged: It is not what was saved; the message names an older one that is, if there is one.
    """
    damage = agreed_damage(directory / str(step), step, only)
    if damage is not None:
        raise Damaged(
            f"{directory / str(step)}: this checkpoint is damaged: {damage}. "
            f"{of_first(lambda: _older_whole(directory, step, only))}"
        )


def read_progress(directory: Folder, step: int) -> dict[str, Any]:
    """Reads the `progress` item of a checkpoint that is there, and leaves the folder as it is.

    Raises:
        Damaged: It is not what was saved.
    """
    check_checkpoint(directory, step, only=PROGRESS)
    return restore_item(directory / str(step), PROGRESS, ocp.args.JsonRestore())


def copy_checkpoint(source: Folder, step: int, target: Folder) -> None:
    """Copies one checkpoint of a run into another's folder of checkpoints, whole or not at all.

    Raises:
        Damaged: It is not what was saved.
    """
    check_checkpoint(source, step)
    final = target / str(step)

    def copy() -> None:
        draft = storage.draft(final, step, "copying")
        if draft.exists():
            storage.remove(draft)
        storage.copy(source / str(step), draft)
        storage.publish(draft, final)

    of_first(copy)


def read_model(directory: Folder, target: PyTree, which: str | int = "last") -> tuple[int, PyTree]:
    """Reads the `model` item alone, and leaves the folder as it is: its run may be under way.

    Args:
        directory: The checkpoints of a run.
        target: Structure, dtypes and shardings to read into.
        which: "last", "best" by validation loss, or a step.

    Returns:
        The step, and the item.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        Damaged: It is not what was saved.
    """
    step = of_first(lambda: _find(directory, which))
    check_checkpoint(directory, step, only=MODEL)
    return step, restore_item(directory / str(step), MODEL, restore_arrays(target))


def _find(directory: Folder, which: str | int) -> int:
    steps = kept_steps(directory)
    step = steps[-1] if which == "last" and steps else which
    if which == "best":
        losses = {
            step: loss for step in steps if (loss := _loss(directory / str(step))) is not None
        }
        step = best_step(losses) if losses else which
    if not isinstance(step, int) or step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(
            f"{directory} has no checkpoint {which}: give last, best, or a step of those that are "
            f"kept, {there}"
        )
    return step


def _loss(folder: Folder) -> float | None:
    """The validation loss of a checkpoint; None of one without, or whose seal cannot be read."""
    try:
        return seal.read_seal(folder)["val_loss"]
    except Damaged:
        return None


def _older_whole(directory: Folder, step: int, only: str) -> str:
    """What can be done about a damaged checkpoint."""
    for other in reversed([other for other in kept_steps(directory) if other < step]):
        if _damage(directory / str(other), other, only, 0, 1) is not None:
            continue
        run = "RUN" if storage.is_remote(directory) else directory.parent
        return (
            f"The checkpoint of step {other} is whole: `train --resume` goes back to it by itself, "
            f"`--resume-step {other}`, `--branch-from {run}@{other}` and, where "
            f"a model is read, `--checkpoint {other}` take it"
        )
    return "No older checkpoint is whole: restore the folder from a copy, or train again"


def agreed_damage(folder: Folder, step: int | None, only: str = "") -> str | None:
    """What is wrong with a checkpoint, as all processes together find; None if nothing is.

    Each reads a share of the files. What another than the first finds wrong the first reads itself:
    a network file system may show a file late, or to some hosts alone, and that is no damage.

    Args:
        folder: The checkpoint's.
        step: Its step; None for any.
        only: An item: the others are not read.

    Raises:
        OSError: Others than the first cannot read what that reads well.
    """
    found = gather(_damage(folder, step, only, group.index(), group.count()))
    accused = [process for process, damage in enumerate(found) if damage is not None]
    if not accused or 0 in accused:
        return found[0]
    damage = of_first(lambda: _damage(folder, step, only, accused[0], len(found)))
    if damage is None:
        raise OSError(
            f"{folder}: process {accused[0]} finds that {found[accused[0]]}, and process 0 does "
            "not: the checkpoints have to lie where all hosts see the same files"
        )
    return damage


def _damage(folder: Folder, step: int | None, only: str, share: int, shares: int) -> str | None:
    try:
        sealed = seal.check(folder, only=only, share=share, shares=shares)
    except Damaged as error:
        return str(error)
    if step is not None and sealed.get("step") != step:
        return f"its {storage.SEAL} is of step {sealed.get('step')}"
    return None
