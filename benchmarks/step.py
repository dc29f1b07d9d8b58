"""Time a whole optimizer step on one device: `python -m benchmarks.step`.

Parameter trees, and four optimizers on each in the same run, timed in turns:

(a) 4 layers of separate d=512 attention and MLP matrices,
(b) 48 such layers at d=128, where program size and compile time tell,
(c) a stack of experts,
(d) GPT-2 small's 48 separate matrices,
(e) one layer of Moonlight-16B's 64 experts.

The last two are large, and run where they are asked for. A step is `update` plus `apply_updates`,
with donated buffers. "compile" counts tracing, lowering and compiling. "temporary" is what the
compiled program allocates besides its arguments and results. "peak" is the share of the matmul
speed, measured in the same run in float32 and in bfloat16, at which the Newton-Schulz products
alone would have taken the whole step: those that `muon_jax` takes, and of the others five steps of
4 m^2 n + 2 m^3 FLOPs, as they take them.
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
from jax import lax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon
from rich.table import Table

from benchmarks.device_clock import WALL, Clocks
from benchmarks.harness import (
    attempt_each,
    environment,
    load_average,
    make_console,
    median,
    time_interleaved,
    write_json,
)
from benchmarks.memory import sizes_of
from benchmarks.model_shapes import gpt2_leaves
from benchmarks.peaks import highest, matmul_peaks, shares_of
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.model.config import MoonlightConfig
from examples.one_thread import available_cores
from muon_jax import muon
from muon_jax._arithmetic import engines
from muon_jax._polynomials import resolve_schedule
from muon_jax._products import at_once, of_iteration, one_by_one
from muon_jax._symmetric import left_out

NS_STEPS = 5
LEARNING_RATE = 3e-4

Case = Literal["a", "b", "c", "d", "e"]
Peer = Literal["muon_jax", "optax", "torch", "adamw"]
PEERS: tuple[Peer, ...] = ("muon_jax", "optax", "torch", "adamw")


@dataclasses.dataclass(frozen=True)
class Args:
    """Whole optimizer steps of muon_jax against optax.contrib.muon, torch.optim.Muon and AdamW.

    Attributes:
      cases: which parameter trees: a, b, c, d, e.
      peers: which optimizers; ratios are to optax.contrib.muon, where it runs.
      repeats: timed steps of each optimizer.
      scale: divides the matrix sizes and the number of layers, for a quick look.
      output: where the JSON goes.
    """

    cases: tuple[Case, ...] = ("a", "b", "c")
    peers: tuple[Peer, ...] = PEERS
    repeats: int = 10
    scale: int = 1
    output: Path = Path("runs/benchmarks/step.json")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer on one case, ready to step.

    Attributes:
      compile_s: tracing, lowering and compiling; None for torch.
      temporary_bytes: what the program allocates besides arguments and results; None for torch.
      step: takes all of a call's passes, and blocks.
      notes: what else the record says of it.
    """

    compile_s: float | None
    temporary_bytes: int | None
    step: Callable[[], Any]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def shapes_of(case: Case, scale: int) -> dict[str, tuple[int, ...]]:
    """The leaves of a case: path -> shape."""
    if case == "d":
        return {
            name: (rows // scale, cols // scale) for name, (rows, cols) in gpt2_leaves().items()
        }
    if case == "e":
        config = MoonlightConfig.preset("moonlight-16b-a3b")
        experts = max(2, config.n_routed_experts // scale)
        width, hidden = config.hidden_size // scale, config.moe_intermediate_size // scale
        wide, tall = (experts, width, hidden), (experts, hidden, width)
        return {"experts/gate_proj": wide, "experts/up_proj": wide, "experts/down_proj": tall}
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


def newton_schulz_flops(shapes: dict[str, tuple[int, ...]], peer: str = "optax") -> int:
    """FLOPs of the products of five quintic steps: 4 m^2 n + 2 m^3 each, m <= n.

    Those of `muon_jax`, which takes two steps at once where that is cheaper, are fewer.
    """
    schedule, total = resolve_schedule("standard", NS_STEPS), 0
    for shape in shapes.values():
        rows, cols = shape[-2:]
        ours = peer == "muon_jax"
        products = of_iteration(schedule, rows, cols) if ours else one_by_one(schedule)
        total += int(np.prod(shape[:-2])) * products.flops(rows, cols)
    return total


def computed_flops(shapes: dict[str, tuple[int, ...]], peer: str) -> int:
    """FLOPs that this process computes: without what `muon_jax` mirrors on processors.

    Which products it mirrors a part of is `muon_jax._symmetric`'s affair.
    """
    total = newton_schulz_flops(shapes, peer)
    known = engines(jnp.dtype(jnp.bfloat16))
    if peer != "muon_jax" or not known.get(jax.default_backend(), known["default"]).mirrors:
        return total
    for shape in shapes.values():
        short, long = sorted(shape[-2:])
        taken = at_once(resolve_schedule("standard", NS_STEPS), short, long)
        squares = sum(len(steps) == 1 for steps in taken)
        lengths = len(taken) * long * left_out(short, long)
        lengths += squares * short * left_out(short, short)
        total -= int(np.prod(shape[:-2])) * round(2 * short * short * lengths)
    return total


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Gaussian leaves at a weight's scale, the same in every run."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}


def jax_candidate(
    tx: optax.GradientTransformation, values: dict[str, np.ndarray], passes: int = 1
) -> Candidate:
    """Compile a step of an Optax optimizer, or several in one program, with donated buffers."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def steps(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        def one(_: Any, held: tuple[Any, Any]) -> tuple[Any, Any]:
            return step(*held, grads)

        return lax.fori_loop(0, passes, one, (params, state))

    params = jax.tree.map(jnp.asarray, values)
    grads = jax.tree.map(jnp.asarray, values)
    state = tx.init(params)
    start = time.perf_counter()
    call = step if passes == 1 else steps
    compiled = jax.jit(call, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    compile_s = time.perf_counter() - start
    held = [params, state]

    def run() -> None:
        held[:] = compiled(held[0], held[1], grads)
        jax.block_until_ready(held)

    temporary = sizes_of(compiled, jax.default_backend())["temporaries"]
    return Candidate(compile_s, temporary, run)


def torch_candidate(values: dict[str, np.ndarray], passes: int = 1) -> Candidate:
    """torch.optim.Muon, to which a stack is as many matrices.

    On CPU it has as many threads as there are processors; on a GPU `torch.compile` compiles it.
    """
    import torch

    torch.set_num_threads(available_cores())
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    leaves = []
    for value in values.values():
        for matrix in value.reshape(-1, *value.shape[-2:]):
            leaf = torch.nn.Parameter(torch.tensor(matrix, device=device))
            leaf.grad = torch.tensor(matrix, device=device)
            leaves.append(leaf)
    optimizer = torch.optim.Muon(
        leaves, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    step = torch.compile(optimizer.step) if on_gpu else optimizer.step

    def run() -> None:
        for _ in range(passes):
            step()
        if on_gpu:
            torch.cuda.synchronize()

    return Candidate(None, None, run, {"torch_compile": on_gpu})


def candidate(peer: Peer, values: dict[str, np.ndarray], passes: int = 1) -> Candidate:
    """One optimizer with Moonlight's settings, ready to step."""
    if peer == "torch":
        return torch_candidate(values, passes)
    if peer == "muon_jax":
        return jax_candidate(muon(LEARNING_RATE), values, passes)
    if peer == "adamw":
        tx = optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=0.1)
        return jax_candidate(tx, values, passes)
    numbers = {name: MuonDimensionNumbers(-2, -1) for name in values}
    tx = optax_muon(
        LEARNING_RATE,
        weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )
    return jax_candidate(tx, values, passes)


def add_shares(found: dict[str, Any], peaks: dict[str, float]) -> None:
    """Puts into each row of a result the share of the peaks that Newton-Schulz alone would be."""
    for row in found["optimizers"].values():
        if "error" not in row:
            flops = row["newton_schulz_flops"]
            row["share_of_peak"] = flops and shares_of(flops, row["step_s"], peaks)


def measure(
    shapes: dict[str, tuple[int, ...]],
    peers: tuple[Peer, ...] = PEERS,
    repeats: int = 10,
    passes: int = 1,
    clocks: Clocks = WALL,
) -> dict[str, Any]:
    """Build, time and describe every optimizer on one tree.

    Args:
      shapes: path -> shape.
      peers: which optimizers.
      repeats: timed calls of each.
      passes: steps in one dispatch.
      clocks: how both sides are timed.
    """
    values = arrays(shapes)
    built, failed = attempt_each(
        {peer: lambda peer=peer: candidate(peer, values, passes) for peer in peers},
        lambda candidate: candidate.step(),
    )
    seconds = time_interleaved(
        {peer: c.step for peer, c in built.items()}, repeats, warmups=0, clocks=clocks.of(built)
    )
    rows: dict[str, dict[str, Any]] = {peer: {"error": said} for peer, said in failed.items()}
    for peer, c in built.items():
        each = [s / passes for s in seconds[peer]]
        rows[peer] = {
            "step_s": median(each),
            "step_s_all": each,
            "compile_s": c.compile_s,
            "temporary_bytes": c.temporary_bytes,
            "newton_schulz_flops": None if peer == "adamw" else computed_flops(shapes, peer),
            **c.notes,
        }
    reference = rows.get("optax", {})
    for peer in built:
        for key in ("step_s", "compile_s"):
            known = reference.get(key) is not None and rows[peer][key] is not None
            rows[peer][f"{key}_to_optax"] = rows[peer][key] / reference[key] if known else None
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    return {
        "leaves": len(shapes),
        "parameters": parameters,
        "optimizers": {peer: rows[peer] for peer in peers},
    }


TITLES = {
    "a": "(a) separate attention and MLP matrices, d=512",
    "b": "(b) many small layers, d=128",
    "c": "(c) a stack of experts",
    "d": "(d) GPT-2 small's separate matrices",
    "e": "(e) a layer of Moonlight-16B's experts",
}


def table_of(case: Case, result: dict[str, Any], scale: int) -> Table:
    """The result as a table."""
    title = TITLES[case] + (f", sizes divided by {scale}" if scale > 1 else "")
    table = Table(
        title=f"{title}: {result['leaves']} leaves, {result['parameters'] / 1e6:.1f}M parameters",
        title_justify="left",
    )
    columns = ("optimizer", "step", "to optax", "compile", "to optax", "temporary")
    for column in (*columns, "peak float32", "bfloat16"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")

    def show(value: float | None, form: str, factor: float = 1.0, unit: str = "") -> str:
        return "-" if value is None else format(value * factor, form) + unit

    for peer, row in result["optimizers"].items():
        if "error" in row:
            table.add_row(peer, row["error"])
            continue
        shares = row["share_of_peak"] or {}
        table.add_row(
            peer,
            show(row["step_s"], ".1f", 1e3, " ms"),
            show(row["step_s_to_optax"], ".2f", unit="x"),
            show(row["compile_s"], ".2f", unit=" s"),
            show(row["compile_s_to_optax"], ".2f", unit="x"),
            show(row["temporary_bytes"], ".1f", 1e-6, " MB"),
            show(shares.get("float32"), ".0%"),
            show(shares.get("bfloat16"), ".0%"),
        )
    return table


def main(args: Args) -> dict[str, Any]:
    """Run the benchmark, print its tables, write its JSON."""
    console = make_console()
    load = load_average(console)
    versions = ["jax", "jaxlib", "optax", *(["torch"] if "torch" in args.peers else [])]
    record: dict[str, Any] = {
        "environment": environment(*versions),
        "load_average": load,
        "scale": args.scale,
        "matmul_peak_flops": {},
        "cases": {},
    }
    device = record["environment"]["device"]
    measured = []
    for case in args.cases:
        with console.status(f"case {case}: compiling and timing {', '.join(args.peers)}"):
            shapes = shapes_of(case, args.scale)
            measured.append(matmul_peaks())
            record["cases"][case] = measure(shapes, args.peers, args.repeats)
    record["matmul_peak_flops"] = peaks = highest(*measured, matmul_peaks())
    for case, found in record["cases"].items():
        add_shares(found, peaks)
        console.print(table_of(case, found, args.scale))
    shown = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {name}" for name, peak in peaks.items())
    console.print(f"{device}, matmul peak {shown}")
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.step", Args, __doc__, keeps_programs=False).run(main)
