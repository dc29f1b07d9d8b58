"""What a preset's training takes of one GPU that is not there: `python -m benchmarks.preset`.

The training's own program (`examples/moonlight/train.py`) is compiled for the GPU, see
`benchmarks.targets`, and read: memory is the compiler's account, FLOPs are those of the program's
products, each loop counted as often as it runs. Nothing is run, so there is no time here: the last
line says which share of the GPU's peak a training in so many minutes needs.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

from benchmarks import targets
from examples.moonlight.common.command_line import CommandLine

# Set in the process that compiles.
_INSIDE = "MUON_JAX_COMPILES_FOR"

GIB = 2**30

# TFLOP/s of NVIDIA's data sheet. A T4 has tensor cores for float16, and nothing for bfloat16.
PEAKS = {"t4": {"float32": 8.1}, "h100-8": {"float32": 67.0, "bfloat16": 989.0}}


@dataclasses.dataclass(frozen=True)
class Args:
    """Memory and FLOPs of a preset's training on one device."""

    preset: Literal["tiny", "mini", "small"] = "mini"
    """The architecture and its recipe."""
    target: Literal["cpu", "t4", "h100-8"] = "t4"
    """The device; of h100-8, one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the products."""
    experts: Literal["dense", "ragged"] = "ragged"
    """The experts' route."""
    minutes: float = 20.0
    """How long the training may take."""


def measure(args: Args) -> dict[str, Any]:
    """Compiles a call of the training for the target's first device, and counts.

    Returns:
        `parameters`, `steps`; `bytes` of the device by what holds them; `flops` of a step by whose
        they are: the model's or Newton-Schulz's.
    """
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from benchmarks.hlo.multiplied import flops_by_scope
    from examples.moonlight.training import args as training
    from examples.moonlight.training.job import make_job
    from examples.moonlight.training.learner import make_learner
    from examples.moonlight.training.loop import buffer_shape
    from examples.moonlight.training.steps import make_train_steps

    asked = training.Args(
        Path("nowhere"),
        preset=args.preset,
        compute_dtype=args.compute_dtype,
        experts=args.experts,
        unroll=args.target == "cpu",
    )
    job = make_job(asked)
    learner = make_learner(job, None)
    steps = make_train_steps(
        learner.graphdef,
        learner.optimizer,
        job.plan.learning_rate,
        bias_rate=job.plan.bias_rate,
        on_nonfinite="stop",
        roles=learner.roles,
        monitor=False,
    )
    device = jax.devices()[0] if args.target == "cpu" else targets.devices(_target(args))[0]
    place = SingleDeviceSharding(device)
    tokens = np.zeros(buffer_shape(asked, job.recipe, job.plan), np.int32)
    arguments = (learner.abstract, tokens, np.int32(0), np.int32(1), np.zeros(len(tokens), int))
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=place
        ),
        arguments,
    )
    compiled = jax.jit(steps, donate_argnums=0).lower(*described).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # Two loops have a length that is an argument: steps of a call, and micro-batches of a step.
    found = flops_by_scope(str(compiled.as_text()), assume_trip_count=1)
    orthogonalized = sum(count for scope, count in found.items() if "newton_schulz" in scope)
    return {
        "parameters": learner.counts.total,
        "active": learner.counts.active,
        "steps": job.plan.steps,
        "tokens": job.plan.tokens(job.plan.steps),
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "results beside": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "flops": {"model": sum(found.values()) - orthogonalized, "newton-schulz": orthogonalized},
    }


def _target(args: Args) -> targets.Target:
    name = {"cpu": "cpu-8"}.get(args.target, args.target)
    return targets.T4 if name == "t4" else targets.TARGETS[name]


def lines(args: Args, row: dict[str, Any]) -> list[str]:
    """What is printed of a measurement."""
    held, flops = row["bytes"], row["flops"]
    total = sum(flops.values()) * row["steps"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
    found = [
        f"{args.preset} on {args.target}, {args.compute_dtype}, {args.experts} experts: "
        f"{row['parameters']:,} parameters, "
        f"{row['active']:,} active per token beside embedding and head",
        targets.compiler(_target(args)),
        f"memory: {sum(held.values()) / GIB:.2f} GiB ({parts})",
        f"a step: {flops['model'] / 1e12:.3f} TFLOPs of the model, "
        f"{flops['newton-schulz'] / 1e12:.3f} of Newton-Schulz",
        f"{row['steps']:,} steps, {row['tokens']:,} tokens: {total / 1e12:,.0f} TFLOPs",
    ]
    if peak := PEAKS.get(args.target, {}).get(args.compute_dtype):
        rate = total / 1e12 / (60 * args.minutes)
        found.append(
            f"in {args.minutes:g} minutes: {rate:.2f} TFLOP/s, {rate / peak:.0%} of {peak:g}"
        )
    return found


def main(args: Args) -> None:
    """Compiles in a process with the target's environment, and prints."""
    if _INSIDE not in os.environ and args.target != "cpu":
        if reason := targets.missing(_target(args)):
            raise SystemExit(f"{args.target} {reason}")
        environment = targets.environment(_target(args)) | {_INSIDE: args.target}
        command = [sys.executable, "-m", "benchmarks.preset", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    print(*lines(args, measure(args)), sep="\n")


if __name__ == "__main__":
    CommandLine("benchmarks.preset", Args, __doc__).run(main)
