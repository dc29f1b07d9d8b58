"""Time a whole optimizer step on one device: `python -m benchmarks.step`.

Three parameter trees, four optimizers in the same run, timed in turns:

(a) 4 layers of separate d=512 attention and MLP matrices,
(b) 48 such layers at d=128, where program size and compile time tell,
(c) a stack of experts.

A step is `update` plus `apply_updates`, with donated buffers. "compile" counts tracing, lowering
and compiling. "temporary" is what the compiled program allocates besides its arguments and
results. "peak" is the share of the matmul speed, measured in the same run, at which the
Newton-Schulz products alone (five steps of 4 m^2 n + 2 m^3 FLOPs) would have taken the whole step.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon
from rich.console import Console
from rich.table import Table

from benchmarks.harness import environment, matmul_peak, median, time_interleaved, write_json
from examples.one_thread import available_cores
from muon_jax import muon

NS_STEPS = 5
LEARNING_RATE = 3e-4

Case = Literal["a", "b", "c"]
Peer = Literal["muon_jax", "optax", "torch", "adamw"]


@dataclasses.dataclass(frozen=True)
class Args:
    """Whole optimizer steps of muon_jax against optax.contrib.muon, torch.optim.Muon and AdamW.

    Attributes:
      cases: which parameter trees: a, b, c.
      peers: which optimizers; ratios are to optax.contrib.muon, where it runs.
      repeats: timed steps of each optimizer.
      scale: divides the matrix sizes and the number of layers, for a quick look.
      output: where the JSON goes.
    """

    cases: tuple[Case, ...] = ("a", "b", "c")
    peers: tuple[Peer, ...] = ("muon_jax", "optax", "torch", "adamw")
    repeats: int = 10
    scale: int = 1
    output: Path = Path("runs/benchmarks/step.json")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer's step on one case: how long it took to build, and how to run it."""

    compile_s: float | None
    temporary_bytes: int | None
    step: Callable[[], Any]


def shapes_of(case: Case, scale: int) -> dict[str, tuple[int, ...]]:
    """The leaves of a case: path -> shape."""
    if case == "c":
        experts, width, hidden = max(2, 64 // scale), 256 // scale, 512 // scale
        return {
            "experts/up_proj": (experts, width, hidden),
            "experts/down_proj": (experts, hidden, width),
        }
    layers, width = (
        (max(1, 4 // scale), 512 // scale) if case == "a" else (48 // scale, 128 // scale)
    )
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    mlp = {"up_proj": (width, 4 * width), "down_proj": (4 * width, width)}
    return {f"{i}/{name}": shape for i in range(layers) for name, shape in (square | mlp).items()}


def newton_schulz_flops(shapes: dict[str, tuple[int, ...]]) -> int:
    """FLOPs of the products of five quintic steps: 4 m^2 n + 2 m^3 each, m <= n."""
    total = 0
    for shape in shapes.values():
        rows, cols = sorted(shape[-2:])
        matrices = int(np.prod(shape[:-2]))
        total += matrices * NS_STEPS * (4 * rows * rows * cols + 2 * rows**3)
    return total


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Gaussian leaves at a weight's scale, the same in every run."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}


def jax_candidate(tx: optax.GradientTransformation, values: dict[str, np.ndarray]) -> Candidate:
    """Compile a step of an Optax optimizer, with donated parameters and state."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, values)
    grads = jax.tree.map(jnp.asarray, values)
    state = tx.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    compile_s = time.perf_counter() - start
    held = [params, state]

    def run() -> None:
        held[:] = compiled(held[0], held[1], grads)
        jax.block_until_ready(held)

    memory = compiled.memory_analysis()
    return Candidate(compile_s, memory.temp_size_in_bytes if memory else None, run)


def torch_candidate(values: dict[str, np.ndarray]) -> Candidate:
    """torch.optim.Muon on as many threads as there are processors; stacks become its matrices."""
    import torch

    torch.set_num_threads(available_cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = []
    for value in values.values():
        for matrix in value.reshape(-1, *value.shape[-2:]):
            leaf = torch.nn.Parameter(torch.tensor(matrix, device=device))
            leaf.grad = torch.tensor(matrix, device=device)
            leaves.append(leaf)
    optimizer = torch.optim.Muon(
        leaves, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True
    )

    def run() -> None:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Candidate(None, None, run)


def candidate(peer: Peer, values: dict[str, np.ndarray]) -> Candidate:
    """One optimizer with Moonlight's settings, ready to step."""
    if peer == "torch":
        return torch_candidate(values)
    if peer == "muon_jax":
        return jax_candidate(muon(LEARNING_RATE), values)
    if peer == "adamw":
        return jax_candidate(optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=0.1), values)
    numbers = {name: MuonDimensionNumbers(-2, -1) for name in values}
    tx = optax_muon(
        LEARNING_RATE,
        weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )
    return jax_candidate(tx, values)


def measure(case: Case, args: Args, peak: float) -> dict[str, Any]:
    """Build, time and describe every optimizer on one case."""
    shapes = shapes_of(case, args.scale)
    values = arrays(shapes)
    flops = newton_schulz_flops(shapes)
    built = {peer: candidate(peer, values) for peer in args.peers}
    seconds = time_interleaved({peer: c.step for peer, c in built.items()}, args.repeats)
    rows: dict[str, dict[str, Any]] = {}
    for peer, c in built.items():
        rows[peer] = {
            "step_s": median(seconds[peer]),
            "step_s_all": seconds[peer],
            "compile_s": c.compile_s,
            "temporary_bytes": c.temporary_bytes,
            "share_of_peak": None if peer == "adamw" else flops / median(seconds[peer]) / peak,
        }
    reference = rows.get("optax")
    for row in rows.values():
        for key in ("step_s", "compile_s"):
            row[f"{key}_to_optax"] = (
                row[key] / reference[key] if reference and row[key] is not None else None
            )
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    return {
        "leaves": len(shapes),
        "parameters": parameters,
        "newton_schulz_flops": flops,
        "optimizers": rows,
    }


TITLES = {
    "a": "(a) separate attention and MLP matrices, d=512",
    "b": "(b) many small layers, d=128",
    "c": "(c) a stack of experts",
}


def table_of(case: Case, result: dict[str, Any], scale: int) -> Table:
    """The result as a table."""
    title = TITLES[case] + (f", sizes divided by {scale}" if scale > 1 else "")
    table = Table(
        title=f"{title}: {result['leaves']} leaves, {result['parameters'] / 1e6:.1f}M parameters",
        title_justify="left",
    )
    for column in ("optimizer", "step", "to optax", "compile", "to optax", "temporary", "peak"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")

    def show(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    for peer, row in result["optimizers"].items():
        table.add_row(
            peer,
            show(row["step_s"], ".1f", 1e3) + " ms",
            show(row["step_s_to_optax"], ".2f") + ("x" if row["step_s_to_optax"] else ""),
            show(row["compile_s"], ".2f") + (" s" if row["compile_s"] else ""),
            show(row["compile_s_to_optax"], ".2f") + ("x" if row["compile_s_to_optax"] else ""),
            show(row["temporary_bytes"], ".1f", 1e-6)
            + (" MB" if row["temporary_bytes"] is not None else ""),
            show(row["share_of_peak"], ".0%"),
        )
    return table


def main(args: Args) -> dict[str, Any]:
    """Run the benchmark, print its tables, write its JSON."""
    console = Console()
    with console.status("measuring the matmul peak"):
        peak = matmul_peak()
    versions = ["jax", "jaxlib", "optax", *(["torch"] if "torch" in args.peers else [])]
    record: dict[str, Any] = {
        "environment": environment(*versions),
        "scale": args.scale,
        "matmul_peak_flops": peak,
        "cases": {},
    }
    device = record["environment"]["device"]
    console.print(f"{device}, matmul peak {peak / 1e9:.0f} GFLOP/s")
    for case in args.cases:
        with console.status(f"case {case}: compiling and timing {', '.join(args.peers)}"):
            record["cases"][case] = measure(case, args, peak)
        console.print(table_of(case, record["cases"][case], args.scale))
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args))
