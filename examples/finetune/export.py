r"""Writes a tuned model for other programs: the command line of ms-swift's `swift export`.

    python -m examples.finetune.export --adapters output/checkpoint-20 --merge_lora true \
        --output_dir merged
    python -m examples.finetune.export --adapters output/checkpoint-20 --output_dir adapters
    python -m examples.finetune.export --adapters full/checkpoint-20 --torch_dtype bfloat16
    AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")

writes a Hugging Face directory with the adapters merged into the weights: configuration, tokenizer,
chat template, safetensors. Without `--merge_lora`, it writes the adapters as a directory of PEFT's,
to be loaded beside the base. A model that was trained in full is written whole.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import rich

from examples.finetune.checkpoint import Checkpoint, find_checkpoint
from examples.finetune.command_line import parse
from examples.finetune.foreign_flags import IN_EXPORT
from examples.finetune.lora.peft_files import write_peft
from examples.finetune.training.job import make_execution
from examples.finetune.tuned import open_checkpoint, read_adapters, with_adapters
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.together import work_together
from examples.moonlight.common.program import run_program
from examples.moonlight.common.untrusted import is_there
from examples.moonlight.generation.chat import TEMPLATE
from examples.moonlight.hf_export import MAX_SHARD_SIZE, check_unused, export_pretrained
from examples.moonlight.huggingface.config import CONFIG_FILE

ALIASES = {"dtype": "torch_dtype", "ckpt_dir": "adapters"}

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes a tuned model as a directory of Hugging Face's, or its adapters as one of PEFT's."""

    adapters: Path | None = None
    """Checkpoint of examples.finetune.sft, such as output/checkpoint-20, of LoRA or in full."""
    model: str | None = None
    """Folder of the base, where it has moved since."""
    merge_lora: bool = False
    """Write the whole model, adapters merged, in the place of the adapters alone."""
    output_dir: Path | None = None
    """Folder to write; left out, the checkpoint's name with -merged, -peft or -hf behind it."""
    torch_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights that are written; left out, in which the model was trained."""
    max_shard_size: str = f"{MAX_SHARD_SIZE // 10**9}GB"
    """Largest file, such as 5GB or 500MB."""
    mesh: str | None = None
    """Sizes of mesh axes such as fsdp=8, for a model that one device cannot hold."""
    experts: Literal["dense", "ragged"] | None = None
    """As in training; it changes nothing that is written."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


def export(args: Args) -> Path:
    """Writes what was asked for, and returns where it is.

    Raises:
        FileExistsError: The output folder is in use.
        FileNotFoundError: There is no such checkpoint, or its base is not there.
        ValueError: An argument is none, or PEFT has no place for the adapters.
    """
    console = rich.get_console()
    if args.adapters is None:
        raise ValueError("give --adapters with a checkpoint, such as output/checkpoint-20")
    execution = make_execution(args)
    shard_size = bytes_of(args.max_shard_size)
    checkpoint = find_checkpoint(args.adapters, args.model)
    merges = args.merge_lora or checkpoint.lora is None
    folder = args.output_dir or _beside(checkpoint, merges)
    if group.is_first():
        check_unused(folder)
    if not merges:
        assert checkpoint.lora is not None and checkpoint.base is not None
        with phase(console, f"reading {checkpoint.folder}"):
            factors = read_adapters(checkpoint, execution)
        model = with_adapters(checkpoint.config, execution, checkpoint.lora, factors)
        write_peft(folder, model, checkpoint.lora, base=str(checkpoint.base.folder.resolve()))
        console.print(
            f'adapters of {checkpoint.folder}: peft.PeftModel.from_pretrained(base, "{folder}")',
            highlight=False,
            soft_wrap=True,
        )
        return folder
    with phase(console, f"reading {checkpoint.folder}"):
        opened = open_checkpoint(checkpoint, execution, console)
    dtype = args.torch_dtype or checkpoint.args["torch_dtype"]
    with phase(console, f"writing {folder}"):
        export_pretrained(
            folder,
            opened.config,
            opened.params,
            opened.bias,
            tokenizer=_tokenizer_of(checkpoint),
            dtype=dtype,
            max_shard_size=shard_size,
            console=console,
        )
    console.print(
        f"{checkpoint.folder} in {dtype}: "
        f'transformers.AutoModelForCausalLM.from_pretrained("{folder}")',
        highlight=False,
        soft_wrap=True,
    )
    return folder


def bytes_of(size: str) -> int:
    """The bytes of a size such as 5GB.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?B)?", size.strip(), re.IGNORECASE)
    unit = "" if found is None or found[2] is None else found[2].upper()
    if found is None or unit not in _UNITS or not float(found[1]):
        raise ValueError(f"--max_shard_size: expected a size such as 5GB or 500MB, got {size}")
    return max(1, round(float(found[1]) * _UNITS[unit]))


def _beside(checkpoint: Checkpoint, merges: bool) -> Path:
    """A name beside the checkpoint, as ms-swift gives it."""
    kind = "hf" if checkpoint.lora is None else "merged" if merges else "peft"
    return checkpoint.folder.with_name(f"{checkpoint.folder.name}-{kind}")


def _tokenizer_of(checkpoint: Checkpoint) -> Path:
    """The folder that says most of the tokenizer: the base's, unless the template is ours."""
    base = Path(checkpoint.args["base"]["folder"]) if checkpoint.base is None else None
    folder = checkpoint.base.folder if checkpoint.base is not None else base
    assert folder is not None
    ours = is_there(checkpoint.texts / TEMPLATE) and not is_there(folder / TEMPLATE)
    return checkpoint.texts if ours or not is_there(folder / CONFIG_FILE) else folder


COMMAND_LINE = CommandLine(
    "examples.finetune.export",
    Args,
    __doc__,
    groups={"processes": "several processes"},
    underscores=True,
)

# What may lie elsewhere on each host; process 0 alone writes.
OWN_PATHS = ("adapters", "model", "output_dir")


def read(argv: Sequence[str] | None = None) -> Args:
    """Reads a command line, the process's where it is None: see `parse`."""
    return parse(Args, argv, aliases=ALIASES, foreign=IN_EXPORT, shown=COMMAND_LINE)


def main(argv: Sequence[str] | None = None) -> None:
    """The program. What its user can mend ends it with one sentence, and the exit code 1.

    Args:
        argv: Left out, the command line's.
    """

    def program() -> None:
        work_together(export, read(argv), own=OWN_PATHS, underscores=True)

    run_program(program)


if __name__ == "__main__":
    main()
