"""Checks a Hugging Face directory as the import does, headers only, and says what it holds.

    python -m examples.moonlight.hf_check --model hf/
    python -m examples.moonlight.hf_check --model Qwen2.5-0.5B-Instruct
    python -m examples.moonlight.hf_check --model Moonlight-16B-A3B-Instruct

reads no weights, and so takes neither long nor much memory.
"""

import collections
import dataclasses
from pathlib import Path

import rich
from rich.table import Table

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.pretrained import checked_files, left_out


@dataclasses.dataclass(frozen=True)
class Args:
    """Checks a Hugging Face directory and says what it holds; reads headers only."""

    model: Path
    """Folder with config.json and safetensors."""


def check(args: Args) -> None:
    """Checks a directory as `load_pretrained` does, and prints a summary."""
    with checked_files(args.model) as (config, files, rows):
        dtypes = collections.Counter(info.dtype for info in files.tensors.values())
        shards = {info.file for info in files.tensors.values()}
        size = sum(file.stat().st_size for file in shards)
        words = left_out(files, config)
    fused = any(row.rows for row in rows)
    table = Table(show_header=False)
    for name, value in (
        ("numbers", f"{hf_names.total_size(config):,}"),
        ("tensors", f"{len(hf_names.shapes(rows)):,}" + (", experts fused" if fused else "")),
        ("dtypes", ", ".join(f"{dtype} ({count:,})" for dtype, count in dtypes.items())),
        ("files", f"{len(shards)}, {size / 1e9:,.3f} GB"),
        *((field.name, str(getattr(config, field.name))) for field in dataclasses.fields(config)),
    ):
        table.add_row(name, value)
    console = rich.get_console()
    console.print(f"{args.model} can be loaded", soft_wrap=True)
    console.print(table)
    if words:
        console.print(words, markup=False, highlight=False, soft_wrap=True)


COMMAND_LINE = CommandLine("examples.moonlight.hf_check", Args, __doc__)


def main() -> None:
    """The program."""
    COMMAND_LINE.run(check)


if __name__ == "__main__":
    main()
