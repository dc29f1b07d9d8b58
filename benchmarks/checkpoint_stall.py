"""What a save costs a training: `python -m benchmarks.checkpoint_stall --processes 2`.

A state is trained by steps that are given its memory, and saved now and then: in the old way, where
the training waits until the checkpoint is sealed and has its name, and in that of the example,
where it waits for the copy alone and the rest happens behind its next steps. The steps behind a
save are slower for it, so what counts is what the save adds to all of them, the wait included.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks.harness import environment, make_console, median, write_json
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.processes.agreement import gather
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.retention import Retention

# Devices of all processes together; and how one that this program starts finds the others.
DEVICES = 4
_WORKER = "CHECKPOINT_STALL_WORKER"


@dataclasses.dataclass(frozen=True)
class Args:
    """Seconds that a save takes of a training, waited for and behind it.

    Attributes:
      megabytes: of float32, half of it as the model, half as the optimizer's state.
      processes: among which four devices are divided: 1, 2 or 4.
      repeats: saves of each kind, in turns.
      size: of the matrices that a step multiplies, beside changing all of the state.
      output: where the JSON goes; the number of processes is added to its name.
    """

    megabytes: int = 256
    processes: int = 1
    repeats: int = 5
    size: int = 1024
    output: Path = Path("runs/benchmarks/checkpoint_stall.json")


def main(args: Args) -> dict[str, Any]:
    """Starts the processes, prints and writes what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        _start(args, Path(folder))
        rows = json.loads((Path(folder) / "rows.json").read_text())
    quiet = median(rows["quiet"])
    sizes = {name: x for name, x in dataclasses.asdict(args).items() if name != "output"}
    found: dict[str, Any] = {"quiet_step": quiet, "sizes": sizes}
    table = Table(
        title=f"{args.megabytes} MB, {args.processes} process(es), median of {args.repeats}; "
        f"a step takes {quiet:.3f} s",
        box=None,
    )
    for column in ("", "stall", "next step", "until it is there", "added in all"):
        table.add_column(column, justify="right" if column else "left")
    for way in ("waited for", "behind"):
        saves = rows[way]
        values = {
            "stall": median([save["stall"] for save in saves]),
            "next step": median([save["steps"][0] for save in saves]),
            "until it is there": median([save["there"] for save in saves]),
            "added in all": median(
                [save["stall"] + sum(step - quiet for step in save["steps"]) for save in saves]
            ),
        }
        found[way] = values
        table.add_row(way, *(f"{value:.3f}" for value in values.values()))
    make_console().print(table)
    output = args.output.with_stem(f"{args.output.stem}_{args.processes}")
    write_json(
        output, {"environment": environment("jax", "orbax-checkpoint"), **found, "all": rows}
    )
    return found


def _start(args: Args, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for number in range(args.processes):
        job = {**dataclasses.asdict(args), "number": number, "address": address}
        job |= {"folder": str(folder), "output": ""}
        flag = f"--xla_force_host_platform_device_count={DEVICES // args.processes}"
        setting = {
            _WORKER: json.dumps(job),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "benchmarks.checkpoint_stall"]
        processes.append(subprocess.Popen(command, env=os.environ | setting))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("a process failed, and said why")


def _work(job: dict[str, Any]) -> None:
    """One process's part."""
    if job["processes"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(job["address"], job["processes"], job["number"])
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P("fsdp"))
    rows = job["megabytes"] * 2**20 // 4 // 2 // 1024 // 8

    def draw() -> Any:
        keys = jax.random.split(jax.random.key(0), (2, 8))
        shape = (rows, 1024)
        model, moments = (
            {f"w{i}": jax.random.normal(keys[j, i], shape) for i in range(8)} for j in (0, 1)
        )
        return model, moments, jnp.zeros((8 * job["size"], job["size"]))

    def step(model: Any, moments: Any, x: jax.Array) -> Any:
        x = jnp.tanh(x @ jnp.full((job["size"], job["size"]), 0.01) + 1)
        moments = jax.tree.map(lambda m, w: 0.9 * m + 0.1 * jnp.sin(w), moments, model)
        model = jax.tree.map(lambda w, m: w - 0.01 * m, model, moments)
        return model, moments, x

    state = jax.jit(draw, out_shardings=place)()
    train = jax.jit(step, donate_argnums=(0, 1, 2))

    def train_once() -> float:
        nonlocal state
        started = time.perf_counter()
        state = jax.block_until_ready(train(*state))
        return time.perf_counter() - started

    result: dict[str, list[Any]] = {"quiet": [], "waited for": [], "behind": []}
    for _ in range(3):
        train_once()
    with contextlib.closing(Checkpoints(Path(job["folder"]) / "c", Retention(1))) as checkpoints:
        for number in range(1, 2 * job["repeats"] + 3):
            way = ("waited for", "behind")[number % 2]
            result["quiet"] += [train_once() for _ in range(5)]

            started = time.perf_counter()
            model, moments, _ = state
            checkpoints.save(number, model=model, optimizer=moments, progress={}, val_loss=None)
            del model, moments
            if way == "waited for":
                checkpoints.wait()
            stall = time.perf_counter() - started
            steps = [train_once()]
            # All take the same number of steps, or they would wait for each other.
            while not all(gather(checkpoints.is_idle)):
                steps.append(train_once())
            there = time.perf_counter() - started if way == "behind" else stall
            checkpoints.wait()
            if number > 2:  # the first of each compiles
                result[way].append({"stall": stall, "steps": steps, "there": there})
    if job["number"] == 0:
        (Path(job["folder"]) / "rows.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if _WORKER in os.environ:
        _work(json.loads(os.environ[_WORKER]))
    else:
        CommandLine("benchmarks.checkpoint_stall", Args, __doc__).run(main)
