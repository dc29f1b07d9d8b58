"""What a run changes: the model's weights and the optimizer's state, and where they lie."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx
from rich.console import Console

from examples.moonlight.common.processes.group import barrier
from examples.moonlight.huggingface.pretrained import abstract_model, load_pretrained, make_model
from examples.moonlight.model.execution.dtype import compute_dtype
from examples.moonlight.model.execution.sharding import bytes_per_device
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import ParameterCounts, count_parameters
from examples.moonlight.run_folder.checkpoint import Checkpoints, Restored
from examples.moonlight.training.attention import attention_heads
from examples.moonlight.training.job import Job
from examples.moonlight.training.optimizers import make_optimizer
from examples.moonlight.training.placement import state_shardings
from examples.moonlight.training.routing import read_roles
from examples.moonlight.training.steps import TrainState
from muon_jax import ShardingReport, UseRoles, qk_clip, sharding_report


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model and its optimizer, before anything of them is made.

    Attributes:
        job: What the run is to do.
        graphdef: The model's static half, in training.
        inference: The graph in validation and generation, in which no expert is ever full.
        counts: The model's parameters, counted.
        roles: Which parameters are matrices, as the model's own loss shows.
        optimizer: Clipping, the optimizer, and QK-Clip where it is asked for.
        abstract: The shapes of the state.
        shardings: Where each array of the state lies.
    """

    job: Job
    graphdef: nnx.GraphDef
    inference: nnx.GraphDef
    counts: ParameterCounts
    roles: UseRoles
    optimizer: optax.GradientTransformation
    abstract: TrainState
    shardings: TrainState

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on one device."""
        return bytes_per_device(self.abstract.opt_state, self.shardings.opt_state)

    def describe(self, console: Console) -> None:
        """Says how large the model is, what trains it, and what that takes of each device."""
        job, counts = self.job, self.counts
        console.print(
            f"{job.name}: {counts.total:,} parameters, {counts.body:,} without embedding and head, "
            f"{counts.active:,} of those active per token; {job.args.optimizer}, peak rate "
            f"{job.recipe.learning_rate:g}"
        )
        dtype, why = compute_dtype(job.args.compute_dtype)
        console.print(f"computing in {dtype} on {jax.devices()[0].device_kind}: {why}")
        if job.sharding.mesh is not None:
            weights = bytes_per_device(self.abstract.params, self.shardings.params)
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
            heads=self.job.heads,
        )

    def restore(self, checkpoints: Checkpoints) -> tuple[TrainState, Restored]:
        """The state of the newest whole checkpoint, and all else that it holds."""
        target = jax.tree.map(lambda x, s: x.update(sharding=s), self.abstract, self.shardings)
        restored = checkpoints.restore(
            model={"params": target.params, "router_bias": target.bias},
            optimizer=target.opt_state,
        )
        params, bias = (restored.model[name] for name in ("params", "router_bias"))
        return TrainState(params, bias, restored.optimizer), restored

    def start(self, console: Console) -> TrainState:
        """The state of a run that begins: new weights, or those of a Hugging Face directory."""
        job = self.job
        if job.pretrained is None and job.sharding.mesh is not None:
            draw = jax.jit(lambda: _draw(job, self.optimizer), out_shardings=self.shardings)
            program = draw.lower().compile()
            barrier()
            return program()
        if job.pretrained is not None:
            _, params, bias = load_pretrained(job.pretrained, job.execution, console=console)
        else:
            # Eagerly, where one program makes all draws; see `draws.py`.
            _, params, bias = nnx.split(_build(job), nnx.Param, RouterBias)
        init = jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)
        return TrainState(params, bias, init(params))


def make_learner(job: Job, qk_clip_threshold: float | None) -> Learner:
    """The model and the optimizer of a run; nothing is computed.

    Args:
        job: What the run is to do, with the vocabulary of its texts.
        qk_clip_threshold: The largest logit that "muonclip" leaves alone; None, which the other
            optimizers have, clips nothing.
    """
    args, mesh = job.args, job.sharding.mesh
    model = nnx.eval_shape(lambda: _build(job))
    graphdef, params, _ = nnx.split(model, nnx.Param, RouterBias)
    clip = []
    if qk_clip_threshold is not None:
        clip = [qk_clip(attention_heads(job.config), qk_clip_threshold)]
    roles = read_roles(job.config)
    optimizer = make_optimizer(
        args.optimizer,
        job.plan.learning_rate,
        args.weight_decay,
        mesh,
        None if mesh is None else job.sharding.param_shardings(params),
        clip,
        roles,
        job.heads,
    )
    abstract = jax.eval_shape(lambda: _draw(job, optimizer))
    shardings = state_shardings(abstract, optimizer, args.optimizer, job.sharding)
    inference = graphdef
    if job.dropless != job.execution:
        inference, _, _ = abstract_model(job.config, job.dropless)
    counts = count_parameters(model)
    return Learner(job, graphdef, inference, counts, roles, optimizer, abstract, shardings)


def _build(job: Job) -> Any:
    return make_model(job.config, rngs=nnx.Rngs(job.args.seed), execution=job.execution)


def _draw(job: Job, optimizer: optax.GradientTransformation) -> TrainState:
    _, params, bias = nnx.split(_build(job), nnx.Param, RouterBias)
    return TrainState(params, bias, optimizer.init(params))
