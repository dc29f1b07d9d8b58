"""Time what reading roles from a program costs: `python -m benchmarks.roles`.

`by_use` traces the loss and follows its parameters. Beside it stands the trace alone, in turns.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.harness import environment, make_console, median, time_interleaved, write_json
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.training.routing import abstract_loss
from muon_jax import by_use

Program = tuple[Callable[..., Any], *tuple[Any, ...]]
"""A loss, its parameters and the rest of its arguments, with shapes only."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Seconds to trace a loss, and to read the roles of its parameters.

    Attributes:
      repeats: how often each is timed, in turns.
      output: where the JSON goes.
    """

    repeats: int = 5
    output: Path = Path("runs/benchmarks/roles.json")


def residual_layers(count: int) -> Program:
    """So many matrices one after another, each a leaf of its own."""

    def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
        *layers, head = params
        for layer in layers:
            x = x + jnp.tanh(x @ layer)
        return jnp.mean(jnp.square(x @ head))

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return loss, [square] * count, jax.ShapeDtypeStruct((8, 64), jnp.float32)


def programs() -> dict[str, Program]:
    """What is read."""
    config = MoonlightConfig.preset("moonlight-16b-a3b")
    return {
        "Moonlight-16B, layers scanned": abstract_loss(config, Execution(experts="ragged")),
        "Moonlight-16B, layers unrolled": abstract_loss(
            config, Execution(experts="ragged", unroll=True)
        ),
        "1,600 matrices, unrolled": residual_layers(1600),
    }


def main(args: Args) -> dict[str, Any]:
    """Time all programs, print and write the seconds."""
    table = Table(title=f"seconds, median of {args.repeats}", title_justify="left", box=None)
    for column in ("", "parameters", "the trace alone", "by_use", "to the trace"):
        table.add_column(column, justify="right" if column else "left")
    results = {}
    for name, (loss, params, *batch) in programs().items():
        calls = {
            # A function of its own each time: JAX keeps the trace of one that it knows.
            "trace": lambda loss=loss, params=params, batch=batch: jax.make_jaxpr(
                lambda *operands: loss(*operands)
            )(params, *batch),
            "by_use": lambda loss=loss, params=params, batch=batch: by_use(loss, params, *batch),
        }
        seconds = time_interleaved(calls, args.repeats)
        trace, reading = (median(seconds[call]) for call in calls)
        leaves = len(jax.tree.leaves(params))
        results[name] = {"parameters": leaves, "seconds": seconds}
        ratio = f"{reading / trace:.2f}x"
        table.add_row(name, f"{leaves:,}", f"{trace:.2f}", f"{reading:.2f}", ratio)
    make_console().print(table)
    record = {"environment": environment("jax", "flax"), "programs": results}
    write_json(args.output, record)
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.roles", Args, __doc__).run(main)
