"""Time the example's training step against transformers: `python -m benchmarks.train`.

The same weights on the same batch, in float32, on equally many threads: our models as
`examples.moonlight.train` runs them, and transformers' `DeepseekV3ForCausalLM`, `LlamaForCausalLM`
and `Qwen2ForCausalLM` in torch, not compiled, trained with torch's own Muon and AdamW. Both sides
are timed in turns in one run. Before that they train for a few steps, and their losses must agree.

"forward" is the loss without what a backward pass needs, "backward" what the loss with all its
gradients takes longer than that, "update" clipping and the optimizer; "step" is timed as a whole.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.harness import (
    environment,
    limit_threads,
    load_average,
    make_console,
    median,
    time_interleaved,
    write_json,
)
from benchmarks.train.ours import Family, Optimizer, Ours, config_of
from benchmarks.train.theirs import Theirs
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.language_model import count_parameters
from examples.one_thread import available_cores

# Steps that both sides take first. Their losses before the first update differ by rounding; later
# by what bfloat16 in Newton-Schulz and a token sent to another expert make of it.
CHECKED_STEPS = 3
FIRST_LOSS_TOLERANCE, LATER_LOSS_TOLERANCE = 1e-5, 2e-3


@dataclasses.dataclass(frozen=True)
class Args:
    """The example's training step against the same model in transformers, on torch.

    Attributes:
      families: moonlight (DeepseekV3ForCausalLM), llama, qwen2; the dense ones have Moonlight's
        width, depth and vocabulary.
      optimizers: which optimizers; each is Muon, or AdamW, on both sides.
      preset: size of the Moonlight.
      batch_size: sequences in a batch.
      sequence_length: tokens that the model reads of each.
      threads: processors for both sides, as `taskset` would give them; by default all that this
        process may use.
      repeats: how often each part is timed; figures are medians.
      output: where the JSON goes.
    """

    families: tuple[Family, ...] = ("moonlight", "llama", "qwen2")
    optimizers: tuple[Optimizer, ...] = ("muon", "adamw")
    preset: str = "tiny"
    batch_size: int = 8
    sequence_length: int = 128
    threads: int | None = None
    repeats: int = 15
    output: Path = Path("runs/benchmarks/train.json")


def check_losses(ours: Ours, theirs: Theirs, optimizer: Optimizer) -> dict[str, list[float]]:
    """Trains both sides for a few steps.

    Returns:
      Each side's losses.

    Raises:
      RuntimeError: they do not agree.
    """
    theirs.reset()
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    for step in range(CHECKED_STEPS):
        for side, calls in (("ours", ours.calls), ("theirs", theirs.calls)):
            losses[side].append(calls[f"step {optimizer}"]())
        tolerance = LATER_LOSS_TOLERANCE if step else FIRST_LOSS_TOLERANCE
        a, b = losses["ours"][-1], losses["theirs"][-1]
        if not abs(a - b) <= tolerance * abs(b):
            raise RuntimeError(
                f"step {step + 1} with {optimizer}: our loss is {a:.6f}, theirs {b:.6f}; the two "
                "sides do not train the same model"
            )
    return losses


def measure(config: ModelConfig, args: Args) -> dict[str, Any]:
    """Builds both sides of one model, checks that they agree, and times their parts in turns."""
    shape = (args.batch_size, args.sequence_length + 1)
    tokens_bt = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    ours = Ours(config, tokens_bt, args.optimizers)
    theirs = Theirs(config, ours.params, ours.bias, tokens_bt, args.optimizers)
    losses = {name: check_losses(ours, theirs, name) for name in args.optimizers}
    theirs.calls["gradient"]()  # leaves the gradients that the updates take
    calls = {
        f"{side}: {part}": call
        for part in ours.calls
        for side, call in (("ours", ours.calls[part]), ("theirs", theirs.calls[part]))
    }
    seconds = time_interleaved(calls, args.repeats)
    parts: dict[str, dict[str, Any]] = {}
    for part in ours.calls:
        a, b = (median(seconds[f"{side}: {part}"]) for side in ("ours", "theirs"))
        parts[part] = {
            "ours_s": a,
            "theirs_s": b,
            "speedup": b / a,
            "ours_s_all": seconds[f"ours: {part}"],
            "theirs_s_all": seconds[f"theirs: {part}"],
        }
    tokens = args.batch_size * args.sequence_length
    return {
        "config": dataclasses.asdict(config),
        "parameters": count_parameters(ours.model)._asdict(),
        "class": type(theirs.model).__name__,
        "their_routes": theirs.routes,
        "losses": losses,
        "compile_s": ours.compile_seconds,
        "tokens_per_step": tokens,
        "tokens_per_second": {
            name: {side: tokens / parts[f"step {name}"][f"{side}_s"] for side in ("ours", "theirs")}
            for name in args.optimizers
        },
        "parts": parts,
    }


def table_of(result: dict[str, Any], args: Args) -> Table:
    """The result of one model as a table."""
    routes = ", ".join(f"{name} {route}" for name, route in result["their_routes"].items())
    table = Table(
        title=f"{result['class']} ({routes}), {result['parameters']['total'] / 1e6:.2f}M "
        f"parameters, batch {args.batch_size} x {args.sequence_length}",
        title_justify="left",
    )
    for column in ("part", "ours", "transformers", "speedup"):
        table.add_column(column, justify="left" if column == "part" else "right")
    forward, gradient = (result["parts"][name] for name in ("forward", "gradient"))
    backward = {side: gradient[side] - forward[side] for side in ("ours_s", "theirs_s")}
    rows = {"forward": forward, "backward": backward}
    rows |= {name: row for name, row in result["parts"].items() if " " in name}
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{row[side] * 1e3:.1f} ms" for side in backward),
            f"{row['theirs_s'] / row['ours_s']:.2f}x",
        )
    for name, rates in result["tokens_per_second"].items():
        table.add_row(f"tokens/s, {name}", *(f"{rate:,.0f}" for rate in rates.values()))
    return table


def main(args: Args, moonlight: MoonlightConfig | None = None) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes its JSON.

    Args:
      args: The command line's arguments.
      moonlight: An architecture in the place of the preset's.
    """
    if args.threads is not None:
        limit_threads(args.threads)  # before the first computation, which starts XLA's threads
    console = make_console()
    moonlight = moonlight or MoonlightConfig.preset(args.preset)
    load = load_average(console)
    record: dict[str, Any] = {
        "environment": environment("jax", "jaxlib", "flax", "optax", "torch", "transformers"),
        "threads": available_cores(),
        "load_average": load,
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "repeats": args.repeats,
        "families": {},
    }
    console.print(f"{record['environment']['processor']}, {record['threads']} threads each")
    for family in args.families:
        with console.status(f"{family}: compiling, checking and timing"):
            record["families"][family] = measure(config_of(family, moonlight), args)
        console.print(table_of(record["families"][family], args))
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.train", Args, __doc__, keeps_programs=False).run(main)
