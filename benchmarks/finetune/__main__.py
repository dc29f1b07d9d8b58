"""Time fine-tuning with LoRA against peft: `python -m benchmarks.finetune`.

The same base, first factors, rows, rank, float32, optimizer and number of threads: the step that
`examples.finetune.sft` runs, and peft's adapters on transformers' Qwen2 in torch, not compiled.
Each side has a process of its own, and blocks of their steps alternate. Compilation and the first
step of each block are not timed. Before that both take a few steps, and their losses must agree.

Peak memory is a whole process's: libraries, reading the model, and compilation are in it.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from benchmarks.finetune.base import write_base
from benchmarks.finetune.work import Optimizer, Side, Work
from benchmarks.harness import environment, limit_threads, load_average, median, write_json
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.model.dense import DenseConfig
from examples.one_thread import available_cores

# Steps that both sides take first. Their first losses differ by rounding, and later ones by what
# bfloat16 in Newton-Schulz makes of it; measured 5e-6.
CHECKED_STEPS = 4
FIRST_LOSS_TOLERANCE, LATER_LOSS_TOLERANCE = 1e-5, 1e-4


@dataclasses.dataclass(frozen=True)
class Args:
    """Fine-tuning with LoRA, ours against peft's.

    Attributes:
      optimizers: which optimizers train the factors; each is the same on both sides.
      hidden_size: width of the Qwen2.
      layers: its depth.
      heads: its attention heads; half as many have keys and values.
      intermediate_size: width inside its feed-forward layers.
      vocab_size: its tokens.
      rank: columns of a factor.
      alpha: the factors' product is scaled by alpha / rank.
      batch_size: rows of a micro-batch.
      accumulation: micro-batches of a step.
      length: tokens of a row.
      blocks: how often each side's turn comes.
      steps: timed steps of a turn; figures are medians over all turns.
      threads: processors for both sides, as `taskset` would give them; by default all that this
        process may use.
      seed: of weights, factors and tokens.
      output: where the JSON goes.
    """

    optimizers: tuple[Optimizer, ...] = ("muon", "adamw")
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    intermediate_size: int = 768
    vocab_size: int = 4096
    rank: int = 8
    alpha: float = 32.0
    batch_size: int = 4
    accumulation: int = 2
    length: int = 256
    blocks: int = 5
    steps: int = 4
    threads: int | None = None
    seed: int = 0
    output: Path = Path("runs/benchmarks/finetune.json")


def config_of(args: Args) -> DenseConfig:
    """The Qwen2 of the command line."""
    return DenseConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=max(args.heads // 2, 1),
        intermediate_size=args.intermediate_size,
        max_position_embeddings=args.length,
        attention_bias=True,
        tie_word_embeddings=True,
    )


def check_losses(ours: Any, theirs: Any, optimizer: Optimizer) -> dict[str, list[float]]:
    """Lets both sides take their first steps.

    Returns:
      Each side's losses.

    Raises:
      RuntimeError: they train different numbers of parameters, or their losses do not agree.
    """
    trained = ours.told["trained"], theirs.told["trained"]
    if trained[0] != trained[1]:
        raise RuntimeError(f"we train {trained[0]:,} parameters, they {trained[1]:,}")
    losses = {
        "ours": ours.take(CHECKED_STEPS)["losses"],
        "theirs": theirs.take(CHECKED_STEPS)["losses"],
    }
    for step, (a, b) in enumerate(zip(losses["ours"], losses["theirs"], strict=True)):
        tolerance = LATER_LOSS_TOLERANCE if step else FIRST_LOSS_TOLERANCE
        if not abs(a - b) <= tolerance * abs(b):
            raise RuntimeError(
                f"step {step + 1} with {optimizer}: our loss is {a:.6f}, theirs {b:.6f}; the two "
                "sides do not train the same factors"
            )
    return losses


def measure(work: Work, args: Args) -> dict[str, Any]:
    """Starts both sides, checks that they agree, and times their steps in turns."""
    with contextlib.ExitStack() as held:
        sides: dict[str, Side] = {}
        for name in ("ours", "theirs"):  # the second reads the adapter that the first writes
            sides[name] = Side(f"benchmarks.finetune.{name}", work)
            held.callback(sides[name].close)
        losses = check_losses(sides["ours"], sides["theirs"], work.optimizer)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks: dict[str, int] = {}
        for _ in range(args.blocks):
            for name, side in sides.items():
                # The first step finds caches, and threads that still spin, of the other side.
                answer = side.take(1 + args.steps)
                seconds[name] += answer["seconds"][1:]
                peaks[name] = answer["peak_bytes"]
        return {
            name: side.told
            | {
                "losses": losses[name],
                "step_s": median(seconds[name]),
                "step_s_all": seconds[name],
                "tokens_per_second": work.tokens / median(seconds[name]),
                "peak_bytes": peaks[name],
            }
            for name, side in sides.items()
        }


def table_of(results: dict[str, Any], args: Args) -> Table:
    """All results as a table; a ratio above 1 is in our favour."""
    first = next(iter(results.values()))
    table = Table(
        title=f"{first['theirs']['class']}, {first['ours']['parameters'] / 1e6:.2f}M parameters, "
        f"LoRA of rank {args.rank}: {first['ours']['trained'] / 1e6:.2f}M trained; step of "
        f"{args.accumulation} x {args.batch_size} x {args.length} tokens",
        title_justify="left",
    )
    for column in ("", "ours", "peft + torch", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        a, b = result["ours"], result["theirs"]
        table.add_row(
            f"{name}: tokens/s",
            *(f"{side['tokens_per_second']:,.0f}" for side in (a, b)),
            f"{a['tokens_per_second'] / b['tokens_per_second']:.2f}x",
        )
        for what in ("peak", "libraries"):
            sizes = [side[f"{what}_bytes"] for side in (a, b)]
            label = "peak memory" if what == "peak" else "libraries alone"
            ratio = f"{sizes[1] / sizes[0]:.2f}x"
            table.add_row(f"{name}: {label}", *(f"{size / 1e6:,.0f} MB" for size in sizes), ratio)
        table.add_row(
            f"{name}: loss, steps 1 and {CHECKED_STEPS}",
            *(f"{side['losses'][0]:.5f} {side['losses'][-1]:.5f}" for side in (a, b)),
            "",
        )
    return table


def main(args: Args) -> dict[str, Any]:
    """Runs the benchmark, prints its table, writes its JSON."""
    if args.threads is not None:
        limit_threads(args.threads)  # both sides' processes inherit it
    console = rich.get_console()
    load = load_average(console)
    config = config_of(args)
    results: dict[str, Any] = {}
    record: dict[str, Any] = {
        "environment": environment(
            "jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft"
        ),
        "threads": available_cores(),
        "load_average": load,
        "settings": dataclasses.asdict(args) | {"output": str(args.output)},
        "optimizers": results,
    }
    console.print(f"{record['environment']['processor']}, {record['threads']} threads each")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "base"
        write_base(model, config, args.seed)
        for name in args.optimizers:
            work = Work(
                model=str(model),
                adapter=str(Path(folder) / name / "adapter"),
                vocab_size=config.vocab_size,
                optimizer=name,
                rank=args.rank,
                alpha=args.alpha,
                batch_size=args.batch_size,
                accumulation=args.accumulation,
                length=args.length,
                seed=args.seed,
            )
            console.print(f"{name}: compiling, checking and timing")
            results[name] = measure(work, args)
    console.print(table_of(results, args))
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    CommandLine("benchmarks.finetune", Args, __doc__).run(main)
