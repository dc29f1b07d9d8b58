"""What a fine-tuning is to do, from the command line: model, tuner, devices, place."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.finetune.args import Args, check, settings_of
from examples.finetune.base import Base, base_folder, find_base
from examples.finetune.optim_args import parse_optim_args
from examples.finetune.training.place import ARGS, Place, find_place
from examples.moonlight.common.files import read_json
from examples.moonlight.common.processes.agreement import gather, of_first
from examples.moonlight.common.untrusted import is_there
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.model.execution.dtype import compute_dtype
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import ModelSharding, make_sharding


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is to do; nothing of it is read from its folder or its data.

    Attributes:
        args: The command line's arguments.
        place: The run's folder, and whether to go on there.
        base: The model to begin with.
        config: Its architecture, for rows as long as the data's, see `with_rows`.
        execution: How the model is computed, and on which devices.
        options: The arguments of `--optim_args`.
    """

    args: Args
    place: Place
    base: Base
    config: ModelConfig
    execution: Execution
    options: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return self.place.folder

    @property
    def sharding(self) -> ModelSharding:
        """The devices."""
        return self.execution.sharding

    @property
    def lora(self) -> bool:
        """Whether low-rank factors are trained, and the model's own weights are not."""
        return self.args.tuner_type == "lora"

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model together, on all devices."""
        return self.args.per_device_train_batch_size * self.sharding.batch_shards

    @property
    def batch(self) -> int:
        """Rows of an optimizer step."""
        return self.micro_batch * self.args.gradient_accumulation_steps

    def with_rows(self, length: int) -> "Job":
        """The same with a model that reads rows of a length; rope has no end of its own."""
        positions = max(self.config.max_position_embeddings, length)
        config = dataclasses.replace(self.config, max_position_embeddings=positions)
        return dataclasses.replace(self, config=config)

    def record(self, base: str) -> bytes:
        """What `args.json` holds: every argument, what was left open filled in, and the model.

        Args:
            base: The digest of the weights that the run began with.
        """
        args = dataclasses.asdict(self.args) | {"learning_rate": self.args.peak_rate}
        del args["processes"]
        content = args | {
            "output_dir": str(self.folder),
            "torch_dtype": jnp.dtype(self.execution.dtype).name,
            "base": self.base.record() | {"digest": base},
            "config": dataclasses.asdict(self.config),
        }
        return (json.dumps(content, indent=2, default=str, ensure_ascii=False) + "\n").encode()

    def settings(self, data: dict[str, Any]) -> dict[str, Any]:
        """What a run has to have in common with the one that it resumes."""
        settings = settings_of(self.args) | {"batch": self.batch} | data
        return settings | {"config": dataclasses.asdict(self.config)}


def make_job(args: Args) -> Job:
    """Reads the arguments, and rejects what no run can do, before anything else is read.

    Raises:
        FileNotFoundError: The model, or the checkpoint to go on from, is not there.
        ValueError: An argument is out of range, or the model cannot be read.
    """
    check(args)
    options = parse_optim_args(args.optim_args, args.optimizer, args.tuner_type)
    place = _place_of_first(args)
    before = of_first(lambda: _checkpoint_before(args, place))
    base = find_base(args.model, before)
    # A run that goes on meanwhile may have saved another one since.
    base = base._replace(checkpoint=gather(base.checkpoint)[0])
    return Job(args, place, base, base.config, make_execution(args), options)


def _place_of_first(args: Args) -> Place:
    """Where the run works, which process 0 looks up."""

    def found() -> list[Any]:
        place = find_place(args)
        return [str(place.folder), place.resume, place.step]

    folder, resume, step = of_first(found)
    return Place(Path(folder), resume, step)


def _checkpoint_before(args: Args, place: Place) -> int | None:
    """Which step of its base a run began with, if it is resumed, and its base is a run of ours."""
    path = place.folder / ARGS
    if not place.resume or not is_there(path):
        return None
    base = read_json(path).get("base")
    there = base.get("checkpoint") if isinstance(base, dict) else None
    same = isinstance(base, dict) and base.get("folder") == str(base_folder(args.model).resolve())
    return there if same and type(there) is int else None


def make_execution(args: Any) -> Execution:
    """How a model is computed; what a command line leaves open follows from the devices.

    Args:
        args: The flags of any of the programs here; those that train have more.
    """
    on_cpu = jax.default_backend() == "cpu"
    unroll = getattr(args, "unroll", False)
    return Execution(
        dtype=jnp.dtype(compute_dtype(args.torch_dtype)[0]),
        sharding=make_sharding(args.mesh),
        experts=args.experts or ("dense" if on_cpu else "ragged"),
        remat=getattr(args, "gradient_checkpointing", False),
        unroll=on_cpu if unroll is None else unroll,
        attention_block=getattr(args, "attention_block", None),
        loss_block=getattr(args, "loss_block", None),
    )
