"""What a fine-tuning changes, and what it leaves alone: weights, adapters, optimizer state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from examples.finetune.base import check_base, digest
from examples.finetune.data.packing import empty_rows
from examples.finetune.lora.adapters import DropoutKey
from examples.finetune.training.adapted import adapted, lora_config
from examples.finetune.training.job import Job
from examples.finetune.training.optimizer import make_optimizer
from examples.finetune.training.steps import Frozen, StepMetrics, make_train_step, make_validate
from examples.finetune.training.texts import Texts
from examples.moonlight.huggingface.pretrained import abstract_model
from examples.moonlight.model.execution.dtype import compute_dtype
from examples.moonlight.model.execution.sharding import BATCH_AXES, bytes_per_device
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import ParameterCounts, count_parameters
from examples.moonlight.run_folder.checkpoint import Checkpoints, Restored
from examples.moonlight.training.placement import state_shardings
from examples.moonlight.training.steps import TrainState
from muon_jax import ShardingReport, sharding_report

_EMPTY = nnx.State({})


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model and its optimizer, before anything of them is read or made.

    Attributes:
        job: What the run is to do.
        graphdef: The model's static half in training, dropout included.
        inference: Its static half in validation, without dropout.
        counts: The model's parameters, counted, adapters apart.
        schedule: The learning rate by step.
        optimizer: Clipping, the optimizer, and QK-Clip where it is asked for.
        roles: Which trained parameters are matrices.
        abstract: The shapes of what is trained, and of its optimizer's state.
        frozen: The shapes of what is not.
        shardings: Where each array of `abstract` lies.
        frozen_shardings: Where each array of `frozen` lies.
    """

    job: Job
    graphdef: nnx.GraphDef
    inference: nnx.GraphDef
    counts: ParameterCounts
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    roles: Any
    abstract: TrainState
    frozen: Frozen
    shardings: TrainState
    frozen_shardings: Frozen

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on one device."""
        return bytes_per_device(self.abstract.opt_state, self.shardings.opt_state)

    def describe(self, console: Console) -> None:
        """Says how large the model is, what trains how much of it, and what that takes."""
        job, counts = self.job, self.counts
        share = self.trained / counts.total
        how = f"LoRA of rank {job.args.lora_rank}" if job.lora else "full"
        console.print(
            f"{job.base.folder}: {counts.total:,} parameters, {self.trained:,} trained "
            f"({share:.2%}, {how}); {job.args.optimizer}, peak rate {job.args.peak_rate:g}",
            highlight=False,
            soft_wrap=True,
        )
        dtype, why = compute_dtype(job.args.torch_dtype)
        console.print(f"computing in {dtype} on {jax.devices()[0].device_kind}: {why}")
        if job.sharding.mesh is not None:
            weights = bytes_per_device(
                (self.abstract.params, self.frozen.base),
                (self.shardings.params, self.frozen_shardings.base),
            )
            console.print(
                f"mesh {job.sharding}: {weights / 1e6:.2f} MB of parameters and "
                f"{self.state_bytes / 1e6:.2f} MB of optimizer state on each device"
            )

    def sharding_report(self) -> ShardingReport | None:
        """How Muon divides its work over the mesh; None without a mesh or without Muon."""
        mesh = self.job.sharding.mesh
        if mesh is None or self.job.args.optimizer == "adamw":
            return None
        params = self.abstract.params
        return sharding_report(
            params,
            mesh=mesh,
            param_specs=self.job.sharding.param_shardings(params),
            muon_weight_dimension_numbers=self.roles,
        )

    def start(self, console: Console) -> tuple[TrainState, Frozen, str]:
        """What a run begins with, and the digest of the model's weights."""
        opened = self.job.base.load(self.job.execution, console)
        trained, frozen = opened.params, Frozen(_EMPTY, _EMPTY, opened.bias)
        if self.job.lora:
            trained, dropout = self._draw()
            frozen = Frozen(dropout, opened.params, opened.bias)
        init = jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)
        found = digest((opened.params, opened.bias))
        return TrainState(trained, _EMPTY, init(trained)), frozen, found

    def restore(
        self, checkpoints: Checkpoints, console: Console
    ) -> tuple[TrainState, Frozen, Restored]:
        """The state of the newest whole checkpoint, what is frozen, and all else that it holds.

        Raises:
            ValueError: The adapters were trained beside other weights than the model's.
        """
        trained = _placed(self.abstract.params, self.shardings.params)
        bias = _placed(self.frozen.bias, self.frozen_shardings.bias)
        restored = checkpoints.restore(
            model=self.frozen._replace(bias=bias).saved_with(trained),
            optimizer=_placed(self.abstract.opt_state, self.shardings.opt_state),
        )
        if not self.job.lora:
            state = TrainState(restored.model["params"], _EMPTY, restored.optimizer)
            return state, Frozen(_EMPTY, _EMPTY, restored.model["router_bias"]), restored
        opened = self.job.base.load(self.job.execution, console)
        check_base(
            restored.progress["history"]["base"], (opened.params, opened.bias), self.job.base.folder
        )
        _, dropout = self._draw()
        state = TrainState(restored.model["adapters"], _EMPTY, restored.optimizer)
        return state, Frozen(dropout, opened.params, opened.bias), restored

    def compile(
        self, state: TrainState, frozen: Frozen, texts: Texts
    ) -> tuple[
        Callable[..., tuple[TrainState, StepMetrics]], Callable[[nnx.State, Frozen], Any] | None
    ]:
        """The programs of the loop: a step, and the validation if anything is held out."""
        job, sharding = self.job, self.job.sharding
        one, batch = sharding.place(), sharding.place(None, BATCH_AXES)
        shape = (job.args.gradient_accumulation_steps, job.micro_batch, texts.row_length)
        step = jax.jit(
            make_train_step(self.graphdef, self.optimizer, self.schedule),
            donate_argnums=0,
            in_shardings=(self.shardings, self.frozen_shardings, batch, one),
            out_shardings=(self.shardings, one),
        )
        # Abstract: host data cannot be lowered for the devices of several processes.
        rows_abt, number = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (empty_rows(shape), np.int32(0))
        )
        lowered = step.lower(state, frozen, rows_abt, number)
        compiled = lowered.compile(sharding.compiler_options)
        if texts.validation is None:
            return compiled, None
        rows_kbt = jax.device_put(sharding.spread_all(texts.validation, None, BATCH_AXES), batch)
        validate = jax.jit(
            make_validate(self.inference),
            in_shardings=(self.shardings.params, self.frozen_shardings, batch),
            out_shardings=one,
        )
        sums = validate.lower(state.params, frozen, rows_kbt).compile()
        return compiled, lambda trained, frozen: sums(trained, frozen, rows_kbt)

    def _draw(self) -> tuple[nnx.State, nnx.State]:
        """New factors, and the keys of their dropout: the same bits on any mesh."""
        job = self.job
        model = adapted(job.config, job.execution, lora_config(job.args), job.args.seed)
        _, factors, dropout, _ = nnx.split(model, nnx.LoRAParam, DropoutKey, ...)
        places = (self.shardings.params, self.frozen_shardings.dropout)
        return jax.device_put((factors, dropout), places)


def make_learner(job: Job, steps: int) -> Learner:
    """The model and the optimizer of a run; nothing is computed.

    Args:
        job: What the run is to do, with the rows of its texts.
        steps: How many the whole run has.
    """
    args, sharding = job.args, job.sharding
    base, params, bias = abstract_model(job.config, job.execution)
    counts = count_parameters(nnx.merge(base, params, bias))
    if job.lora:
        model = nnx.eval_shape(
            lambda: adapted(job.config, job.execution, lora_config(args), args.seed)
        )
        model.train()
        graphdef, trained, dropout, params, bias = nnx.split(
            model, nnx.LoRAParam, DropoutKey, nnx.Param, RouterBias
        )
        frozen = Frozen(dropout, params, bias)
        model.eval()
        inference = nnx.graphdef(model)
    else:
        trained, frozen, graphdef, inference = params, Frozen(_EMPTY, _EMPTY, bias), base, base
    schedule, roles, optimizer = make_optimizer(job, steps, trained)
    abstract = TrainState(trained, _EMPTY, jax.eval_shape(optimizer.init, trained))
    return Learner(
        job=job,
        graphdef=graphdef,
        inference=inference,
        counts=counts,
        schedule=schedule,
        optimizer=optimizer,
        roles=roles,
        abstract=abstract,
        frozen=frozen,
        shardings=state_shardings(abstract, optimizer, args.optimizer, sharding),
        frozen_shardings=Frozen(
            jax.tree.map(lambda _: sharding.place(), frozen.dropout),
            sharding.param_shardings(frozen.base),
            jax.tree.map(lambda _: sharding.place(), frozen.bias),
        ),
    )


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), abstract, shardings)
