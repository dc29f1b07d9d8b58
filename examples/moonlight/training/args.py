"""What a training takes from the command line, and from its preset where that is silent."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.schedule.recipe import RECIPES, Recipe


@dataclasses.dataclass(frozen=True)
class Args:
    """What a run of `train` is asked for; `resolve` fills in what a preset has."""

    output_dir: Path
    """Folder of the run: settings, metrics, checkpoints, results."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --output-dir; start it if nothing is there."""
    resume_step: int | None = None
    """Go back to the checkpoint of this step, and continue from there: every later checkpoint and
    metric of the run is deleted."""
    branch_from: str | None = None
    """RUN@STEP: begin with everything that another run had at a checkpoint (weights, optimizer,
    place in the data), in a new folder and perhaps with other settings. That run stays as it is."""
    preset: Literal["tiny", "mini", "small", "moonlight-16b-a3b"] = "tiny"
    """Architecture of the model, and what is trained with where nothing else is said."""
    init_from: str | None = None
    """Folder of a Hugging Face model that takes the place of the preset's architecture: its
    weights, as float32, and its tokenizer are what the run begins with."""
    seed: int = 0
    """Seed of the initial weights."""
    optimizer: Literal["muon", "muonclip", "adamw"] = "muon"
    """Muon (AdamW for embedding, head and norms); the same with QK-Clip behind it; or AdamW for
    everything."""
    qk_clip_threshold: float | None = None
    """Largest attention logit that muonclip allows, 100 where nothing else is said; a head above it
    has its weights scaled."""
    muon_heads: Literal["joint", "per_head", "groups"] = "joint"
    """What Muon takes for a matrix in attention's projections: the kernel with all its heads, each
    head by itself, or each group of heads."""
    muon_heads_per_group: int | None = None
    """Query heads of a group, of --muon-heads groups; a divisor of their number."""
    bias_rate: float = 1e-3
    """Step of the router biases that balance the experts, once per optimizer step; a cooldown holds
    them still."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a gradient that is not finite: end the run there, or leave that update out, count it, and
    go on; ten in a row end the run all the same. A resumed run may change it."""
    schedule: Literal["cosine", "moonlight"] | None = None
    """Warmup and cosine; or the paper's three stages, with its batch ramp, at any size:
    python -m examples.moonlight.stages prints them."""
    learning_rate: float | None = None
    """Peak of the schedule, for both optimizers and both of Muon's groups."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; applied to every parameter."""
    warmup_steps: int | None = None
    """Optimizer steps of the first linear warmup; left out, the schedule's share of the tokens."""
    total_tokens: int | None = None
    """Tokens to train on, in all."""
    steps: int | None = None
    """The same in optimizer steps, where all are of one size (the cosine)."""
    batch_size: int | None = None
    """Sequences per micro-batch."""
    sequence_length: int | None = None
    """Predicted tokens per sequence."""
    gradient_accumulation: int | None = None
    """Micro-batches per optimizer step; the most, where the batch grows."""
    cooldown_at: int | None = None
    """Begin the schedule's last stage after this many optimizer steps, earlier than planned."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text file, .jsonl file or folder, or a folder of tokens that data.prepare made; left out, the
    Python standard library's own source. Several have names: --data general=texts/ --data
    quality=best.jsonl."""
    mix: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Weights of named sources, such as general=9,quality=1: once for the whole run, or once for
    each stage in order; left out, by their sizes."""
    cache_dir: Path = Path("runs/corpus")
    """Where tokenized corpora are cached."""
    data_seed: int = 0
    """Seed of the order of the training windows."""
    eval_every: int = 200
    """Optimizer steps between validations; the last step is always validated."""
    eval_windows: int = 256
    """Held-out windows of --sequence-length tokens to validate on, of every source."""
    checkpoint_every: int = 200
    """Optimizer steps between checkpoints, which are validated; the last step of every stage is
    always saved, and kept."""
    checkpoint_dir: str | None = None
    """Where the checkpoints are, if not in the output folder: a path, or gs://bucket/prefix. Every
    host has to see it."""
    max_to_keep: int = 2
    """Most recent checkpoints to keep; the best by validation loss is kept besides."""
    keep_every_tokens: int | None = None
    """Keep besides, for good, the first checkpoint after every so many tokens."""
    monitor_every: int = 0
    """Optimizer steps between records of the stability monitors, which are drawn at the end; 0
    measures nothing."""
    prompt: str = "def "
    """Text that the sample at the end continues."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Activations and products; weights and optimizer states are float32 in any case. Left out,
    bfloat16 on TPUs and on GPUs that have instructions for it, else float32."""
    experts: Literal["dense", "ragged"] | None = None
    """How routed experts are computed; left out, dense on CPU, else ragged."""
    expert_capacity: float | None = None
    """Of the ragged route: take at most this multiple of an even share of tokens per expert from
    each device, drop the rest and show how many; left out, none is dropped, as in validation."""
    expert_block: int | None = None
    """Of the ragged route on a mesh: tokens per device that travel to experts at a time; left out,
    all."""
    mesh: str | None = None
    """Sizes of the mesh axes data, fsdp, expert and tensor, such as data=2,expert=2,tensor=2; left
    out, one device, or data=all of several processes. A resumed run may change it."""
    remat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute each layer's inside again in the backward pass: less memory, a third more time."""
    attention_block: int | None = None
    """Queries and keys of a block of attention, of which one is held in memory; left out, all."""
    loss_block: int | None = None
    """Tokens per device whose logits are held in memory at a time; left out, all."""
    unroll: bool | None = None
    """Write the layers one after the other in the program, which is faster on CPU, instead of a
    loop over them, which compiles faster; left out, on CPU."""
    steps_per_call: int | None = None
    """Optimizer steps per call into XLA, which saves dispatch time on small models; left out, up to
    20, of at most 4M tokens together."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


# The titles of groups in the help, by the first field of each.
GROUPS = {
    "output_dir": "run",
    "preset": "model",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "data": "data",
    "eval_every": "measuring and saving",
    "compute_dtype": "device",
    "processes": "several processes",
}

# Arguments that leave the losses alone, so that a resumed run may change them. `data` counts by its
# hash, wherever it lies.
FREE = {
    "output_dir",
    "data",
    "cache_dir",
    "eval_every",
    "checkpoint_every",
    "max_to_keep",
    "keep_every_tokens",
    "mesh",
    "experts",
    "expert_block",
    "remat",
    "attention_block",
    "loss_block",
    "unroll",
    "monitor_every",
    "steps_per_call",
    "on_nonfinite",
    "prompt",
    "processes",
    "resume",
    "resume_step",
}

# Kimi K2's (arXiv 2507.20534).
QK_CLIP_THRESHOLD = 100.0

_MAY_BE_ZERO = {
    "weight_decay",
    "warmup_steps",
    "bias_rate",
    "seed",
    "data_seed",
    "monitor_every",
}


def resolve(args: Args) -> Recipe:
    """Takes the preset's recipe where the command line is silent, and rejects what no run can have.

    Raises:
        ValueError: An argument is out of its range, or does not go with another one.
    """
    for name, value in dataclasses.asdict(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = "not be negative" if name in _MAY_BE_ZERO else "be positive"
        if not 0 <= value < float("inf") or (value == 0 and name not in _MAY_BE_ZERO):
            raise ValueError(f"--{name.replace('_', '-')} must {least}, got {value}")
    if args.init_from is not None and args.branch_from is not None:
        raise ValueError(
            "--init-from and --branch-from both say with which weights to begin: give one"
        )
    if args.muon_heads != "joint" and args.optimizer == "adamw":
        raise ValueError(
            f"--muon-heads {args.muon_heads} says what Muon takes for a matrix, and --optimizer "
            "adamw trains without Muon: leave it out, or choose muon or muonclip"
        )
    if (args.muon_heads == "groups") != (args.muon_heads_per_group is not None):
        raise ValueError(
            "--muon-heads groups and --muon-heads-per-group N go together: give both, or neither"
        )
    if args.qk_clip_threshold is not None and args.optimizer != "muonclip":
        raise ValueError(
            f"--qk-clip-threshold is muonclip's, and --optimizer is {args.optimizer}: give "
            "--optimizer muonclip, or leave it out"
        )
    if args.seed >= 2**32:
        raise ValueError(f"--seed must be less than 2**32, got {args.seed}")
    asked = {name: x for name in Recipe._fields if (x := getattr(args, name)) is not None}
    recipe = RECIPES[args.preset]._replace(**asked)
    if recipe.schedule == "moonlight":
        if recipe.gradient_accumulation % 2 and args.gradient_accumulation is None:
            # The batch starts at half its size: smaller micro-batches, and more of them.
            half = recipe.batch_size if args.batch_size else recipe.batch_size // 2
            recipe = recipe._replace(
                batch_size=half, gradient_accumulation=2 * recipe.gradient_accumulation
            )
        if recipe.gradient_accumulation % 2:
            raise ValueError(
                "--schedule moonlight begins with half of the micro-batches: "
                f"--gradient-accumulation must be even, got {recipe.gradient_accumulation}"
            )
    if args.steps is not None:
        if recipe.schedule != "cosine" or args.total_tokens is not None:
            raise ValueError(
                "--steps goes with --schedule cosine, and not with --total-tokens: elsewhere steps "
                "differ in size. Give --total-tokens alone"
            )
        recipe = recipe._replace(total_tokens=args.steps * recipe.tokens_per_step)
    if recipe.schedule == "cosine" and (recipe.warmup_steps or 0) >= max(recipe.steps, 1):
        raise ValueError(
            f"--warmup-steps ({recipe.warmup_steps}) must be fewer than --steps ({recipe.steps})"
        )
    return recipe


def steps_per_call(args: Args, recipe: Recipe) -> int:
    """Optimizer steps of a call: its tokens are on the devices all at once."""
    return args.steps_per_call or min(20, max(1, 4_000_000 // recipe.tokens_per_step))


def settings_of(args: Args, recipe: Recipe, steps: int) -> dict[str, Any]:
    """What a resumed run has to have in common with the one that was started."""
    settings = dataclasses.asdict(args) | recipe._asdict() | {"steps": steps}
    if args.optimizer == "muonclip" and args.qk_clip_threshold is None:
        settings["qk_clip_threshold"] = QK_CLIP_THRESHOLD
    return {name: value for name, value in settings.items() if name not in FREE}
