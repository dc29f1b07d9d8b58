"""Time the compilation of a sharded step: `python -m benchmarks.compile_time`.

The whole training step of `benchmarks.wire`, 48 separate layers on eight virtual CPU devices, with
muon_jax and with `optax.contrib.muon` whose state is sharded the same way. Its program holds one
Newton-Schulz iteration for each matrix, with collectives inside; muon_jax's one for each shape.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import targets
from benchmarks.harness import environment, write_json
from benchmarks.wire.cases import CASES, Optimizer
from benchmarks.wire.steps import build

PEERS: tuple[Optimizer, ...] = ("muon_jax", "optax muon")
TARGET = targets.TARGETS["cpu-8"]


@dataclasses.dataclass(frozen=True)
class Args:
    """Seconds to compile a sharded training step.

    Attributes:
      case: a set of matrices, see wire/cases.py.
      output: where the JSON goes.
    """

    case: str = "many"
    output: Path = Path("runs/benchmarks/compile_time.json")


def main(args: Args) -> dict[str, float]:
    """Compile both, print and write the seconds."""
    console = Console()
    case = CASES[args.case]
    mesh = targets.make_mesh(TARGET, TARGET.mesh, ("data",))
    seconds, lengths = {}, {}
    for peer in PEERS:
        with console.status(f"{peer}: compiling {case.title} for eight CPU devices"):
            program = build(case, peer, mesh)
            start = time.perf_counter()
            lengths[peer] = len(program.compiled_text())
            seconds[peer] = time.perf_counter() - start
    table = Table(title=f"{case.title}, eight CPU devices", title_justify="left")
    for column in ("optimizer", "trace and compile", "to optax", "program"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for peer in PEERS:
        ratio = seconds[peer] / seconds["optax muon"]
        length = f"{lengths[peer] / 1e6:.1f} MB of HLO"
        table.add_row(peer, f"{seconds[peer]:.1f} s", f"{ratio:.2f}x", length)
    console.print(table)
    record = {"environment": environment("jax", "jaxlib", "optax"), "seconds": seconds}
    write_json(args.output, record | {"hlo_characters": lengths})
    console.print(f"written to {args.output}")
    return seconds


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    if jax.device_count() < TARGET.devices:  # they are made when JAX starts
        command = [sys.executable, "-m", "benchmarks.compile_time", *sys.argv[1:]]
        os.execve(sys.executable, command, targets.environment(TARGET))
    main(arguments)
