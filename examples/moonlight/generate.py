"""Text from a model: prompts, or a conversation.

    python -m examples.moonlight.generate --model runs/moonlight --prompt "def " --prompt "class "
    python -m examples.moonlight.generate --model Moonlight-16B-A3B-Instruct --chat
    python -m examples.moonlight.generate --model hf/ --prompts-file prompts.txt --temperature 0

A model is a Hugging Face directory or the folder of a training run. The text goes to the standard
output as it is drawn, what else there is to say to the standard error.

    python -m examples.moonlight.generate --model hf/ --mesh tensor=4 --local-processes 4 --chat

As several processes, each reads its own parts of the weights, and the first reads the prompts and
the terminal and prints; the texts are those of one process, to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from tokenizers import Tokenizer

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.json_text import read_jsonl
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import of_first
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.together import work_together
from examples.moonlight.common.untrusted import read_text
from examples.moonlight.data.tokenizer import encode_text
from examples.moonlight.generation.chat import Encoder, Message, load_chat_template
from examples.moonlight.generation.decoding import check_lengths
from examples.moonlight.generation.model_folder import open_folder
from examples.moonlight.generation.sampling import Sampling
from examples.moonlight.generation.texts import continue_texts, converse, encoder_of_first
from examples.moonlight.model.execution.dtype import compute_dtype
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import make_sharding

# A conversation's cache where --max-length is silent: more would be memory that few of them use.
CHAT_LENGTH = 8192

# The shortest cache; longer ones double, so that few lengths are ever compiled.
LEAST_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes text with a model."""

    model: Path
    """Hugging Face directory, or the output folder of a training run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be repeated."""
    prompts_file: Path | None = None
    """Texts to continue: one a line, or in a .jsonl file one {"prompt": "..."} a line."""
    message: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A user's message to answer, by the model's chat template; may be repeated."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Talk: one message after the other, until the end of the input (Ctrl-D). Ctrl-C stops an
    answer."""
    system: str | None = None
    """System message of --message and --chat."""
    checkpoint: str = "last"
    """Of a run: last, best by validation loss, or a step."""
    max_new_tokens: int = 512
    """Tokens to write, at most, per text or answer."""
    max_length: int | None = None
    """Tokens of the longest text, prompt included: the size of the cache. Left out, as long as the
    prompts ask for, and for --chat up to 8192."""
    temperature: float = 0.8
    """Divides the logits: below 1 the likely becomes likelier; 0 takes the likeliest."""
    top_k: int | None = None
    """Draw from that many of the likeliest tokens."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws. A text's draws depend on it and on the text's number, not on the batch."""
    batch_size: int = 8
    """Texts that go through the model together."""
    prefill_chunk: int = 128
    """Tokens of a prompt that go through the model together."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations, products and the cache; left out, bfloat16 on TPUs and on GPUs that have
    instructions for it, else float32."""
    experts: Literal["dense", "ragged"] | None = None
    """How routed experts are computed; left out, dense on CPU, else ragged."""
    mesh: str | None = None
    """Sizes of the mesh axes, such as data=2,tensor=4, as in training; left out, one device, or
    data=all of several processes."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


def read_prompts(path: Path) -> list[str]:
    """Reads a file of prompts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no prompt, or a line does not hold one.
    """
    if not path.exists():
        raise FileNotFoundError(f"--prompts-file {path}: no such file")
    if path.suffix == ".jsonl":
        prompts = [prompt for _, prompt in read_jsonl(path, "prompt")]
    else:
        prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path}: no prompt in it")
    return prompts


def cache_length(asked: int | None, needed: int, longest: int) -> int:
    """The tokens of the cache: what was asked for, or a power of two from what is needed.

    Raises:
        ValueError: What was asked for is more than the model's longest text.
    """
    if asked is None:
        return min(max(LEAST_LENGTH, 1 << (needed - 1).bit_length()), longest)
    if not 1 < asked <= longest:
        raise ValueError(
            f"--max-length must be from 2 to the model's {longest} positions, got {asked}"
        )
    return asked


def generate(args: Args, console: Console | None = None) -> list[str]:
    """Writes what was asked for, and returns it: continuations, or the answers of a conversation.

    Args:
        args: The command line's arguments.
        console: Where the text goes; None is the standard output.

    Raises:
        FileNotFoundError: The model's folder, or the file of prompts, is not there.
        ValueError: An argument is out of its range, or does not fit the others or the model.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    prompts = list(args.prompt)
    if (path := args.prompts_file) is not None:
        prompts += of_first(lambda: read_prompts(path))
    if [bool(prompts), bool(args.message), args.chat].count(True) != 1:
        raise ValueError("give one of --prompt (or --prompts-file), --message and --chat")
    if prompts and args.system is not None:
        raise ValueError("--system goes with --message or --chat: a prompt is continued as it is")
    for flag, value in (
        ("--batch-size", args.batch_size),
        ("--max-new-tokens", args.max_new_tokens),
        ("--prefill-chunk", args.prefill_chunk),
    ):
        if value < 1:
            raise ValueError(f"{flag} must be positive, got {value}")

    quiet = not group.is_first()
    console = console or Console(highlight=False, quiet=quiet)
    aside = Console(stderr=True, highlight=False, quiet=quiet)
    on_cpu = jax.default_backend() == "cpu"
    execution = Execution(
        dtype=jnp.dtype(compute_dtype(args.compute_dtype)[0]),
        experts=args.experts or ("dense" if on_cpu else "ragged"),
        sharding=make_sharding(args.mesh),
    )
    checkpoint = int(args.checkpoint) if args.checkpoint.isdecimal() else args.checkpoint
    with phase(aside, f"reading {args.model}"):
        folder = open_folder(args.model, checkpoint)
        tokenizer, longest = folder.tokenizer, folder.config.max_position_embeddings
        # What does not fit the model is refused before its weights are read.
        encode = encoder_of(args, tokenizer)
        system = [] if args.system is None else [Message("system", args.system)]
        asked = prompts or args.message  # of a conversation nothing yet
        ids = [encode([*system, Message("user", text)]) for text in asked]
        needed = max((len(each) + args.max_new_tokens for each in ids), default=CHAT_LENGTH)
        length = cache_length(args.max_length, min(needed, longest), longest)
        check_lengths(ids, length, longest)
        opened = folder.load(execution, console=aside)

    prepare = functools.partial(
        opened.generator,
        aside,
        length=length,
        chunk=args.prefill_chunk,
        sampling=sampling,
        sharding=execution.sharding,
    )
    if args.chat:
        generator = prepare(1)
        said = converse(
            generator,
            tokenizer,
            encode,
            system=args.system,
            max_new_tokens=args.max_new_tokens,
            stop_ids=opened.stop_ids,
            read=lambda: ask(console),
            tell=lambda piece: console.out(piece, end="", highlight=False),
            note=lambda text: aside.print(f"[dim]({text})[/]"),
        )
        aside.print(str(generator.speed), soft_wrap=True)
        return [content for role, content in said if role == "assistant"]
    if length < needed:
        aside.print(f"texts end at {length} tokens, prompt included: that is what the cache holds")
    generator = prepare(min(args.batch_size, len(ids)))
    texts = continue_texts(
        generator,
        tokenizer,
        ids,
        max_new_tokens=args.max_new_tokens,
        stop_ids=opened.stop_ids,
        tell=teller(console, asked, inline=bool(prompts)),
    )
    console.out()
    aside.print(str(generator.speed), soft_wrap=True)
    return texts


def encoder_of(args: Args, tokenizer: Tokenizer) -> Encoder:
    """The model's chat template; of prompts, which are continued as they are, their tokens."""
    if args.chat or args.message:
        return encoder_of_first(lambda: load_chat_template(args.model, tokenizer))
    return lambda messages: encode_text(tokenizer, messages[-1].content)


def teller(
    console: Console, prompts: Sequence[str], *, inline: bool
) -> Callable[[int, str], object]:
    """Prints each prompt, and its continuation behind it, or below it."""

    def tell(number: int, piece: str) -> None:
        if piece:
            console.out(piece, end="", highlight=False)
            return
        if len(prompts) > 1:
            console.out("\n" if number else "", end="")
            console.rule(f"{number + 1} of {len(prompts)}")
        console.out(prompts[number], end="" if inline else "\n\n", style="bold", highlight=False)

    return tell


def ask(console: Console) -> str | None:
    """The user's next message; None at the end of the input."""
    try:
        return console.input("\n[bold]> [/]")
    except (EOFError, KeyboardInterrupt):
        return None


GROUPS = {
    "model": "model",
    "prompt": "text",
    "max_new_tokens": "length",
    "temperature": "sampling",
    "batch_size": "device",
    "processes": "several processes",
}

# What may lie elsewhere on each host; process 0 alone reads the prompts.
OWN_PATHS = ("model", "prompts_file")

COMMAND_LINE = CommandLine("examples.moonlight.generate", Args, __doc__, groups=GROUPS)


def main() -> None:
    """The program."""
    aside = Console(stderr=True, highlight=False)
    COMMAND_LINE.run(
        lambda args: work_together(generate, args, own=OWN_PATHS, reads=args.chat, console=aside)
    )


if __name__ == "__main__":
    main()
