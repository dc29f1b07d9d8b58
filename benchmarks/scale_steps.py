"""A whole training step of Moonlight, compiled and counted: the rows of `benchmarks.scale`.

The step is the example's own (`training/steps.py`): a loop over micro-batches of one
sequence per device, each through forward and backward with recomputed layers in bfloat16, then
clipping, Muon with ZeRO-1, and the routers' biases. Nothing is allocated: arguments are shapes.

`python -m benchmarks.scale_steps '{"target": "cpu-8", ...}'` prints a row as a line of JSON.
`benchmarks.scale` runs it, in a process with `targets.environment`.
"""

import dataclasses
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import hlo
from benchmarks.scale_cases import SCALES, Scale
from benchmarks.step import newton_schulz_flops
from benchmarks.targets import make_mesh
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, MESH_AXES, ModelSharding
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import ParameterCounts
from examples.moonlight.model.moonlight import Moonlight, parameter_counts
from examples.moonlight.training.placement import state_shardings
from examples.moonlight.training.steps import TrainState, make_train_steps
from muon_jax import muon

SMALL_BYTES = 2**16
"""Of a reduction: a norm, a count, a maximum, a gain's gradient. Matrices are larger."""

PHASES = (
    "weights forward", "weights backward", "gradients", "dispatch", "embedding",
    "muon exchange", "muon gather", "adamw gather", "other",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
      target: a name of `SCALES`.
      preset: of the architecture.
      layers: how many; None is the preset's.
      context: tokens of a sequence.
      batch: sequences of a step, over all devices and micro-batches.
    """

    target: str
    preset: str
    layers: int | None
    context: int
    batch: int

    @property
    def scale(self) -> Scale:
        """The machine."""
        return SCALES[self.target]

    @property
    def config(self) -> MoonlightConfig:
        """The architecture."""
        config = MoonlightConfig.preset(self.preset)
        layers = self.layers or config.num_hidden_layers
        longest = max(self.context, config.max_position_embeddings)
        return dataclasses.replace(
            config, num_hidden_layers=layers, max_position_embeddings=longest
        )

    @property
    def micro_batches(self) -> int:
        """Of one sequence per device.

        Raises:
          ValueError: the devices do not divide the batch.
        """
        micro, left = divmod(self.batch, self.scale.devices)
        if left or not micro:
            raise ValueError(
                f"--batch {self.batch}: the {self.scale.devices} devices of {self.target} take one "
                "sequence each at a time; give a multiple of them"
            )
        return micro


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile: a function, its abstract arguments, and where its results lie."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    matrices: dict[str, tuple[int, ...]]

    def lower(self) -> jax.stages.Lowered:
        """The step for the target's compiler; the state's buffers are used again."""
        jitted = jax.jit(self.step, donate_argnums=0, out_shardings=self.out_shardings)
        return jitted.lower(*self.arguments)


def build(job: Job) -> Program:
    """Lay the model, the optimizer's state and the tokens out on the target's mesh."""
    scale, config = job.scale, job.config
    sharding = ModelSharding(make_mesh(scale.target, scale.mesh, MESH_AXES))
    execution = Execution(
        dtype=jnp.bfloat16,
        sharding=sharding,
        experts="ragged",
        remat=True,
        attention_block=scale.attention_block,
        loss_block=scale.loss_block,
    )
    abstract = nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0), execution=execution))
    graphdef, params, bias = nnx.split(abstract, nnx.Param, RouterBias)
    specs = sharding.param_shardings(params)
    schedule = optax.constant_schedule(4.2e-4)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule, weight_decay=0.1, mesh=sharding.mesh, param_specs=specs),
    )
    state = TrainState(params, bias, jax.eval_shape(optimizer.init, params))
    shardings = state_shardings(state, optimizer, "muon", sharding)
    state = jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings)
    tokens_abt = jax.ShapeDtypeStruct(
        (job.micro_batches, scale.devices, job.context + 1),
        jnp.int32,
        sharding=sharding.place(None, BATCH_AXES),
    )
    train_steps = make_train_steps(graphdef, optimizer, schedule, bias_rate=1e-3)

    def step(state: TrainState, tokens_abt: jax.Array) -> tuple[TrainState, Any]:
        # One step per call, and a constant: its loop has a length that the program shows.
        state, measured, _ = train_steps(state, tokens_abt[None], jnp.int32(0), 1)
        return state, measured

    matrices = {
        "/".join(map(str, path)): tuple(leaf.shape)
        for path, leaf in nnx.to_flat_state(params)
        if len(leaf.shape) > 1 and path[-1] != "scale" and path[0] not in ("embed", "lm_head")
    }
    return Program(step, (state, tokens_abt), (shardings, sharding.place()), matrices)


def row(job: Job) -> dict[str, Any]:
    """Compile, and read the program.

    A program that does not fit has no row of bytes and FLOPs, but what the compiler says of it.
    """
    start = time.perf_counter()
    program = build(job)
    lowered = program.lower()
    traced = time.perf_counter()
    found = dataclasses.asdict(job) | {
        "layers": job.config.num_hidden_layers,
        "devices": job.scale.devices,
        "mesh": dict(zip(MESH_AXES, job.scale.mesh, strict=True)),
        "micro_batches": job.micro_batches,
        "memory": job.scale.memory,
        "trace_s": traced - start,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (said := out_of_memory(str(error))):
            raise
        return found | {"fits": False, "compiler": said}
    found["compile_s"] = time.perf_counter() - traced
    memory = compiled.memory_analysis()
    assert memory is not None
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    counted = count(compiled.as_text() or "")
    return found | {
        "fits": sum(sizes.values()) <= job.scale.memory,
        "bytes": sizes,
        **counted,
        "expected": expected(job, parameter_counts(job.config), program.matrices),
    }


def out_of_memory(message: str) -> str | None:
    """What the compiler says of a program that is too large, or None."""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w \w+(?:\. Exceeded [^.]*\.\w+)?", message)
    return found[0] if found else None


def phase_of(collective: hlo.Collective) -> str:
    """What a collective is for: a name of `PHASES`.

    Recomputed layers belong to the backward pass. With a `tensor` axis, sums of activations count
    as gradients.
    """
    scope = collective.scope
    if "adamw.gather" in scope or "muon.gather" in scope:
        return "adamw gather" if "adamw" in scope else "muon gather"
    if "muon." in scope:
        return "muon exchange"
    if collective.opcode in ("all-to-all", "ragged-all-to-all"):
        # Of dispatch, all_to_alls stand in the body of the loop over rounds.
        return "dispatch" if re.search(r"body/(?:\w+/)*all_to_all", scope[-60:]) else "embedding"
    if collective.opcode in ("all-reduce", "reduce-scatter"):
        return "gradients" if collective.bytes > SMALL_BYTES else "other"
    if collective.opcode == "all-gather":
        return "weights backward" if "transpose(" in scope else "weights forward"
    return "other"


def count(text: str) -> dict[str, Any]:
    """What a compiled step sends and multiplies on each device, dispatch taking one round."""
    loops = hlo.unknown_loops(text)
    once = 1 if loops else None
    sent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    listed: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    for collective in hlo.collectives(text, assume_trip_count=once):
        phase = phase_of(collective)
        sent[phase] += collective.wire_bytes
        key = (phase, collective.opcode, collective.dtype, collective.elements)
        entry = listed[*key, collective.group_size, "/".join(collective.scope.split("/")[-2:])]
        entry[0] += collective.executions
        entry[1] += collective.wire_bytes
    keys = ("phase", "opcode", "dtype", "elements", "group", "scope", "times", "bytes")
    rows = [dict(zip(keys, (*key, *entry), strict=True)) for key, entry in listed.items()]
    products = hlo.flops_by_scope(text, assume_trip_count=once)
    newton_schulz = sum(n for scope, n in products.items() if "muon.newton_schulz" in scope)
    return {
        "wire": sent,
        "flops": {
            "model": sum(products.values()) - newton_schulz,
            "newton_schulz": newton_schulz,
        },
        "assumed_once": loops,
        "listed": sorted(rows, key=lambda one: -one["bytes"])[:40],
    }


def expected(
    job: Job, counts: ParameterCounts, matrices: dict[str, tuple[int, ...]]
) -> dict[str, float]:
    """FLOPs per device by formula, nothing computed twice: what the compiled ones are held against.

    "model" is 6 per active parameter and token, the head included, and three times attention's
    forward pass over the lower triangle. "newton_schulz" is an even share of five steps.
    """
    config = job.config
    tokens = job.batch * job.context
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    pairs = tokens * (job.context + 1) / 2
    attention = 3 * 2 * pairs * width * config.num_hidden_layers
    model = 6 * (counts.active + head) * tokens + attention
    return {
        "model": model / job.scale.devices,
        "newton_schulz": newton_schulz_flops(matrices) / job.scale.devices,
        "parameters": counts.total,
        "active": counts.active,
    }


def main(arguments: Sequence[str]) -> None:
    """Print the row of the job that is given as JSON."""
    print(json.dumps(row(Job(**json.loads(arguments[0])))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
