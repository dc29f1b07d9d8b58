"""Time fine-tuning with LoRA against peft: `python -m benchmarks.finetune`.

The same weights, factors, rows and optimizer in float32, on equally many threads: our side is the
training step of `examples.finetune.sft`, the other is transformers' `Qwen2ForCausalLM` under peft's
LoRA in torch, not compiled, with torch's own AdamW or Muon on the factors. Before they are timed,
in turns in one run, both train for a few steps, and their losses must agree. Peak memory is that of
a process of its own for each side, with the libraries of both.
"""

import dataclasses
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import peft
import torch
import transformers
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.harness import environment, limit_threads, median, time_interleaved, write_json
from benchmarks.train.theirs import their_weights
from examples.finetune.data.packing import Rows
from examples.finetune.lora.adapters import DropoutKey, LoraConfig, add_lora
from examples.finetune.training.steps import Frozen, make_train_step
from examples.moonlight.huggingface.config import config_fields
from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.training.optimizers import make_optimizer
from examples.moonlight.training.steps import TrainState
from examples.one_thread import available_cores

Optimizer = Literal["muon", "adamw"]

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Steps that both sides take first. Their losses differ by rounding; under Muon later ones by what
# bfloat16 makes of it in Newton-Schulz.
CHECKED_STEPS = 3
FIRST_LOSS_TOLERANCE, LATER_LOSS_TOLERANCE = 1e-5, 2e-3

# Programs that run beside this one; torch's threads, which wait for each other, suffer most.
BUSY = 0.5


@dataclasses.dataclass(frozen=True)
class Args:
    """LoRA on a Qwen2 of our own against peft's in torch.

    Attributes:
      optimizers: which optimizers; each is Muon, or AdamW, on both sides.
      layers: the layers of the model.
      hidden_size: its width; the MLP is 2.75 times as wide, a head 32.
      vocab_size: the rows of its embedding, which is its head too.
      rank: the rank of the factors.
      batch_size: rows in a batch.
      sequence_length: tokens of a row, all of which count.
      threads: processors for both sides, as `taskset` would give them; by default all that this
        process may use.
      repeats: how often a step is timed; figures are medians.
      output: where the JSON goes.
    """

    optimizers: tuple[Optimizer, ...] = ("muon", "adamw")
    layers: int = 8
    hidden_size: int = 256
    vocab_size: int = 4096
    rank: int = 8
    batch_size: int = 8
    sequence_length: int = 128
    threads: int | None = None
    repeats: int = 15
    output: Path = Path("runs/benchmarks/finetune.json")

    @property
    def config(self) -> DenseConfig:
        """The architecture."""
        return DenseConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden_size // 32,
            num_key_value_heads=self.hidden_size // 64,
            intermediate_size=self.hidden_size * 11 // 4,
            max_position_embeddings=self.sequence_length,
            tie_word_embeddings=True,
            attention_bias=True,
        )

    @property
    def rows(self) -> Rows:
        """A batch as one micro-batch, `[1, batch, time]`; each row is one sample."""
        shape = (1, self.batch_size, self.sequence_length + 1)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, shape).astype(np.int32)
        ones = np.ones_like(tokens[..., 1:])
        position = np.arange(self.sequence_length, dtype=np.int32) * ones
        return Rows(tokens[..., :-1], tokens[..., 1:], ones.astype(np.float32), ones, position)


Step = Callable[[], float]


class Start(NamedTuple):
    """What both sides begin with.

    Attributes:
      graphdef: the static half of our model.
      factors: the adapters.
      weights: the weights beside them.
    """

    graphdef: nnx.GraphDef
    factors: nnx.State
    weights: nnx.State


def make_start(args: Args) -> Start:
    """The model, with the same numbers in every process."""
    lora = LoraConfig(rank=args.rank, dropout=0.0, target_modules=TARGETS)

    def make() -> Dense:
        model = Dense(args.config, rngs=nnx.Rngs(0), execution=Execution(unroll=True))
        add_lora(model, lora, nnx.Rngs(1))
        return model

    graphdef, factors, _, weights = nnx.split(nnx.jit(make)(), nnx.LoRAParam, DropoutKey, nnx.Param)
    return Start(graphdef, factors, weights)


def ours(args: Args, start: Start) -> dict[str, Step]:
    """Our steps by optimizer, which return the loss."""
    graphdef, factors, weights = start
    empty, rows = nnx.State({}), args.rows
    frozen = Frozen(empty, weights, empty)
    schedule = optax.constant_schedule(LEARNING_RATE)

    def step_with(name: Optimizer) -> Step:
        optimizer = make_optimizer(name, schedule, WEIGHT_DECAY, max_norm=CLIP)
        train = jax.jit(make_train_step(graphdef, optimizer, schedule), donate_argnums=0)
        first = jax.tree.map(lambda x: x.copy(), factors)
        held = {"state": TrainState(first, empty, jax.jit(optimizer.init)(first)), "step": 0}

        def step() -> float:
            held["state"], measured = train(held["state"], frozen, rows, held["step"])
            held["step"] += 1
            return float(jax.block_until_ready(measured).loss)

        return step

    return {name: step_with(name) for name in args.optimizers}


def theirs(args: Args, start: Start) -> dict[str, Step]:
    """The same of peft and torch."""
    torch.set_num_threads(available_cores())
    fields = config_fields(args.config, dtype="float32")
    config = transformers.AutoConfig.for_model(**fields)
    started = their_weights(args.config, start.weights, nnx.State({}))
    rows = args.rows
    tokens, targets = (torch.tensor(x[0], dtype=torch.long) for x in rows[:2])

    def step_with(name: Optimizer) -> Step:
        plain = transformers.AutoModelForCausalLM.from_config(config).float()
        plain.load_state_dict(started, strict=False)
        lora = peft.LoraConfig(
            r=args.rank, lora_alpha=32, lora_dropout=0.0, target_modules=[*TARGETS]
        )
        with warnings.catch_warnings():  # peft calls transformers by a name that is to go
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model: Any = peft.get_peft_model(plain, lora)
        _set_factors(model, start.factors)
        trained = [x for x in model.parameters() if x.requires_grad]
        kind: Any = torch.optim.AdamW
        options: dict[str, Any] = {"betas": (0.9, 0.95), "fused": True}
        if name == "muon":
            kind, options = torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}
        optimizer = kind(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            return loss.item()

        return step

    return {name: step_with(name) for name in args.optimizers}


def _set_factors(model: Any, factors: nnx.State) -> None:
    """Our factors in the place of peft's own, which has them transposed and layer by layer."""
    there = dict(model.named_parameters())
    for path, stack in jax.tree_util.tree_flatten_with_path(factors)[0]:
        *module, factor = (key.key for key in path if hasattr(key, "key"))
        inner = ".".join(module[module.index("layers") + 1 :])
        for layer, matrix in enumerate(np.asarray(stack)):
            name = f"base_model.model.model.layers.{layer}.{inner}.lora_{factor[-1].upper()}"
            with torch.no_grad():
                there[f"{name}.default.weight"].copy_(torch.tensor(matrix.T))


def check_losses(mine: Step, other: Step, optimizer: Optimizer) -> dict[str, list[float]]:
    """Trains both sides for a few steps, and returns the losses of each.

    Raises:
      RuntimeError: they do not agree.
    """
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(CHECKED_STEPS):
        a, b = mine(), other()
        losses["ours"].append(a)
        losses["theirs"].append(b)
        tolerance = LATER_LOSS_TOLERANCE if number else FIRST_LOSS_TOLERANCE
        if not abs(a - b) <= tolerance * abs(b):
            raise RuntimeError(
                f"step {number + 1} with {optimizer}: our loss is {a:.6f}, theirs {b:.6f}; the two "
                "sides do not train the same model"
            )
    return losses


def peak_megabytes(args: Args, side: str) -> float:
    """Peak resident memory of a process that takes a few steps on one side."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (args, side))


def _peak(args: Args, side: str) -> float:
    steps = (ours if side == "ours" else theirs)(args, make_start(args))
    for step in steps.values():
        for _ in range(CHECKED_STEPS):
            step()
    # Not getrusage: after a fork it begins with the peak of the process that forked.
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1024


def main(args: Args) -> dict[str, Any]:
    """Runs the benchmark, prints its table, writes its JSON."""
    if args.threads is not None:
        limit_threads(args.threads)  # before the first computation, which starts XLA's threads
    console, load = Console(), os.getloadavg()[0]
    if load > BUSY:
        console.print(f"load average {load:.1f}: what else runs here will be in the figures")
    with console.status("compiling, checking and timing"):
        start = make_start(args)
        mine, other = ours(args, start), theirs(args, start)
        losses = {name: check_losses(mine[name], other[name], name) for name in args.optimizers}
        calls = {
            f"{side} {name}": steps[name]
            for name in args.optimizers
            for side, steps in (("ours", mine), ("theirs", other))
        }
        seconds = time_interleaved(calls, args.repeats)
    with console.status("measuring memory"):
        single = dataclasses.replace(args, optimizers=args.optimizers[:1])
        peaks = {side: peak_megabytes(single, side) for side in ("ours", "theirs")}
    tokens = args.batch_size * args.sequence_length
    record: dict[str, Any] = {
        "environment": environment("jax", "jaxlib", "flax", "torch", "transformers", "peft"),
        "threads": available_cores(),
        "load_average": load,
        "args": {k: v for k, v in dataclasses.asdict(args).items() if k != "output"},
        "losses": losses,
        "peak_megabytes": peaks,
        "seconds": seconds,
        "speedup": {},
    }
    table = Table(
        title=f"LoRA of rank {args.rank}, {args.layers} layers of {args.hidden_size}, batch "
        f"{args.batch_size} x {args.sequence_length}",
        title_justify="left",
    )
    for column in ("step with", "ours", "peft", "speedup"):
        table.add_column(column, justify="left" if column == "step with" else "right")
    for name in args.optimizers:
        a, b = (median(seconds[f"{side} {name}"]) for side in ("ours", "theirs"))
        record["speedup"][name] = b / a
        table.add_row(name, f"{a * 1e3:.0f} ms", f"{b * 1e3:.0f} ms", f"{b / a:.2f}x")
        table.add_row("  tokens/s", f"{tokens / a:,.0f}", f"{tokens / b:,.0f}", "")
    table.add_row("peak memory", *(f"{peak:,.0f} MB" for peak in peaks.values()), "")
    console.print(table)
    write_json(args.output, record)
    console.print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    main(tyro.cli(Args))
