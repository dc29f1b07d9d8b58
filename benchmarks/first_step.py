"""How long a new process waits for an optimizer's first step: `python -m benchmarks.first_step`.

The cases of `benchmarks.step`. From parameters and gradients in NumPy to the end of the first
step: the optimizer's initial state, tracing, compiling and the step itself. Each figure is that of
a process of its own: one that finds nothing compiled, and one behind it that loads what the first
has left in JAX's persistent cache (every program; by itself JAX keeps those that took a second).
Processor seconds are the process' own and say more than the clock where others compute as well.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks import step, targets
from benchmarks.harness import check_known, environment, load_average, make_console, write_json
from examples.moonlight.common.command_line import CommandLine

HEADS = ("compiled anew", "processor", "loaded", "processor", "of the new one")


@dataclasses.dataclass(frozen=True)
class Args:
    """Seconds to an optimizer's first step, with and without the persistent cache.

    Attributes:
      cases: which parameter trees: a, b, c, d, e.
      peers: which optimizers: muon_jax, optax, adamw.
      repeats: processes of each kind; the median is shown.
      scale: divides the matrix sizes and the number of layers, for a quick look.
      output: where the JSON goes.
    """

    cases: tuple[step.Case, ...] = ("a", "b", "c")
    peers: tuple[step.Peer, ...] = ("muon_jax", "optax", "adamw")
    repeats: int = 3
    scale: int = 1
    output: Path = Path("runs/benchmarks/first_step.json")


def wait(case: step.Case, peer: step.Peer, scale: int) -> dict[str, float]:
    """What this process waits for its first step, in seconds."""
    values = step.arrays(step.shapes_of(case, scale))
    jax.block_until_ready(jnp.zeros(()))  # starts the backend
    start, spent = time.perf_counter(), time.process_time()
    step.candidate(peer, values).step()
    return {"seconds": time.perf_counter() - start, "processor": time.process_time() - spent}


def in_a_process(case: step.Case, peer: step.Peer, scale: int, cache: Path) -> dict[str, float]:
    """The same in a process of its own, with programs from and to this folder.

    Raises:
      RuntimeError: it ended badly; with the end of what it wrote.
    """
    variables = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    asked = json.dumps({"case": case, "peer": peer, "scale": scale})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_step", asked],
        cwd=targets.ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{case}, {peer}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: step.Case, peer: step.Peer, args: Args) -> dict[str, dict[str, float]]:
    """A new process' wait and a second one's, that of the median clock of the repeats."""
    found: dict[str, list[dict[str, float]]] = {"new": [], "loaded": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind in found:
                found[kind].append(in_a_process(case, peer, args.scale, Path(folder)))
    return {
        kind: sorted(waits, key=lambda one: one["seconds"])[len(waits) // 2]
        for kind, waits in found.items()
    }


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print and write."""
    check_known(args.cases, get_args(step.Case))
    check_known(args.peers, [peer for peer in step.PEERS if peer != "torch"])
    console = make_console()
    load = load_average(console)
    table = Table(title="seconds to the first step", title_justify="left", box=None)
    for column in ("case", "optimizer", *HEADS):
        justify = "left" if column in ("case", "optimizer") else "right"
        table.add_column(column, justify=justify)
    rows = []
    for case in args.cases:
        for peer in args.peers:
            with console.status(f"({case}), {peer}"):
                row = {"case": case, "peer": peer, **measure(case, peer, args)}
            rows.append(row)
            new, loaded = row["new"], row["loaded"]
            figures = (new["seconds"], new["processor"], loaded["seconds"], loaded["processor"])
            share = f"{loaded['seconds'] / new['seconds']:.2f}x"
            table.add_row(f"({case})", peer, *(f"{x:.2f}" for x in figures), share)
    console.print(table)
    record = {"environment": environment("jax", "jaxlib", "optax"), "load": load}
    write_json(args.output, record | {"scale": args.scale, "repeats": args.repeats, "rows": rows})
    console.print(f"written to {args.output}")
    return rows


def start(words: Sequence[str]) -> None:
    """The command, or one of its processes, which is asked in JSON."""
    if len(words) == 1 and words[0].startswith("{"):
        print(json.dumps(wait(**json.loads(words[0]))), flush=True)
        return
    CommandLine("benchmarks.first_step", Args, __doc__).run(main)


if __name__ == "__main__":
    start(sys.argv[1:])
