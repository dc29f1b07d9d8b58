"""Checkpoints that a run killed at any moment can continue from.

Orbax writes a step into a temporary folder and renames it when everything is on disk, so a
checkpoint is whole or absent. Three items lie side by side, so that whoever needs only the weights
(sampling, export, fine-tuning) restores only `model`:

  model      parameters and router bias, as pure nested dicts
  optimizer  the optax state
  progress   JSON: what the loop needs besides arrays (the position in the data, seconds spent)

A run keeps its most recent checkpoints, the best by validation loss, the ends of its stages, and
the first after every so many tokens: to any of them it can go back.
"""

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

PyTree = Any

# The folder of a run's checkpoints, in the run's.
CHECKPOINTS = "checkpoints"

_policies = ocp.checkpoint_managers


class Restored(NamedTuple):
    """One checkpoint, read back."""

    step: int
    model: PyTree
    optimizer: PyTree
    progress: dict[str, Any]


@dataclasses.dataclass
class EveryTokens:
    """Orbax' policy that preserves the first checkpoint after every so many tokens.

    It looks at no clock and no earlier decision: what is kept follows from the steps alone.

    Attributes:
        interval: Tokens.
        tokens_at: The tokens that are behind a run after so many steps.
    """

    interval: int
    tokens_at: Callable[[int], int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint, in order of steps, is preserved."""
        del context
        passed = [self.tokens_at(info.step) // self.interval for info in checkpoints]
        return [now > before for before, now in zip([0, *passed], passed, strict=False)]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: absolute or relative; created when missing.
        max_to_keep: how many of the most recent to keep; what else is kept comes on top.
        keep_steps: steps whose checkpoints are kept for good.
        every_tokens: keeps the first checkpoint after every so many tokens; None for none.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_to_keep: int,
        keep_steps: Collection[int] = (),
        every_tokens: EveryTokens | None = None,
    ):
        if max_to_keep < 1:
            raise ValueError(f"--max-to-keep must be at least 1, got {max_to_keep}")
        policies = [
            _policies.LatestN(max_to_keep),
            # The highest of the metric is kept, and the best loss is the lowest.
            _policies.BestN(get_metric_fn=lambda metrics: -metrics["val_loss"], n=1),
            _policies.CustomSteps([*keep_steps]),
        ]
        if every_tokens is not None:
            policies.append(every_tokens)
        keep = _policies.AnyPreservationPolicy(policies)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                # The policy decides; but without best_fn Orbax writes no metrics, and after a
                # resume it would take every earlier checkpoint for one worth keeping.
                best_fn=lambda metrics: metrics["val_loss"],
                best_mode="min",
                # The training step donates the arrays that an asynchronous save would still read,
                # and on CPU a "copy to the host" is the same memory.
                enable_async_checkpointing=False,
                # What a killed run left half-written.
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The number of optimizer steps behind the newest checkpoint; None without any."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The steps that are kept, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        *,
        model: PyTree,
        optimizer: PyTree,
        progress: Mapping[str, Any],
        val_loss: float,
    ) -> None:
        """Writes a checkpoint, then deletes those that are no longer kept."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                optimizer=ocp.args.StandardSave(optimizer),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
            metrics={"val_loss": val_loss},
        )

    def delete_after(self, step: int) -> list[int]:
        """Deletes every checkpoint after a step, and returns which.

        The newest goes first: killed half-way, the run goes on from what is left.
        """
        later = [other for other in self.all_steps() if other > step]
        for other in reversed(later):
            self._manager.delete(other)
        return later

    def restore(self, *, model: PyTree, optimizer: PyTree) -> Restored:
        """Reads the newest checkpoint into the structure, dtypes and shardings of the arguments.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        abstract = ocp.utils.to_shape_dtype_struct
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(jax.tree.map(abstract, model)),
                optimizer=ocp.args.StandardRestore(jax.tree.map(abstract, optimizer)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return Restored(step, restored["model"], restored["optimizer"], restored["progress"])

    def close(self) -> None:
        """Lets go of Orbax' threads."""
        self._manager.close()


def kept_steps(directory: Path) -> list[int]:
    """The steps that a run's folder of checkpoints keeps, in order; the folder is left as it is."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def read_progress(directory: Path, step: int) -> dict[str, Any]:
    """Reads the `progress` item of a checkpoint that is there, and leaves the folder as it is."""
    options = ocp.CheckpointManagerOptions(create=False)  # see `read_model`
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        item = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return manager.restore(step, args=item)["progress"]


def copy_checkpoint(source: Path, step: int, target: Path) -> None:
    """Copies one checkpoint of a run into another's folder of checkpoints, whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}-{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / str(step), partial)
    partial.rename(target / str(step))


def read_model(directory: Path, target: PyTree, which: str | int = "last") -> tuple[int, PyTree]:
    """Reads the `model` item alone, and leaves the folder as it is: its run may be under way.

    Args:
        directory: the checkpoints of a run.
        target: structure, dtypes and shardings to read into.
        which: "last", "best" by validation loss, or a step.

    Returns:
        The step, and the item.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    steps: list[int] = []
    if directory.is_dir():
        # Without read_only, of which Orbax warns: what is never saved to deletes nothing.
        options = ocp.CheckpointManagerOptions(
            create=False, best_fn=lambda metrics: metrics["val_loss"], best_mode="min"
        )
        with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
            steps = sorted(manager.all_steps())
            named = {"last": manager.latest_step(), "best": manager.best_step()}
            step = named.get(which) if isinstance(which, str) else which
            if step is not None and step in steps:
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
                item = ocp.args.Composite(model=ocp.args.StandardRestore(abstract))
                return step, manager.restore(step, args=item)["model"]
    raise FileNotFoundError(
        f"{directory} has no checkpoint {which!r}; there are the steps {steps}, last and best"
    )
