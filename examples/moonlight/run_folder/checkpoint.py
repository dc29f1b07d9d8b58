"""Checkpoints that a run killed at any moment can continue from, and that show their damage.

A checkpoint is written where nobody looks for one, by all processes at once, each its own shards,
while the training goes on. It is sealed (`seal.py`), put on disk with everything in it, and only
then given its name, the number of its step (`storage.py`): it is whole or absent, also after a loss
of power. After that, older ones are deleted. Three items lie side by side, so that whoever needs
only the weights (sampling, export, fine-tuning) restores only `model`:

  model      parameters and router bias, as pure nested dicts
  optimizer  the optax state
  progress   JSON: what the loop needs besides arrays (the position in the data, seconds spent)

A run keeps its most recent checkpoints, the best by validation loss, the ends of its stages, and
the first after every so many tokens: to any of them it can go back. Nothing is restored whose seal
does not hold.

Of several processes the first lists, seals, names, deletes and sets aside; the others write their
shards, and the digests of the files that they wrote. All must see the same folder. One that dies in
the midst of a save leaves no name: what was written is removed by the next save or start.
"""

import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import rich
from rich.console import Console

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import of_first, together
from examples.moonlight.common.program import ThreadsLeft
from examples.moonlight.run_folder import engine, seal, storage
from examples.moonlight.run_folder.flags import PRETRAINING, Flags
from examples.moonlight.run_folder.lock import FolderLost, Mark
from examples.moonlight.run_folder.reading import agreed_damage
from examples.moonlight.run_folder.retention import Keeps
from examples.moonlight.run_folder.saving import Behind, seal_and_publish
from examples.moonlight.run_folder.seal import Damaged
from examples.moonlight.run_folder.storage import Folder, kept_steps

PyTree = Any

# The folder of damaged checkpoints, beside that of the whole ones.
DAMAGED = "damaged"


class Restored(NamedTuple):
    """One checkpoint, read back."""

    step: int
    model: PyTree
    optimizer: PyTree
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, of which this is the only writer (`folder.py` sees to that).

    All processes of a run make one, and call the same methods in the same order.

    Args:
        directory: Absolute or relative, on a file system or in an object store; created when
            missing. What a killed run left half-written or half-deleted in it is removed.
        retention: Which checkpoints are kept.
        console: Told of damage; left out, the terminal.
        prefix: What a checkpoint's name has before its step.
        damaged: Where damaged checkpoints go; left out, into a folder beside `directory`. In an
            object store they stay in `directory`, under another name.
        flags: What the program calls its flags.
        guard: Raises where the run's folder is no longer this run's: nothing is saved then.

    Raises:
        ElsewhereFailed: The first process cannot make or read the folder.
        RuntimeError: The processes do not see the same folder.
    """

    def __init__(
        self,
        directory: Folder,
        retention: Keeps,
        console: Console | None = None,
        *,
        prefix: str = "",
        damaged: Folder | None = None,
        flags: Flags = PRETRAINING,
        guard: Callable[[], None] = lambda: None,
    ):
        self.directory = storage.absolute(directory)
        self._damaged = damaged or self.directory.parent / DAMAGED
        self._retention, self._prefix, self._flags = retention, prefix, flags
        self._console = console or rich.get_console()
        self._orbax = engine.make_checkpointer()
        self._behind: Behind | None = None
        self._guard = guard
        self._mark = Mark(self.directory) if storage.is_remote(self.directory) else None
        # The steps that are there, with their validation losses, and those whose seal cannot be
        # read, which are left for whoever finds out what happened. The same in all processes.
        self._losses: dict[int, float | None] = {}
        self._unsealed: set[int] = set()
        token = of_first(self._enter)
        together(lambda: self._check_shared(token))
        if token and group.is_first():
            (self.directory / token).unlink(missing_ok=True)
        self._read_losses()

    def _enter(self) -> str:
        """Takes the folder over; returns the name of a file that every process has to see."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        if self._mark is not None:
            self._mark.write()
        if group.count() == 1:
            return ""
        token = f".saving-{uuid.uuid4().hex}"
        (self.directory / token).write_bytes(b"")
        return token

    def _check_shared(self, token: str) -> None:
        if token and not storage.is_shown((self.directory / token).exists):
            raise RuntimeError(
                f"process {group.index()} does not see what process 0 wrote into "
                f"{self.directory}: the checkpoints have to lie where all hosts see the same folder"
            )

    def _remove_unfinished(self) -> None:
        for path in storage.unfinished(self.directory, self._prefix):
            storage.remove(path)

    def path(self, step: int) -> Folder:
        """Where the checkpoint of a step lies, or would."""
        return self.directory / f"{self._prefix}{step}"

    def latest_step(self) -> int | None:
        """The number of optimizer steps behind the newest checkpoint; None without any."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """The steps that are kept, in order; waits for the one that is being saved."""
        self.wait()
        return sorted(self._losses.keys() | self._unsealed)

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

        It returns when the arrays are copied, and may be donated; the rest happens behind it. What
        fails there is raised by whichever method is called next.

        The folder is made again where somebody deleted it, and that is said. `files` are written
        beside the three items, by their names. Of what is no array the first process's is written.

        Raises:
            ThreadsLeft: It cannot be written, for want of space, say: nothing was deleted for it.
            FolderLost: The folder, or the run's, was deleted, or taken over by another process.
        """
        self.wait()
        self._check_owner()
        draft = storage.draft(self.path(step), step)
        try:
            if group.is_first():
                self._prepare(step)
            with contextlib.ExitStack() as quiet:
                quiet.enter_context(engine.one_error())
                model, optimizer = engine.out_of_reach((model, optimizer))
                self._orbax.save(draft, args=engine.save_args(model, optimizer, progress))
                behind = quiet.pop_all()
        except Exception as error:  # Orbax and its engine raise what they like
            raise self._failed(step, error) from error

        def finish() -> None:
            try:
                with behind:
                    self._orbax.wait_until_finished()
                facts = {"step": step, "val_loss": val_loss}
                seal_and_publish(
                    draft, self.path(step), facts, files or {}, may_publish=self._check_owner
                )
            except FolderLost:
                raise
            except Exception as error:
                self._check_owner()  # which would be the cause
                raise self._failed(step, error) from error
            self._losses[step] = val_loss
            self._delete_what_is_not_kept()

        self._behind = Behind(finish)

    def wait(self) -> None:
        """Waits until what was saved last is there, and what is no longer kept is gone.

        Raises:
            ThreadsLeft: It could not be written.
            FolderLost: The folder, or the run's, was deleted meanwhile, or taken over.
        """
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.wait()

    def check(self) -> None:
        """Raises what has failed behind the training's back, without waiting for anything.

        Raises:
            ThreadsLeft: What was saved last could not be written.
        """
        if self.is_idle:
            self.wait()

    @property
    def is_idle(self) -> bool:
        """Whether this process's part of what was saved last has come to its end, well or not."""
        return self._behind is None or not self._behind.is_alive()

    def _check_owner(self) -> None:
        """Of several processes the first knows whose the folder is."""
        if group.is_first():
            self._guard()
            if self._mark is not None:
                self._mark.check()

    def _prepare(self, step: int) -> None:
        if not self.directory.exists() and not storage.is_remote(self.directory):
            self._warn(f"{self.directory} was deleted: it is made again for step {step}.")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()

    def _failed(self, step: int, error: Exception) -> ThreadsLeft:
        if group.is_first():
            with contextlib.suppress(OSError):
                self._remove_unfinished()
        kept = max(self._losses, default=None)
        return ThreadsLeft(
            f"the checkpoint of step {step} could not be written to {self.directory}: "
            f"{engine.cause(error)}. The newest that is there is "
            f"{'none' if kept is None else f'of step {kept}'}; mend the cause, and go on with "
            f"the same command and {self._flags.resume}"
        )

    def _read_losses(self) -> None:
        """Learns what is there, and the validation losses, from the first process."""

        def read() -> list[tuple[int, bool, float | None]]:
            found = []
            for step in kept_steps(self.directory, self._prefix):
                try:
                    found.append((step, True, seal.read_seal(self.path(step))["val_loss"]))
                except Damaged:
                    found.append((step, False, None))
            return found

        found = of_first(read)
        self._losses = {step: loss for step, sealed, loss in found if sealed}
        self._unsealed = {step for step, sealed, _ in found if not sealed}

    def _delete_what_is_not_kept(self) -> None:
        # Computed by all processes, with the same result; see `retention.py`.
        for step in self._losses.keys() - self._retention.kept(self._losses):
            self._delete(step)

    def _delete(self, step: int) -> None:
        self._losses.pop(step, None)
        self._unsealed.discard(step)
        if group.is_first() and self.path(step).exists():
            storage.delete(self.path(step), step)

    def delete_after(self, step: int) -> list[int]:
        """Deletes every checkpoint after a step, and returns which.

        The newest goes first: killed half-way, the run goes on from what is left.
        """
        later = [other for other in self.all_steps() if other > step]
        for other in reversed(later):
            self._delete(other)
        return later

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, as all processes together find; None if nothing is.

        Raises:
            OSError: Others than the first cannot read what that reads well.
        """
        return agreed_damage(self.path(step), step)

    def _set_damaged_aside(self) -> None:
        """Moves damaged checkpoints out of the way of the newest whole one, and says so."""
        wrong = {}
        for step in reversed(self.all_steps()):
            damage = self.damage(step)
            if damage is None:
                break
            wrong[step] = damage
        else:
            if wrong:
                raise Damaged(
                    f"{self.directory}: no checkpoint is whole, so the run cannot go on: "
                    f"{_listed(wrong)}. Restore the folder from a copy, or start again in another "
                    f"{self._flags.output}"
                )
        if not wrong:
            return
        of_first(lambda: self._move_aside(wrong))
        self._read_losses()
        self._warn(
            f"Going back to step {self.latest_step()}, the newest checkpoint that is whole; "
            "the steps after it are taken again."
        )

    def _move_aside(self, wrong: Mapping[int, str]) -> None:
        for step, reason in wrong.items():
            name = f"{step}-{uuid.uuid4().hex[:8]}"
            if storage.is_remote(self.directory):
                # There a folder is there only if something is in it, and nothing moves into others.
                aside = self.directory / f"{DAMAGED}-{name}"
            else:
                aside = self._damaged / name
                aside.parent.mkdir(exist_ok=True)
            self.path(step).rename(aside)
            self._warn(
                f"The checkpoint of step {step} is damaged: {reason}. It is not used, and lies in "
                f"{aside} now."
            )

    def _warn(self, message: str) -> None:
        if group.is_first():
            self._console.print(
                message, style="bold red", markup=False, highlight=False, soft_wrap=True
            )

    def restore(self, *, model: PyTree, optimizer: PyTree) -> Restored:
        """Reads the newest whole checkpoint into structure, dtypes and shardings of the arguments.

        Each process reads its own shards, whatever mesh and however many processes wrote them; and,
        before, its share of the files, for their digests.

        Newer ones that are damaged are kept, but out of the way, in `damaged/` beside the folder,
        and it is said loudly.

        Raises:
            FileNotFoundError: There is no checkpoint.
            Damaged: There are checkpoints, and none of them is whole; they stay where they are.
            OSError: Others than the first process cannot read what that reads well.
        """
        self._set_damaged_aside()
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        restored = self._orbax.restore(self.path(step), args=engine.restore_args(model, optimizer))
        return Restored(
            step, restored[engine.MODEL], restored[engine.OPTIMIZER], restored[engine.PROGRESS]
        )

    def close(self) -> None:
        """Waits for what is being saved, and lets go of Orbax' threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()


def _listed(wrong: Mapping[int, str]) -> str:
    return "; ".join(f"of step {step}, {reason}" for step, reason in wrong.items())
