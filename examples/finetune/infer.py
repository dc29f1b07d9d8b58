r"""Talks with a tuned model: the command line of ms-swift's `swift infer`.

    python -m examples.finetune.infer --adapters output/checkpoint-20 --stream true --temperature 0
    python -m examples.finetune.infer --adapters output/checkpoint-20 --prompt "Who are you?"
    python -m examples.finetune.infer --model Qwen2.5-0.5B-Instruct --val_dataset talks.jsonl#10

reads `args.json` of the checkpoint, so that neither the model nor the system message has to be said
again, merges the adapters into the weights, and answers one message after the other, until the end
of the input (Ctrl-D) or "exit". With `--prompt` it answers these messages alone, and with
`--val_dataset` those of a file, whose own answers it shows beside. `--model DIR` takes a model as
it is.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from examples.finetune.answers import answer, talk
from examples.finetune.base import find_base
from examples.finetune.checkpoint import find_checkpoint
from examples.finetune.command_line import parse
from examples.finetune.foreign_flags import IN_INFERENCE
from examples.finetune.lora.peft_files import CONFIG_FILE
from examples.finetune.prompts import Question, load_encoder, questions_of
from examples.finetune.training.job import make_execution
from examples.finetune.training.texts import system_text
from examples.finetune.tuned import in_dtype, open_checkpoint, open_peft
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import of_first
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.together import work_together
from examples.moonlight.common.program import run_program
from examples.moonlight.common.untrusted import is_there
from examples.moonlight.generation.chat import Encoder
from examples.moonlight.generation.model_folder import OpenModel
from examples.moonlight.generation.sampling import Sampling
from examples.moonlight.generation.texts import encoder_of_first
from examples.moonlight.model.execution.options import Execution

ALIASES = {"dtype": "torch_dtype", "ckpt_dir": "adapters"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Talks with a tuned model. A boolean has its value behind it: --stream true."""

    adapters: Path | None = None
    """Checkpoint of examples.finetune.sft, such as output/checkpoint-20, of LoRA or in full; or a
    directory of adapters that peft wrote."""
    model: str | None = None
    """Folder of a model to talk with as it is; beside --adapters, where the base has moved to."""
    prompt: tuple[str, ...] = ()
    """Messages to answer, each by itself; left out, they are read from the terminal."""
    val_dataset: tuple[str, ...] = ()
    """Files of conversations whose last answers are to be given; FILE#N takes N of one."""
    result_path: Path | None = None
    """File for the answers, one JSON object a line."""
    system: str | None = None
    """System message, or a .txt file; left out, that of the fine-tuning."""
    stream: bool = True
    """Show an answer while it is written, or when it ends."""
    max_new_tokens: int = 2048
    """Tokens of an answer, at most."""
    max_length: int | None = None
    """Tokens of a conversation: the size of the cache. Left out, as long as the messages ask for,
    and up to 8192 in a conversation."""
    temperature: float = 0.0
    """Divides the logits: below 1 the likely becomes likelier; 0 takes the likeliest."""
    top_k: int | None = None
    """Draw from that many of the likeliest tokens."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together have this probability."""
    seed: int = 42
    """Seed of the draws."""
    batch_size: int = 8
    """Messages of --prompt or --val_dataset that go through the model together."""
    torch_dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights, activations and products; left out, float32 on CPU, else bfloat16."""
    mesh: str | None = None
    """Sizes of the mesh axes, such as data=2,tensor=4; left out, one device, or data=all of
    several processes."""
    experts: Literal["dense", "ragged"] | None = None
    """How routed experts are computed; left out, dense on CPU, else ragged."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


def infer(args: Args, console: Console | None = None) -> list[str]:
    """Answers what is asked, and returns the answers.

    Args:
        args: The command line's arguments.
        console: Where the text goes; None is the standard output.

    Raises:
        FileNotFoundError: The checkpoint, its base or a file is not there.
        ValueError: An argument is out of its range, or does not fit the others or the model.
    """
    quiet = not group.is_first()
    console = console or Console(highlight=False, quiet=quiet)
    aside = Console(stderr=True, highlight=False, quiet=quiet)
    if args.adapters is None and args.model is None:
        raise ValueError(
            "give --adapters with a checkpoint, such as output/checkpoint-20, or --model with the "
            "folder of a model"
        )
    if args.prompt and args.val_dataset:
        raise ValueError("--prompt and --val_dataset both say what to answer: give one")
    for flag, value in (
        ("--batch_size", args.batch_size),
        ("--max_new_tokens", args.max_new_tokens),
    ):
        if value < 1:
            raise ValueError(f"{flag} must be positive, got {value}")
    if args.result_path is not None and group.is_first() and not args.result_path.parent.is_dir():
        raise FileNotFoundError(
            f"--result_path {args.result_path}: there is no folder {args.result_path.parent}: make "
            "it first"
        )
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    execution = make_execution(args)
    with phase(aside, f"reading {args.adapters or args.model}"):
        opened, encode, trained_with = _open(args, execution, aside)
    said = trained_with if args.system is None else args.system
    system = of_first(lambda: system_text(said))

    prepare = functools.partial(
        opened.generator, aside, sampling=sampling, sharding=execution.sharding
    )
    if args.prompt or args.val_dataset:
        asked = of_first(lambda: questions_of(args.prompt, args.val_dataset, system, args.seed))
        questions = [Question.read(record) for record in asked]
        return answer(args, opened, encode, prepare, questions, console, aside)
    return talk(args, opened, encode, prepare, system, console, aside)


def _open(
    args: Args, execution: Execution, aside: Console
) -> tuple[OpenModel, Encoder, str | None]:
    """The model, its chat template, and the system message that it was trained with."""
    if args.adapters is None:
        base = find_base(args.model)
        opened = base.load(execution, aside)
        return in_dtype(opened, execution), _encoder(base.folder, opened), None
    if is_there(args.adapters / CONFIG_FILE):
        base, opened = open_peft(args.adapters, args.model, execution, aside)
        aside.print(f"[dim]{args.adapters}, adapters of peft, merged into {base}[/]")
        return in_dtype(opened, execution), _encoder(base, opened), None
    checkpoint = find_checkpoint(args.adapters, args.model)
    opened = open_checkpoint(checkpoint, execution, aside)
    encode = _encoder(checkpoint.texts, opened)
    how = "trained in full" if checkpoint.lora is None else "adapters merged"
    aside.print(f"[dim]{checkpoint.folder}, {how}[/]", soft_wrap=True)
    return in_dtype(opened, execution), encode, checkpoint.system


def _encoder(folder: Path, opened: OpenModel) -> Encoder:
    return encoder_of_first(lambda: load_encoder(folder, opened.tokenizer))


GROUPS = {
    "adapters": "model",
    "prompt": "messages",
    "max_new_tokens": "length",
    "temperature": "sampling",
    "batch_size": "device",
    "processes": "several processes",
}

# What may lie elsewhere on each host; process 0 alone reads the messages and writes the answers.
OWN_PATHS = ("adapters", "model", "val_dataset", "result_path")

COMMAND_LINE = CommandLine(
    "examples.finetune.infer", Args, __doc__, groups=GROUPS, underscores=True
)


def read(argv: Sequence[str] | None = None) -> Args:
    """Reads a command line, the process's where it is None: see `parse`."""
    return parse(Args, argv, aliases=ALIASES, foreign=IN_INFERENCE, shown=COMMAND_LINE)


def main(argv: Sequence[str] | None = None) -> None:
    """The program. What its user can mend ends it with one sentence, and the exit code 1.

    Args:
        argv: Left out, the command line's.
    """

    def program() -> None:
        args = read(argv)
        work_together(
            infer,
            args,
            own=OWN_PATHS,
            underscores=True,
            reads=not (args.prompt or args.val_dataset),
            console=Console(stderr=True, highlight=False),
        )

    run_program(program)


if __name__ == "__main__":
    main()
