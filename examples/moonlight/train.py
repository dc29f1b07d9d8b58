r"""Trains a Moonlight on real text: arguments, data, model, optimizer, loop, results.

    python -m examples.moonlight.train --preset tiny --output-dir runs/moonlight --resume

A run lives in its output folder: settings, metrics (JSONL and TensorBoard), checkpoints, and at the
end the loss curves, a sample of text and `results.json`. Killed at any moment and called again with
`--resume`, it goes on from its last checkpoint, and its losses are bit for bit those of an
uninterrupted run on the same machine.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python -m examples.moonlight.train --mesh data=2,expert=2,tensor=2 --output-dir runs/mesh

trains on a mesh (see `sharding.py`), here of eight virtual CPU devices. Its losses are those of one
device to rounding, and a run may change its mesh, or leave it, each time it is resumed.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import tyro
from flax import nnx
from jax.sharding import Mesh
from rich import progress
from rich.console import Console

from examples.moonlight import data, metrics
from examples.moonlight.batches import train_batches, validation_windows
from examples.moonlight.checkpoint import Checkpoints
from examples.moonlight.config import Execution, MoonlightConfig
from examples.moonlight.experts import RouterBias
from examples.moonlight.files import write_atomically
from examples.moonlight.model import Moonlight, parameter_counts
from examples.moonlight.placement import state_shardings
from examples.moonlight.plots import draw_losses
from examples.moonlight.run_folder import open_run_folder
from examples.moonlight.sample import encode_prompt, sample_text
from examples.moonlight.sharding import BATCH_AXES, ModelSharding, bytes_per_device, make_mesh
from examples.moonlight.steps import TrainState, make_train_steps, make_validate
from muon_jax import muon, sharding_report

RESULTS = "results.json"
CURVES = "loss.png"
PLAN = "sharding.txt"

# The schedule ends at this fraction of the peak, as Moonlight's long stage does (4.2e-4 to 4.2e-5).
FINAL_RATE = 0.1


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """What a preset trains with where the command line is silent; the names are those of `Args`."""

    learning_rate: float
    warmup_steps: int
    steps: int
    batch_size: int
    sequence_length: int
    gradient_accumulation: int


RECIPES = {
    # About three minutes on two CPU cores; the rate is AdamW's best of `compare.py`'s grid.
    "tiny": Recipe(4e-3, 60, 1200, 8, 128, 1),
    # A starting point for one accelerator.
    "small": Recipe(1e-3, 200, 10_000, 16, 1024, 1),
    # Moonlight's first stage; without sharding it fits no single device.
    "moonlight-16b-a3b": Recipe(4.2e-4, 2_000, 2_000, 4, 8192, 512),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Trains a Moonlight on real text. What is left out depends on the preset; see `RECIPES`."""

    output_dir: Path
    """Folder of the run: settings, metrics, checkpoints, results."""
    preset: Literal["tiny", "small", "moonlight-16b-a3b"] = "tiny"
    """Architecture of the model."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon (AdamW for embedding, head and norms), or AdamW for everything."""
    learning_rate: float | None = None
    """Peak of the schedule, for both optimizers and both of Muon's groups."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; applied to every parameter."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warmup before the cosine."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = None
    """Sequences per micro-batch."""
    sequence_length: int | None = None
    """Predicted tokens per sequence."""
    gradient_accumulation: int | None = None
    """Micro-batches per optimizer step."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations and products; weights and optimizer states are float32 in any case."""
    experts: Literal["dense", "ragged"] | None = None
    """How routed experts are computed; left out, dense on CPU, else ragged."""
    mesh: str | None = None
    """Sizes of the mesh axes data, fsdp, expert and tensor, such as data=2,expert=2,tensor=2; left
    out, one device. A resumed run may change it."""
    bias_rate: float = 1e-3
    """Step of the router biases that balance the experts, once per optimizer step."""
    data: Path | None = None
    """Text file, .jsonl file or folder; left out, the Python standard library's own source."""
    cache_dir: Path = Path("runs/corpus")
    """Where tokenized corpora are cached."""
    seed: int = 0
    """Seed of the initial weights."""
    data_seed: int = 0
    """Seed of the order of the training windows."""
    eval_every: int = 200
    """Optimizer steps between validations; the last step is always validated."""
    eval_windows: int = 256
    """Held-out windows of `sequence_length` tokens to validate on."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints, which are validated; the last step is always saved."""
    max_to_keep: int = 2
    """Most recent checkpoints to keep; the best by validation loss is kept besides."""
    steps_per_call: int = 20
    """Optimizer steps per call into XLA, which saves dispatch time on small models."""
    prompt: str = "def "
    """Text that the sample at the end continues."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in `output_dir`; start it if nothing is there."""


# Arguments that leave the losses alone, so that a resumed run may change them. `data` counts by its
# hash, wherever it lies.
_FREE = {
    "output_dir",
    "data",
    "cache_dir",
    "eval_every",
    "checkpoint_every",
    "max_to_keep",
    "mesh",
    "steps_per_call",
    "prompt",
    "resume",
}

_MAY_BE_ZERO = {"weight_decay", "warmup_steps", "bias_rate", "seed", "data_seed"}


def resolve(args: Args) -> Recipe:
    """Takes the preset's recipe where the command line is silent, and rejects what no run can have.

    Raises:
        ValueError: An argument is out of its range.
    """
    defaults = RECIPES[args.preset]._asdict()
    asked = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    if args.steps is not None:
        # A shorter run warms up for the same part of it.
        part = defaults["warmup_steps"] / defaults["steps"]
        defaults["warmup_steps"] = round(args.steps * part)
    recipe = Recipe(**defaults | asked)
    for name, value in (dataclasses.asdict(args) | recipe._asdict()).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = "not be negative" if name in _MAY_BE_ZERO else "be positive"
        if not 0 <= value < float("inf") or (value == 0 and name not in _MAY_BE_ZERO):
            raise ValueError(f"--{name.replace('_', '-')} must {least}, got {value}")
    if recipe.warmup_steps >= recipe.steps:
        raise ValueError(
            f"--warmup-steps ({recipe.warmup_steps}) must be fewer than --steps ({recipe.steps})"
        )
    return recipe


# --------------------------------------------------------------------------------------------------
# Optimizer
# --------------------------------------------------------------------------------------------------


def make_schedule(recipe: Recipe) -> optax.Schedule:
    """Linear warmup whose first step already moves, then a cosine to `FINAL_RATE` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=recipe.learning_rate / max(recipe.warmup_steps, 1),
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.steps,
        end_value=FINAL_RATE * recipe.learning_rate,
    )


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    mesh: Mesh | None = None,
    param_specs: Any = None,
) -> optax.GradientTransformation:
    """Clipping, then the optimizer. Clipping after Muon would divide the update by its own norm."""
    if name == "muon":
        optimizer = muon(schedule, weight_decay=weight_decay, mesh=mesh, param_specs=param_specs)
    else:
        optimizer = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def train(args: Args, config: MoonlightConfig | None = None) -> dict[str, Any]:
    """Trains, or finishes a training, and returns what `results.json` holds.

    Args:
        args: The command line's arguments.
        config: An architecture in the place of the preset's. Its vocabulary is the largest that the
            tokenizer may learn; a small corpus fills less, and the model has that size then.

    Raises:
        FileExistsError: The output folder is in use and `resume` is off.
        ValueError: An argument is out of range, or differs from the run that is to be resumed.
        FloatingPointError: The loss is no longer finite.
    """
    recipe = resolve(args)
    console = rich.get_console()
    started = time.perf_counter()

    # Mesh
    config = config or MoonlightConfig.preset(args.preset)
    sharding = ModelSharding(None if args.mesh is None else make_mesh(args.mesh))
    sharding.check_divides(("batch", "--batch-size", recipe.batch_size))
    execution = Execution(
        dtype=jnp.dtype(args.compute_dtype),
        sharding=sharding,
        experts=args.experts or ("dense" if jax.default_backend() == "cpu" else "ragged"),
    )

    # Data
    corpus = data.load_corpus(args.data, vocab_size=config.vocab_size, cache_dir=args.cache_dir)
    console.print(
        f"corpus {corpus.corpus_hash}: {len(corpus.train):,} training tokens, "
        f"{len(corpus.validation):,} held out, vocabulary {corpus.tokenizer.get_vocab_size()}"
    )
    batches = train_batches(
        {"": corpus.train},
        (),
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        seed=args.data_seed,
    )
    windows_kbt = validation_windows(
        {"": corpus.validation},
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        count=args.eval_windows,
    )[""]
    encode_prompt(corpus.tokenizer, args.prompt, recipe.sequence_length)  # Fails now or never.
    if windows_kbt.shape[1] % sharding.batch_shards:
        raise ValueError(
            f"--mesh {args.mesh}: the validation batch of {windows_kbt.shape[1]} windows cannot be "
            f"divided by {sharding.batch_shards}; give more data or more --eval-windows"
        )

    # Settings
    config = dataclasses.replace(
        config,
        vocab_size=corpus.tokenizer.get_vocab_size(),
        max_position_embeddings=max(config.max_position_embeddings, recipe.sequence_length),
    )
    settings = dataclasses.asdict(args) | recipe._asdict()
    settings = {name: value for name, value in settings.items() if name not in _FREE}
    settings |= {
        "experts": execution.experts,
        "config": dataclasses.asdict(config),
        "corpus": corpus.corpus_hash,
    }
    open_run_folder(args.output_dir, settings, resume=args.resume)
    if (args.output_dir / RESULTS).exists():
        console.print(f"{args.output_dir} holds a finished run: nothing left to train")
        results = json.loads((args.output_dir / RESULTS).read_text())
        return _present(args.output_dir, results)

    # Model
    def make_model(execution: Execution) -> Moonlight:
        return Moonlight(config, rngs=nnx.Rngs(args.seed), execution=execution)

    abstract_model = nnx.eval_shape(lambda: make_model(execution))
    graphdef, params, _ = nnx.split(abstract_model, nnx.Param, RouterBias)
    counts = parameter_counts(config)
    console.print(
        f"{args.preset}: {counts.total:,} parameters, {counts.body:,} without embedding and head, "
        f"{counts.active:,} of those active per token; {args.optimizer}, peak rate "
        f"{recipe.learning_rate:g}, {args.compute_dtype} on {jax.devices()[0].device_kind}"
    )

    # Optimizer
    schedule = make_schedule(recipe)
    mesh = sharding.mesh
    specs = None if mesh is None else sharding.param_shardings(params)
    optimizer = make_optimizer(args.optimizer, schedule, args.weight_decay, mesh, specs)

    def start() -> TrainState:
        _, params, bias = nnx.split(make_model(execution), nnx.Param, RouterBias)
        return TrainState(params, bias, optimizer.init(params))

    abstract = jax.eval_shape(start)
    shardings = state_shardings(abstract, optimizer, args.optimizer, sharding)
    state_bytes = bytes_per_device(abstract.opt_state, shardings.opt_state)
    if mesh is not None:
        console.print(
            f"mesh {sharding}: "
            f"{bytes_per_device(abstract.params, shardings.params) / 1e6:.2f} MB of "
            f"parameters and {state_bytes / 1e6:.2f} MB of optimizer state on each device"
        )
        if args.optimizer == "muon":
            with contextlib.redirect_stdout(io.StringIO()):
                plan = sharding_report(params, mesh=mesh, param_specs=specs)
            write_atomically(args.output_dir / PLAN, f"{plan}\n".encode())

    # State
    step, clock = 0, {"wall_seconds": 0.0, "step_seconds": 0.0}
    meshes: dict[str, str] = {}  # by the first step that was taken on each
    checkpoints = Checkpoints(args.output_dir / "checkpoints", max_to_keep=args.max_to_keep)
    if checkpoints.latest_step() is not None:
        target = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings)
        restored = checkpoints.restore(
            model={"params": target.params, "router_bias": target.bias}, optimizer=target.opt_state
        )
        state = TrainState(
            restored.model["params"], restored.model["router_bias"], restored.optimizer
        )
        step, clock = restored.step, restored.progress["clock"]
        meshes = restored.progress.get("meshes", {})  # absent before meshes were
        batches.set_state(restored.progress["data"])
        console.print(f"continuing after step {step}")
    elif mesh is None:
        state = start()  # eagerly: one compilation per shape, not one of all draws
    else:
        state = jax.jit(start, out_shardings=shardings)()
    if step < recipe.steps and [*meshes.values()][-1:] != [str(sharding)]:
        meshes[str(step + 1)] = str(sharding)
    earlier_seconds = clock["wall_seconds"]

    # Loop
    shape_abt = (recipe.gradient_accumulation, recipe.batch_size, recipe.sequence_length + 1)
    buffer_sabt = np.zeros((args.steps_per_call, *shape_abt), np.int32)
    compile_started = time.perf_counter()
    replicated = sharding.place()
    train_steps = (
        jax.jit(
            make_train_steps(graphdef, optimizer, schedule, bias_rate=args.bias_rate),
            donate_argnums=0,
            in_shardings=(
                shardings,
                sharding.place(None, None, BATCH_AXES),
                *2 * [replicated],
            ),
            out_shardings=(shardings, replicated, replicated),
        )
        .lower(state, buffer_sabt, 0, 0)
        .compile()
    )
    validate = (
        jax.jit(
            make_validate(graphdef),
            in_shardings=(shardings.params, shardings.bias, sharding.place(None, BATCH_AXES)),
        )
        .lower(state.params, state.bias, windows_kbt)
        .compile()
    )
    console.print(f"compiled in {time.perf_counter() - compile_started:.1f} s")

    tokens_per_step = recipe.gradient_accumulation * recipe.batch_size * recipe.sequence_length
    val_loss = float("nan")
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(metrics.MetricsLog(args.output_dir, after_step=step)) as log,
        _progress_bar(console) as bar,
    ):
        task = bar.add_task("training", total=recipe.steps, completed=step, status="")
        while step < recipe.steps:
            called = time.perf_counter()
            count = _steps_until_stop(step, args, recipe.steps)
            for i in range(count):
                for j in range(recipe.gradient_accumulation):
                    buffer_sabt[i, j] = next(batches)
            state, measured, _ = jax.block_until_ready(train_steps(state, buffer_sabt, step, count))
            call_seconds = time.perf_counter() - called
            clock["step_seconds"] += call_seconds

            rate = count * tokens_per_step / call_seconds
            columns = {name: np.asarray(x).tolist() for name, x in measured._asdict().items()}
            for i in range(count):
                values = {name: column[i] for name, column in columns.items()}
                log.write(metrics.TRAIN, step + i + 1, values | {"tokens_per_second": rate})
            step += count
            loss = columns["loss"][count - 1]
            if not np.isfinite(columns["loss"][:count]).all():
                raise FloatingPointError(
                    f"the loss is not finite at step {step}; lower --learning-rate (was "
                    f"{recipe.learning_rate:g})"
                )

            saves = step % args.checkpoint_every == 0 or step == recipe.steps
            if saves or step % args.eval_every == 0:
                val_loss = float(validate(state.params, state.bias, windows_kbt).mean())
                log.write(metrics.VALIDATION, step, {"val_loss": val_loss})
                bar.console.print(
                    f"step {step:>6}  loss {loss:.4f}  validation {val_loss:.4f}  "
                    f"{rate:,.0f} tokens/s"
                )
            log.flush()
            if saves:
                clock["wall_seconds"] = earlier_seconds + time.perf_counter() - started
                checkpoints.save(
                    step,
                    model={"params": state.params, "router_bias": state.bias},
                    optimizer=state.opt_state,
                    progress={"data": batches.get_state(), "clock": clock, "meshes": meshes},
                    val_loss=val_loss,
                )
            status = f"loss {loss:.3f}  val {val_loss:.3f}  {rate:,.0f} tokens/s"
            bar.update(task, completed=step, status=status)

    # Results
    validations = metrics.read_metrics(args.output_dir / metrics.FILE, metrics.VALIDATION)
    best = min(validations, key=lambda record: record["val_loss"])
    final_loss = validations[-1]["val_loss"]
    bytes_per_token = data.token_byte_lengths(corpus.tokenizer)[windows_kbt[..., 1:]].mean()
    sample = sample_text(
        nnx.graphdef(
            nnx.eval_shape(lambda: make_model(Execution()))
        ),  # one text divides over no mesh
        nnx.merge_state(state.params, state.bias),
        corpus.tokenizer,
        args.prompt,
        window=recipe.sequence_length,
        seed=args.seed,
    )
    results = {
        "final_val_loss": final_loss,
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "final_val_loss_per_byte": final_loss / float(bytes_per_token),
        "steps": recipe.steps,
        "tokens": recipe.steps * tokens_per_step,
        "tokens_per_second": recipe.steps * tokens_per_step / clock["step_seconds"],
        "wall_seconds": earlier_seconds + time.perf_counter() - started,
        "parameters": counts._asdict(),
        "settings": settings,
        "device": jax.devices()[0].device_kind,
        "meshes": meshes,
        "optimizer_state_bytes_per_device": state_bytes,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
        "sample": sample,
    }
    write_atomically(args.output_dir / RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    return _present(args.output_dir, results)


_REPORTED_PACKAGES = ("muon-jax", "jax", "jaxlib", "flax", "optax", "tokenizers")


def _steps_until_stop(step: int, args: Args, end: int) -> int:
    """Steps of the next call: up to the next validation, checkpoint or the end."""
    stops = (step + args.steps_per_call, end)
    stops += tuple(
        step // every * every + every for every in (args.eval_every, args.checkpoint_every)
    )
    return min(stops) - step


def _progress_bar(console: Console) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _present(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Draws the curves, prints the outcome and the sample, and says where everything is."""
    settings = results["settings"]
    train_records = metrics.read_metrics(folder / metrics.FILE, metrics.TRAIN)
    validations = metrics.read_metrics(folder / metrics.FILE, metrics.VALIDATION)
    draw_losses(
        folder / CURVES,
        train=([r["step"] for r in train_records], [r["loss"] for r in train_records]),
        validation=([r["step"] for r in validations], [r["val_loss"] for r in validations]),
        title=f"Moonlight {settings['preset']}, {settings['optimizer']}, "
        f"peak rate {settings['learning_rate']:g}",
    )
    console = rich.get_console()
    console.rule("a sample")
    console.print(results["sample"], markup=False, highlight=False)
    console.rule("results")
    console.print(
        f"validation loss {results['final_val_loss']:.4f} nats per token, "
        f"{results['final_val_loss_per_byte']:.4f} per byte (best {results['best_val_loss']:.4f} "
        f"at step {results['best_step']}); {results['tokens']:,} tokens in "
        f"{results['wall_seconds']:.0f} s, {results['tokens_per_second']:,.0f} tokens/s"
    )
    for what, name in (
        ("results", RESULTS),
        ("loss curves", CURVES),
        ("metrics", metrics.FILE),
        ("TensorBoard", "tensorboard"),
        ("checkpoints", "checkpoints"),
    ):
        console.print(f"  {what:<12} {folder / name}", highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    train(tyro.cli(Args))
