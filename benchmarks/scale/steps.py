"""A whole training step of Moonlight, compiled and counted: the rows of `benchmarks.scale`.

The step is the example's own (`training/steps.py`): a loop over micro-batches of a few
sequences per device, each through forward and backward with recomputed layers in bfloat16, then
clipping, Muon with ZeRO-1, and the routers' biases. Nothing is allocated: arguments are shapes.

`python -m benchmarks.scale.steps '{"target": "cpu-8", ...}'` prints a row as a line of JSON.
`benchmarks.scale` runs it, in a process with `targets.environment`.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.memory import sizes_of
from benchmarks.scale.counts import count
from benchmarks.scale.job import Job, expected
from benchmarks.scale.kept import Kept
from benchmarks.targets import make_mesh
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, MESH_AXES, ModelSharding
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.moonlight import Moonlight, parameter_counts
from examples.moonlight.training.placement import state_shardings
from examples.moonlight.training.steps import TrainState, make_train_steps
from muon_jax import muon


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile: a function, its abstract arguments, and where its results lie.

    Attributes:
      step: the function.
      arguments: of it, abstract.
      out_shardings: of its results.
      compiler_options: what the example tells XLA of such devices.
      matrices: the shapes of Muon's leaves.
    """

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    compiler_options: dict[str, str | bool]
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
        expert_block=scale.expert_block,
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
        (job.micro_batches, scale.devices * scale.sequences, job.context + 1),
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
    places = (shardings, sharding.place())
    return Program(step, (state, tokens_abt), places, sharding.compiler_options, matrices)


def row(job: Job, texts: Path | None = None) -> dict[str, Any]:
    """Compile, and read the program.

    A program that does not fit has no row of bytes and FLOPs, but what the compiler says of it.

    Args:
      job: what to compile.
      texts: a folder of programs that were compiled before, to which this one is added.
    """
    found = dataclasses.asdict(job) | {
        "layers": job.config.num_hidden_layers,
        "devices": job.scale.devices,
        "mesh": dict(zip(MESH_AXES, job.scale.mesh, strict=True)),
        "micro_batches": job.micro_batches,
        "sequences": job.scale.sequences,
        "rounds": job.rounds,
        "memory": job.scale.memory,
    }
    start = time.perf_counter()
    program = build(job)
    kept = Kept.of(job, texts) if texts else None
    if kept is None or not kept.path.exists():
        lowered = program.lower()
        traced = time.perf_counter()
        found["trace_s"] = traced - start
        try:
            compiled = lowered.compile(program.compiler_options)
        except jax.errors.JaxRuntimeError as error:
            if not (said := out_of_memory(str(error))):
                raise
            return found | {"fits": False, "compiler": said}
        found["compile_s"] = time.perf_counter() - traced
        text = compiled.as_text() or ""
        sizes = sizes_of(compiled, job.scale.platform)
        if kept:
            kept.write(text, sizes)
    else:
        text, sizes = kept.read()
    return found | {
        "fits": sum(sizes.values()) <= job.scale.memory,
        "bytes": sizes,
        **count(text, job.scale.chip, job.rounds),
        "expected": expected(job, parameter_counts(job.config), program.matrices),
    }


def out_of_memory(message: str) -> str | None:
    """What the compiler says of a program that is too large, or None."""
    found = re.search(
        r"Used [\d.]+\w of [\d.]+\w \w+(?:\. Exceeded [^.]*\.\w+)?"
        r"|the total memory required for [^.]*\.\w+\) exceeds available HBM \([^)]*\)",
        message,
    )
    return found[0] if found else None


def main(arguments: Sequence[str]) -> None:
    """Print the row of the job that is given as JSON; behind it may stand a folder of texts."""
    texts = Path(arguments[1]) if len(arguments) > 1 else None
    print(json.dumps(row(Job(**json.loads(arguments[0])), texts)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
