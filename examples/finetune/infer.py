r"""Talks with a tuned model: the command line of ms-swift's `swift infer`.

    python -m examples.finetune.infer --adapters output/checkpoint-20 --stream true --temperature 0

reads `args.json` of the checkpoint, so that neither the model nor the system message has to be said
again, merges the adapters into the weights, and answers one message after the other, until the end
of the input (Ctrl-D) or "exit". With `--prompt` it answers these messages alone, and with
`--val_dataset` those of a file, whose own answers it shows beside. `--model DIR` takes a model as
it is.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from examples.finetune.base import find_base
from examples.finetune.command_line import parse
from examples.finetune.foreign_flags import IN_INFERENCE
from examples.finetune.lora.peft_files import CONFIG_FILE
from examples.finetune.prompts import Question, load_encoder, questions_of
from examples.finetune.training.job import make_execution
from examples.finetune.training.texts import system_text
from examples.finetune.tuned import find_checkpoint, in_dtype, open_checkpoint, open_peft
from examples.moonlight.common.files import write_atomically
from examples.moonlight.common.program import run_program
from examples.moonlight.common.untrusted import is_there
from examples.moonlight.generate import CHAT_LENGTH, ask, cache_length
from examples.moonlight.generation.chat import Encoder, Message
from examples.moonlight.generation.decoding import Generator, check_lengths
from examples.moonlight.generation.model_folder import OpenModel
from examples.moonlight.generation.sampling import Sampling
from examples.moonlight.generation.texts import continue_texts, converse
from examples.moonlight.model.execution.options import Execution

ALIASES = {"dtype": "torch_dtype", "ckpt_dir": "adapters"}

# What ends a conversation, as in ms-swift.
ENDS = ("exit", "quit")


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
    """Sizes of the mesh axes, such as data=2,tensor=4; left out, one device."""
    experts: Literal["dense", "ragged"] | None = None
    """How routed experts are computed; left out, dense on CPU, else ragged."""


def infer(args: Args, console: Console | None = None) -> list[str]:
    """Answers what is asked, and returns the answers.

    Args:
        args: The command line's arguments.
        console: Where the text goes; None is the standard output.

    Raises:
        FileNotFoundError: The checkpoint, its base or a file is not there.
        ValueError: An argument is out of its range, or does not fit the others or the model.
    """
    console, aside = console or Console(highlight=False), Console(stderr=True, highlight=False)
    if args.adapters is None and args.model is None:
        raise ValueError(
            "give --adapters with a checkpoint, such as output/checkpoint-20, or --model with the "
            "folder of a model"
        )
    if args.prompt and args.val_dataset:
        raise ValueError("--prompt and --val_dataset both say what to answer: give one")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    execution = make_execution(args)
    opened, encode, trained_with = _open(args, execution, aside)
    system = system_text(trained_with if args.system is None else args.system)

    def prepare(rows: int, length: int) -> Generator:
        return Generator(
            opened.graphdef,
            opened.params,
            opened.bias,
            batch=rows,
            length=length,
            sampling=sampling,
            sharding=execution.sharding,
        )

    if args.prompt or args.val_dataset:
        questions = questions_of(args.prompt, args.val_dataset, system, args.seed)
        return _answer(args, opened, encode, prepare, questions, console, aside)
    return _talk(args, opened, encode, prepare, system, console, aside)


def _open(
    args: Args, execution: Execution, aside: Console
) -> tuple[OpenModel, Encoder, str | None]:
    """The model, its chat template, and the system message that it was trained with."""
    if args.adapters is None:
        base = find_base(args.model)
        opened = base.load(execution, aside)
        return in_dtype(opened, execution), load_encoder(base.folder, opened.tokenizer), None
    if is_there(args.adapters / CONFIG_FILE):
        base, opened = open_peft(args.adapters, args.model, execution, aside)
        aside.print(f"[dim]{args.adapters}, adapters of peft, merged into {base}[/]")
        return in_dtype(opened, execution), load_encoder(base, opened.tokenizer), None
    checkpoint = find_checkpoint(args.adapters, args.model)
    opened = open_checkpoint(checkpoint, execution, aside)
    encode = load_encoder(checkpoint.texts, opened.tokenizer)
    how = "trained in full" if checkpoint.lora is None else "adapters merged"
    aside.print(f"[dim]{checkpoint.folder}, {how}[/]", soft_wrap=True)
    return in_dtype(opened, execution), encode, checkpoint.system


def _answer(
    args: Args,
    opened: OpenModel,
    encode: Encoder,
    prepare: Callable[[int, int], Generator],
    questions: Sequence[Question],
    console: Console,
    aside: Console,
) -> list[str]:
    """Answers conversations one by one."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be positive, got {args.batch_size}")
    ids = [encode(question.messages) for question in questions]
    longest = opened.config.max_position_embeddings
    length = cache_length(args.max_length, max(map(len, ids)) + args.max_new_tokens, longest)
    check_lengths(ids, length)
    generator = prepare(min(args.batch_size, len(ids)), length)
    told: list[int] = []
    waiting: list[str] = []

    def label(number: int) -> None:
        if (expected := questions[number].label) is not None:
            console.out(f"\n[expected] {expected}", highlight=False)

    def tell(number: int, piece: str) -> None:
        if piece:
            waiting.append(piece)
        else:  # a text begins
            if told:
                console.out("".join(waiting), highlight=False)
                label(told[-1])
                console.out()
            waiting.clear()
            told.append(number)
            console.out(
                f"> {questions[number].messages[-1].content}", style="bold", highlight=False
            )
        if args.stream:
            console.out("".join(waiting), end="", highlight=False)
            waiting.clear()

    answers = continue_texts(
        generator,
        opened.tokenizer,
        ids,
        max_new_tokens=args.max_new_tokens,
        stop_ids=opened.stop_ids,
        tell=tell,
    )
    console.out("".join(waiting), highlight=False)
    label(told[-1])
    if args.result_path is not None:
        lines = [
            json.dumps(
                {
                    "messages": [message._asdict() for message in question.messages],
                    "response": answer,
                    "labels": question.label,
                },
                ensure_ascii=False,
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        write_atomically(args.result_path, ("\n".join(lines) + "\n").encode())
    aside.print(str(generator.speed), soft_wrap=True)
    return answers


def _talk(
    args: Args,
    opened: OpenModel,
    encode: Encoder,
    prepare: Callable[[int, int], Generator],
    system: str | None,
    console: Console,
    aside: Console,
) -> list[str]:
    """Answers what is typed, until the end of the input."""
    longest = opened.config.max_position_embeddings
    generator = prepare(1, cache_length(args.max_length, min(CHAT_LENGTH, longest), longest))
    waiting: list[str] = []

    def tell(piece: str) -> None:
        if args.stream:
            console.out(piece, end="", highlight=False)
        else:
            waiting.append(piece)

    def show() -> None:
        console.out("".join(waiting), end="", highlight=False)
        waiting.clear()

    def read() -> str | None:
        show()
        said = ask(console)
        return None if said is not None and said.strip().lower() in ENDS else said

    said: list[Message] = converse(
        generator,
        opened.tokenizer,
        encode,
        system=system,
        max_new_tokens=args.max_new_tokens,
        stop_ids=opened.stop_ids,
        read=read,
        tell=tell,
        note=lambda text: aside.print(f"[dim]({text})[/]"),
    )
    aside.print(str(generator.speed), soft_wrap=True)
    return [content for role, content in said if role == "assistant"]


def main(argv: Sequence[str] | None = None) -> None:
    """The program. What its user can mend ends it with one sentence, and the exit code 1.

    Args:
        argv: Left out, the command line's.
    """
    run_program(lambda: infer(parse(Args, argv, aliases=ALIASES, foreign=IN_INFERENCE)))


if __name__ == "__main__":
    main()
