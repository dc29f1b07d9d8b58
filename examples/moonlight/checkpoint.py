"""Checkpoints that a run killed at any moment can continue from.

Orbax writes a step into a temporary folder and renames it when everything is on disk, so a
checkpoint is whole or absent. Three items lie side by side, so that whoever needs only the weights
(sampling, export, fine-tuning) restores only `model`:

  model      parameters and router bias, as pure nested dicts
  optimizer  the optax state
  progress   JSON: what the loop needs besides arrays (the position in the data, seconds spent)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

PyTree = Any

_policies = ocp.checkpoint_managers


class Restored(NamedTuple):
    """One checkpoint, read back."""

    step: int
    model: PyTree
    optimizer: PyTree
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: its most recent ones, and the best by validation loss.

    Args:
        directory: absolute or relative; created when missing.
        max_to_keep: how many of the most recent to keep; the best one comes on top.
    """

    def __init__(self, directory: Path, *, max_to_keep: int):
        if max_to_keep < 1:
            raise ValueError(f"--max-to-keep must be at least 1, got {max_to_keep}")
        keep = _policies.AnyPreservationPolicy(
            [
                _policies.LatestN(max_to_keep),
                # The highest of the metric is kept, and the best loss is the lowest.
                _policies.BestN(get_metric_fn=lambda metrics: -metrics["val_loss"], n=1),
            ]
        )
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
        options = ocp.CheckpointManagerOptions(
            read_only=True, best_fn=lambda metrics: metrics["val_loss"], best_mode="min"
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
