"""What `sft` takes from the command line: ms-swift's names and defaults, and a few of our own."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from examples.moonlight.common.processes.args import ProcessArgs

# Other names of flags: ms-swift's older ones, and ours.
ALIASES = {"train_type": "tuner_type", "sft_type": "tuner_type", "dtype": "torch_dtype"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Fine-tunes a model on conversations. A boolean has its value behind it: --packing true."""

    model: str | None = None
    """Folder of a Hugging Face model (deepseek_v3, qwen2, llama), or of a run of
    examples.moonlight.train; left out, runs/moonlight, which `make train` makes."""
    dataset: tuple[str, ...] = ()
    """Files of conversations, JSON Lines; FILE#N takes N samples of one. Left out, the
    repository's own corpus."""
    val_dataset: tuple[str, ...] = ()
    """Files to validate on."""
    split_dataset_ratio: float = 0.0
    """Share of the training samples that is held out to validate on, without --val_dataset."""
    strict: bool = True
    """End at a record that cannot be read, and name its line; false counts and skips them."""
    system: str | None = None
    """System message of conversations that have none, or a .txt file that holds it."""
    model_name: tuple[str, ...] = ()
    """What {{NAME}} in self-cognition records stands for: one name, or a Chinese and an English
    one."""
    model_author: tuple[str, ...] = ()
    """The same for {{AUTHOR}}."""
    max_length: int = 2048
    """Tokens of a sample, at most, and of a packed row."""
    truncation_strategy: Literal["delete", "left", "right"] = "delete"
    """What becomes of longer samples: they are left out, or cut on one side."""
    packing: bool = False
    """Put several samples into a row of --max_length tokens. None sees another."""
    tuner_type: Literal["lora", "full"] = "lora"
    """Train low-rank factors beside frozen weights, or all weights."""
    lora_rank: int = 8
    """Columns of a factor."""
    lora_alpha: float = 32.0
    """The factors' product is scaled by alpha / rank."""
    lora_dropout: float = 0.05
    """Share of a factor's input that is set to zero in training."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers that get factors, by the last name of their path; all-linear: every one but the
    router, the experts and the head."""
    optimizer: Literal["muon", "muonclip", "adamw"] = "muon"
    """Muon (AdamW for what is no matrix); the same with QK-Clip, of --tuner_type full; or AdamW."""
    optim_args: str | None = None
    """More of the optimizer's arguments: NAME=VALUE,NAME=VALUE; a wrong name lists them."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.95
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's, added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Largest norm of a gradient; a longer one is scaled. 0 leaves all as they are."""
    learning_rate: float | None = None
    """Peak of the schedule; left out, 1e-4 for LoRA and 1e-5 in full."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after its warmup; "constant" has none."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises."""
    warmup_steps: int = 0
    """The same in steps; goes before the ratio."""
    num_train_epochs: float = 3.0
    """How often every sample is read."""
    max_steps: int = -1
    """Optimizer steps; positive, goes before the epochs."""
    per_device_train_batch_size: int = 1
    """Rows that go through the model together, on each device that shards the batch."""
    per_device_eval_batch_size: int = 1
    """The same in validation."""
    gradient_accumulation_steps: int = 16
    """Micro-batches of an optimizer step. The loss is the mean over the tokens of all of them."""
    logging_steps: int = 5
    """Optimizer steps between printed lines; metrics.jsonl has every step."""
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When to save; the end is always saved."""
    save_steps: int = 500
    """Optimizer steps between checkpoints."""
    save_total_limit: int | None = None
    """Checkpoints to keep: the last, the best, and others by age; left out, all."""
    eval_strategy: Literal["steps", "epoch", "no"] | None = None
    """When to validate; left out, as for saving."""
    eval_steps: int | None = None
    """Optimizer steps between validations; left out, as for saving."""
    output_dir: Path = Path("output")
    """Folder of the run: checkpoint-N/, args.json, metrics, curves."""
    add_version: bool = False
    """Work in a new folder v0-DATE, v1-DATE, ... of the output folder."""
    resume_from_checkpoint: Path | None = None
    """Go on with the run in this folder, or from one checkpoint of it: later ones are deleted."""
    seed: int = 42
    """Seed of new factors and of dropout."""
    data_seed: int = 42
    """Seed of the order of the samples, and of what is held out."""
    torch_dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations and products; weights and optimizer states are float32 in any case. Left
    out, float32 on CPU, else bfloat16."""
    mesh: str | None = None
    """Sizes of the mesh axes data, fsdp, expert and tensor, such as data=4,tensor=2; left out, one
    device, or data=all of several processes. A resumed run may change it."""
    gradient_checkpointing: bool = False
    """Compute each layer's inside again in the backward pass: less memory, a third more time."""
    experts: Literal["dense", "ragged"] | None = None
    """How routed experts are computed; left out, dense on CPU, else ragged."""
    attention_block: int | None = None
    """Queries and keys of a block of attention, of which one is held in memory; left out, all."""
    loss_block: int | None = None
    """Tokens per device whose logits are held in memory at a time; left out, all."""
    unroll: bool | None = None
    """Write the layers one after the other in the program; left out, on CPU."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warmup."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.tuner_type == "lora" else 1e-5


# The titles of groups in the help, by the first field of each.
GROUPS = {
    "model": "model",
    "dataset": "data",
    "tuner_type": "tuner",
    "optimizer": "optimizer",
    "learning_rate": "schedule",
    "logging_steps": "measuring and saving",
    "output_dir": "run",
    "torch_dtype": "device",
    "processes": "several processes",
}

# What may lie elsewhere on each host.
OWN_PATHS = ("model", "dataset", "val_dataset")

# What leaves the losses alone, so that a resumed run may change it. Models and data count by their
# content, wherever they lie, and a batch by its rows, however it is split.
FREE = {
    *("model", "dataset", "val_dataset", "output_dir", "add_version", "resume_from_checkpoint"),
    *("strict", "logging_steps", "save_strategy", "save_steps", "save_total_limit"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "mesh", "experts"),
    *("gradient_checkpointing", "attention_block", "loss_block", "unroll"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "processes"),
}

_LEAST: dict[str, float] = {
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "seed", "data_seed"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), 0),
    **dict.fromkeys(("warmup_ratio", "split_dataset_ratio"), 0),
    "max_steps": -1,
}
_BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout", "split_dataset_ratio")


def check(args: Args) -> None:
    """Rejects what no run can have.

    Raises:
        ValueError: An argument is out of its range, or does not go with another one.
    """
    for name, value in dataclasses.asdict(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in _LEAST:
            fine, wanted = value >= _LEAST[name], f"be at least {_LEAST[name]:g}"
        else:
            fine, wanted = value > 0, "be positive"
        if not fine or not value < float("inf"):
            raise ValueError(f"--{name} must {wanted}, got {value}")
        if name in _BELOW_ONE and value >= 1:
            raise ValueError(f"--{name} must be below 1, got {value}")
    if args.warmup_ratio > 1:
        raise ValueError(f"--warmup_ratio must be at most 1, got {args.warmup_ratio}")
    if args.max_steps == 0:
        raise ValueError("--max_steps must be positive, or -1 to go by --num_train_epochs")
    if max(args.seed, args.data_seed) >= 2**32:
        raise ValueError("--seed and --data_seed must be less than 2**32")
    if args.val_dataset and args.split_dataset_ratio:
        raise ValueError(
            "--val_dataset and --split_dataset_ratio both say what to validate on: give one"
        )
    if args.optimizer == "muonclip" and args.tuner_type == "lora":
        raise ValueError(
            "--optimizer muonclip scales the weights of queries and keys, which --tuner_type lora "
            "leaves frozen: choose muon, or --tuner_type full"
        )
    for name in ("model_name", "model_author"):
        if len(getattr(args, name)) > 2:
            raise ValueError(
                f"--{name}: give one name, or a Chinese and an English one; a name with spaces "
                "goes into quotes"
            )


def settings_of(args: Args) -> dict[str, Any]:
    """What a resumed run has to have in common with the one that was started."""
    settings = dataclasses.asdict(args) | {"learning_rate": args.peak_rate}
    return {name: value for name, value in settings.items() if name not in FREE}
