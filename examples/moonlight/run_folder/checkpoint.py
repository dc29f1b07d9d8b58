"""Checkpoints that a run killed at any moment can continue from, and that show their damage.

A checkpoint is written into a hidden folder, sealed (`seal.py`), put on disk with everything in it,
and only then given its name, the number of its step: it is whole or absent, also after a loss of
power. After that, older ones are deleted. Three items lie side by side, so that whoever needs only
the weights (sampling, export, fine-tuning) restores only `model`:

  model      parameters and router bias, as pure nested dicts
  optimizer  the optax state
  progress   JSON: what the loop needs besides arrays (the position in the data, seconds spent)

A run keeps its most recent checkpoints, the best by validation loss, the ends of its stages, and
the first after every so many tokens: to any of them it can go back. Nothing is restored whose seal
does not hold.
"""

import contextlib
import gc
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import rich
from rich.console import Console

from examples.moonlight.common.program import ThreadsLeft
from examples.moonlight.run_folder import seal
from examples.moonlight.run_folder.flags import PRETRAINING, Flags
from examples.moonlight.run_folder.retention import Keeps, best_step
from examples.moonlight.run_folder.seal import Damaged

PyTree = Any

# The folder of a run's checkpoints, in the run's; and beside it that of the damaged ones.
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"

# Seconds that the threads of a failed save get to end, and after that those of Orbax' engine, which
# are none of Python's and cannot be waited for.
_PATIENCE, _REST = 10.0, 0.5

_MODEL, _OPTIMIZER, _PROGRESS = "model", "optimizer", "progress"

# What the names of folders begin with that a kill may leave behind.
_HALF = (".saving-", ".deleting-", ".copying-")


class Restored(NamedTuple):
    """One checkpoint, read back."""

    step: int
    model: PyTree
    optimizer: PyTree
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, of which this is the only writer (`folder.py` sees to that).

    Args:
        directory: Absolute or relative; created when missing. What a killed run left half-written
            or half-deleted in it is removed.
        retention: Which checkpoints are kept.
        console: Told of damage; left out, the terminal.
        prefix: What a checkpoint's name has before its step.
        damaged: Where damaged checkpoints go; left out, into a folder beside `directory`.
        flags: What the program calls its flags.
    """

    def __init__(
        self,
        directory: Path,
        retention: Keeps,
        console: Console | None = None,
        *,
        prefix: str = "",
        damaged: Path | None = None,
        flags: Flags = PRETRAINING,
    ):
        self.directory = directory.absolute()
        self._damaged = damaged or self.directory.parent / DAMAGED
        self._retention, self._prefix, self._flags = retention, prefix, flags
        self._console = console or rich.get_console()
        self._orbax = make_checkpointer()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_hidden()

    def _remove_hidden(self) -> None:
        """Removes what is half-written or half-deleted."""
        for path in self.directory.iterdir():
            if path.name.startswith(_HALF) or (path.name.startswith(".") and not self._prefix):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would."""
        return self.directory / f"{self._prefix}{step}"

    def latest_step(self) -> int | None:
        """The number of optimizer steps behind the newest checkpoint; None without any."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """The steps that are kept, in order."""
        return kept_steps(self.directory, self._prefix)

    def save(
        self,
        step: int,
        *,
        model: PyTree,
        optimizer: PyTree,
        progress: Mapping[str, Any],
        val_loss: float | None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Writes a checkpoint, puts it on disk, then deletes those that are no longer kept.

        The folder is made again where somebody deleted it, and that is said. `files` are written
        beside the three items, by their names.

        Raises:
            ThreadsLeft: It cannot be written, for want of space, say: nothing was deleted for it.
        """
        if not self.directory.exists():
            self._warn(f"{self.directory} was deleted: it is made again for step {step}.")
        partial = self.directory / f".saving-{step}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_hidden()
            with _one_error():
                self._orbax.save(partial, args=save_args(model, optimizer, progress))
            for name, content in (files or {}).items():
                (partial / name).write_bytes(content)
            seal.seal(partial, {"step": step, "val_loss": val_loss})
            partial.rename(self.path(step))
            seal.sync(self.directory)
        except Exception as error:  # Orbax and its engine raise what they like
            with contextlib.suppress(OSError):
                self._remove_hidden()
            kept = self.latest_step()
            raise ThreadsLeft(
                f"the checkpoint of step {step} could not be written to {self.directory}: "
                f"{_cause(error)}. The newest that is there is "
                f"{'none' if kept is None else f'of step {kept}'}; mend the cause, and go on with "
                f"the same command and {self._flags.resume}"
            ) from error
        self._delete_what_is_not_kept()

    def _delete_what_is_not_kept(self) -> None:
        losses = {}
        for step in self.all_steps():
            # One that is damaged is left for whoever finds out what happened to it.
            with contextlib.suppress(Damaged):
                losses[step] = seal.read_seal(self.path(step))["val_loss"]
        for step in losses.keys() - self._retention.kept(losses):
            self.delete(step)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint; killed half-way, it is gone all the same."""
        doomed = self.directory / f".deleting-{step}-{uuid.uuid4().hex}"
        self.path(step).rename(doomed)
        shutil.rmtree(doomed)

    def delete_after(self, step: int) -> list[int]:
        """Deletes every checkpoint after a step, and returns which.

        The newest goes first: killed half-way, the run goes on from what is left.
        """
        later = [other for other in self.all_steps() if other > step]
        for other in reversed(later):
            self.delete(other)
        return later

    def _set_damaged_aside(self) -> None:
        """Moves damaged checkpoints out of the way of the newest whole one, and says so."""
        wrong = {}
        for step in reversed(self.all_steps()):
            try:
                check_folder(self.path(step), step)
                break
            except Damaged as error:
                wrong[step] = str(error)
        else:
            if wrong:
                raise Damaged(
                    f"{self.directory}: no checkpoint is whole, so the run cannot go on: "
                    f"{_listed(wrong)}. Restore the folder from a copy, or start again in another "
                    f"{self._flags.output}"
                )
        for step, reason in wrong.items():
            aside = self._damaged / f"{step}-{uuid.uuid4().hex[:8]}"
            aside.parent.mkdir(exist_ok=True)
            self.path(step).rename(aside)
            self._warn(
                f"The checkpoint of step {step} is damaged: {reason}. It is not used, and lies in "
                f"{aside} now."
            )
        if wrong:
            self._warn(
                f"Going back to step {self.latest_step()}, the newest checkpoint that is whole; "
                "the steps after it are taken again."
            )

    def _warn(self, message: str) -> None:
        self._console.print(
            message, style="bold red", markup=False, highlight=False, soft_wrap=True
        )

    def restore(self, *, model: PyTree, optimizer: PyTree) -> Restored:
        """Reads the newest whole checkpoint into structure, dtypes and shardings of the arguments.

        Newer ones that are damaged are kept, but out of the way, in `damaged/` beside the folder,
        and it is said loudly.

        Raises:
            FileNotFoundError: There is no checkpoint.
            Damaged: There are checkpoints, and none of them is whole; they stay where they are.
        """
        self._set_damaged_aside()
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        restored = self._orbax.restore(self.path(step), args=restore_args(model, optimizer))
        return Restored(step, restored[_MODEL], restored[_OPTIMIZER], restored[_PROGRESS])

    def close(self) -> None:
        """Lets go of Orbax' threads."""
        self._orbax.close()


def kept_steps(directory: Path, prefix: str = "") -> list[int]:
    """The steps that a run's folder of checkpoints keeps, in order; the folder is left as it is."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    steps = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted(int(step) for step in steps if step.isascii() and step.isdecimal())


def read_folder(folder: Path, target: PyTree) -> PyTree:
    """Reads the `model` item of one checkpoint, wherever its folder was copied to.

    Args:
        folder: The checkpoint's.
        target: Structure, dtypes and shardings to read into.

    Raises:
        Damaged: It is not what was saved.
    """
    try:
        seal.check(folder, only=_MODEL)
    except Damaged as error:
        raise Damaged(f"{folder}: this checkpoint is damaged: {error}") from error
    return _restore_item(folder, _MODEL, ocp.args.StandardRestore(_abstract(target)))


def check_checkpoint(directory: Path, step: int, *, only: str = "") -> None:
    """Compares a checkpoint with its seal.

    Args:
        directory: The checkpoints of a run.
        step: The checkpoint's step.
        only: An item: the others are not read.

    Raises:
        Damaged: It is not what was saved; the message names an older one that is, if there is one.
    """
    try:
        check_folder(directory / str(step), step, only)
    except Damaged as error:
        raise Damaged(
            f"{directory / str(step)}: this checkpoint is damaged: {error}. "
            f"{_older_whole(directory, step, only)}"
        ) from error


def read_progress(directory: Path, step: int) -> dict[str, Any]:
    """Reads the `progress` item of a checkpoint that is there, and leaves the folder as it is.

    Raises:
        Damaged: It is not what was saved.
    """
    check_checkpoint(directory, step, only=_PROGRESS)
    return _restore_item(directory / str(step), _PROGRESS, ocp.args.JsonRestore())


def copy_checkpoint(source: Path, step: int, target: Path) -> None:
    """Copies one checkpoint of a run into another's folder of checkpoints, whole or not at all.

    Raises:
        Damaged: It is not what was saved.
    """
    check_checkpoint(source, step)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".copying-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / str(step), partial)
    partial.rename(target / str(step))


def read_model(directory: Path, target: PyTree, which: str | int = "last") -> tuple[int, PyTree]:
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
    check_checkpoint(directory, step, only=_MODEL)
    item = ocp.args.StandardRestore(_abstract(target))
    return step, _restore_item(directory / str(step), _MODEL, item)


def _restore_item(folder: Path, name: str, item: Any) -> Any:
    with make_checkpointer() as orbax:
        return orbax.restore(folder.absolute(), args=ocp.args.Composite(**{name: item}))[name]


def make_checkpointer() -> ocp.Checkpointer:
    """Orbax, for the three items of a checkpoint."""
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            **{
                _MODEL: ocp.StandardCheckpointHandler(),
                _OPTIMIZER: ocp.StandardCheckpointHandler(),
                _PROGRESS: ocp.JsonCheckpointHandler(),
            }
        )
    )


def save_args(model: PyTree, optimizer: PyTree, progress: Mapping[str, Any]) -> Any:
    """What Orbax saves as a checkpoint."""
    return ocp.args.Composite(
        model=ocp.args.StandardSave(model),
        optimizer=ocp.args.StandardSave(optimizer),
        progress=ocp.args.JsonSave(dict(progress)),
    )


def restore_args(model: PyTree, optimizer: PyTree) -> Any:
    """What Orbax restores of one, into the structure, dtypes and shardings of the arguments."""
    return ocp.args.Composite(
        model=ocp.args.StandardRestore(_abstract(model)),
        optimizer=ocp.args.StandardRestore(_abstract(optimizer)),
        progress=ocp.args.JsonRestore(),
    )


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _loss(folder: Path) -> float | None:
    """The validation loss of a checkpoint; None of one without, or whose seal cannot be read."""
    try:
        return seal.read_seal(folder)["val_loss"]
    except Damaged:
        return None


def _older_whole(directory: Path, step: int, only: str) -> str:
    """What can be done about a damaged checkpoint."""
    for other in reversed([other for other in kept_steps(directory) if other < step]):
        try:
            check_folder(directory / str(other), other, only)
        except Damaged:
            continue
        return (
            f"The checkpoint of step {other} is whole: `train --resume` goes back to it by itself, "
            f"`--resume-step {other}`, `--branch-from {directory.parent}@{other}` and, where "
            f"a model is read, `--checkpoint {other}` take it"
        )
    return "No older checkpoint is whole: restore the folder from a copy, or train again"


def check_folder(folder: Path, step: int, only: str = "") -> None:
    """Raises `Damaged` unless the folder of a step holds what that step was sealed with."""
    sealed = seal.check(folder, only=only)
    if sealed.get("step") != step:
        raise Damaged(f"its {seal.SEAL} is of step {sealed.get('step')}")


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Lets Orbax raise one error where a save fails, in the place of pages that it logs.

    Its threads go on after the first of them has failed, fail too, and write their tracebacks, some
    as late as the interpreter's end, where they would hide the cause.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    others = {*threading.enumerate()}
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception:
        deadline = time.monotonic() + _PATIENCE
        for thread in {*threading.enumerate()} - others:
            # Those of a pool never end, and hold nothing back.
            if not thread.name.startswith(("ThreadPoolExecutor", "asyncio_")):
                thread.join(max(0.0, deadline - time.monotonic()))
        gc.collect()  # of tasks whose errors nobody fetched, which say so as they go
        time.sleep(_REST)
        raise
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def _listed(wrong: Mapping[int, str]) -> str:
    return "; ".join(f"of step {step}, {reason}" for step, reason in wrong.items())


def _cause(error: BaseException) -> str:
    """What the system says, or the first line of a long error."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found[1]))
    return next(iter(str(error).splitlines()), "") or type(error).__name__
