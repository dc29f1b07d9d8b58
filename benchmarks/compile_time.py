"""Time the compilation of a sharded step: `python -m benchmarks.compile_time`.

The whole training step of `benchmarks.wire`, 48 separate layers on eight virtual CPU devices, with
muon_jax and with `optax.contrib.muon` whose state is sharded the same way. Its program holds one
Newton-Schulz iteration for each matrix, with collectives inside; muon_jax's one for each shape.

``--target v5e-8 --case separate`` compiles for eight TPU chips, which need not be there. Processor
seconds are this process's own, and say more than the clock where others compute as well.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

from rich.table import Table

from benchmarks import targets
from benchmarks.harness import check_known, environment, make_console, write_json
from benchmarks.wire.cases import CASES, Optimizer
from benchmarks.wire.steps import MESH_AXES, build
from examples.moonlight.common.command_line import CommandLine

PEERS: tuple[Optimizer, ...] = ("muon_jax", "optax muon", "adamw")

STARTED = "MUON_JAX_COMPILE_TIME"
"""The variable that says that this process has its target's environment."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Seconds to compile a sharded training step.

    Attributes:
      case: a set of matrices, see wire/cases.py.
      target: the machine to compile for: cpu-8, v5e-8, v5e-256 and so on.
      output: where the JSON goes.
    """

    case: str = "many"
    target: str = "cpu-8"
    output: Path = Path("runs/benchmarks/compile_time.json")


def main(args: Args) -> dict[str, float]:
    """Compile both, print and write the seconds."""
    console = make_console()
    case, target = CASES[args.case], targets.TARGETS[args.target]
    mesh = targets.make_mesh(target, target.mesh, MESH_AXES[len(target.mesh)])
    seconds, processor, lengths = {}, {}, {}
    for peer in PEERS:
        with console.status(f"{peer}: compiling {case.title} for {target.name}"):
            program = build(case, peer, mesh)
            start, spent = time.perf_counter(), time.process_time()
            lengths[peer] = len(program.compiled_text())
            seconds[peer] = time.perf_counter() - start
            processor[peer] = time.process_time() - spent
    title = f"{case.title}, {target.name}, {targets.compiler(target)}"
    table = Table(title=title, title_justify="left")
    for column in ("optimizer", "trace and compile", "processor", "to optax", "program"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for peer in PEERS:
        ratio = processor[peer] / processor["optax muon"]
        length = f"{lengths[peer] / 1e6:.1f} MB of HLO"
        times = (f"{seconds[peer]:.1f} s", f"{processor[peer]:.1f} s", f"{ratio:.2f}x")
        table.add_row(peer, *times, length)
    console.print(table)
    versions = environment("jax", "jaxlib", "optax") | targets.compiler_versions()
    record = {"environment": versions, "case": args.case, "target": target.name}
    record |= {"seconds": seconds, "processor_seconds": processor, "hlo_characters": lengths}
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return seconds


def start(arguments: Args) -> None:
    """Runs `main` in a process whose JAX compiles for the target."""
    check_known([arguments.case], CASES)
    check_known([arguments.target], targets.TARGETS)
    wanted = targets.TARGETS[arguments.target]
    if reason := targets.missing(wanted):
        raise SystemExit(f"{wanted.name} {reason}")
    if STARTED not in os.environ:  # JAX reads its environment when it starts
        command = [sys.executable, "-m", "benchmarks.compile_time", *sys.argv[1:]]
        os.execve(sys.executable, command, targets.environment(wanted) | {STARTED: "1"})
    main(arguments)


if __name__ == "__main__":
    CommandLine("benchmarks.compile_time", Args, __doc__).run(start)
