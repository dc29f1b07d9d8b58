r"""Weights into a Hugging Face directory that transformers loads without any code of ours.

    python -m examples.moonlight.hf_export --run runs/moonlight --output hf/
    python -m examples.moonlight.hf_export --run runs/moonlight --output best/ --checkpoint best
    python -m examples.moonlight.hf_export --run runs/moonlight --output exact/ --dtype float32
    AutoModelForCausalLM.from_pretrained("hf/"), AutoTokenizer.from_pretrained("hf/")

Written are the layout and the keys of the published weights: one tensor per expert, `rope_theta`,
`torch_dtype`. Tensors are fetched one by one from the devices on which they lie, and only one
shard's are on the host at a time. The directory gets its name when everything in it is written.

    python -m examples.moonlight.hf_export --run runs/moonlight --output hf/ --mesh fsdp=8 \
        --coordinator host0:1234 --processes 8 --process 0

As several processes, each reads its own parts of the weights, and the first writes them.
"""

import dataclasses
import math
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
import rich
from flax import nnx
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import save_file

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.together import work_together
from examples.moonlight.generation.model_folder import open_model
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.config import CONFIG_FILE, ModelConfig, config_fields
from examples.moonlight.huggingface.fetching import fetch
from examples.moonlight.huggingface.files import INDEX_FILE, SINGLE_FILE
from examples.moonlight.huggingface.pretrained import byte_bar, path_names
from examples.moonlight.huggingface.tokenizer import (
    GENERATION_CONFIG_FILE,
    token_ids,
    write_json,
    write_tokenizer,
)
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import make_sharding

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Of each shard, in bytes: what the host needs besides the devices' memory.
MAX_SHARD_SIZE = 2_000_000_000


def export_pretrained(
    folder: Path,
    config: ModelConfig,
    params: nnx.State,
    bias: nnx.State,
    *,
    tokenizer: Path | None = None,
    dtype: str = "bfloat16",
    max_shard_size: int = MAX_SHARD_SIZE,
    console: Console | None = None,
) -> None:
    """Writes a model as a Hugging Face directory, whole or not at all.

    Of several processes all call it, and the first writes; it returns when all is written.

    Args:
        folder: Where to; it must not exist, or be empty.
        config: The architecture.
        params: The parameters, on any devices, of this process or of all.
        bias: The routers' biases.
        tokenizer: A `tokenizer.json`, or the folder of a model or run that has one, from which
            chat template, token ids and defaults of generation come along. None writes none.
        dtype: "bfloat16" as the published weights, or "float32", which loses nothing. Router biases
            are float32 in any case, as transformers keeps them.
        max_shard_size: Bytes of tensors in a file; more only where one tensor alone has more.
        console: Shows a progress bar; None shows none.

    Raises:
        FileExistsError: The folder is in use.
        FileNotFoundError: There is no such tokenizer.
        ValueError: The dtype or the shard size is none, the tokenizer has more tokens than the
            model, or a parameter has no place in such a directory, as an adapter.
    """
    folder = folder.absolute()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be positive, got {max_shard_size}")
    leaves = {
        path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path((params, bias))
    }
    if extra := leaves.keys() - {row.path for row in hf_names.rows(config)}:
        raise ValueError(
            f"{'/'.join(map(str, min(extra, key=str)))} has no place in the directory of such a "
            "model: merge adapters into the weights first"
        )
    tensors = _fetch_shards(config, leaves, DTYPES[dtype], max_shard_size, console)
    if group.is_first():
        _write(folder, config, tensors, tokenizer, dtype)
    else:
        for _ in tensors:
            pass
    group.barrier()


def _write(
    folder: Path,
    config: ModelConfig,
    shards: Iterator["Shard"],
    tokenizer: Path | None,
    dtype: str,
) -> None:
    """Writes the directory, whole or not at all."""
    check_unused(folder)
    ids = token_ids(tokenizer, config)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        _write_weights(temporary, shards)
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer, config)
        write_json(temporary / GENERATION_CONFIG_FILE, ids.generation)
        for file in temporary.glob("*.safetensors"):
            # safetensors lets nobody else read what it writes.
            shutil.copymode(temporary / GENERATION_CONFIG_FILE, file)
        # Last, because without it nobody takes the folder for a model.
        write_json(temporary / CONFIG_FILE, config_fields(config, dtype=dtype, **ids.config))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_unused(folder: Path) -> None:
    """Checks that a directory can be written without the loss of another.

    Raises:
        FileExistsError: The folder is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is in use: choose another folder, or remove it")


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def plan_shards(
    rows: list[hf_names.Row], dtype: np.dtype, max_shard_size: int
) -> list[list[hf_names.Row]]:
    """Fills files in the table's order, each until the next tensor would be too much."""
    shards, size = [[]], 0
    for row in rows:
        row_size = _size(row, dtype)
        if shards[-1] and size + row_size > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row_size
    return shards


class Shard(NamedTuple):
    """A file of weights.

    Attributes:
        file: Its name.
        tensors: What it holds.
    """

    file: str
    tensors: dict[str, np.ndarray]


def _fetch_shards(
    config: ModelConfig,
    leaves: dict[hf_names.Path, jax.Array],
    dtype: np.dtype,
    max_shard_size: int,
    console: Console | None,
) -> Iterator[Shard]:
    """The files, one after the other; those of other processes than the first are empty."""
    rows = hf_names.table(config)
    shards = plan_shards(rows, dtype, max_shard_size)
    # Of no bytes; transformers would say that they are missing.
    empty = hf_names.empty_tensors(config)
    with byte_bar(console) as bar:
        task = bar.add_task("writing", total=sum(_size(row, dtype) for row in rows))
        for i, shard in enumerate(shards):
            file = SINGLE_FILE
            if len(shards) > 1:
                file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            if i == 0:
                tensors = {name: np.empty(shape, dtype) for name, shape in empty.items()}
            for row in shard:
                tensor = fetch(row, leaves[row.path])
                if group.is_first():
                    tensors[row.name] = np.ascontiguousarray(tensor.astype(_dtype(row, dtype)))
                bar.advance(task, _size(row, dtype))
            yield Shard(file, tensors)


def _write_weights(folder: Path, shards: Iterator[Shard]) -> None:
    weight_map, total, count = {}, 0, 0
    for file, tensors in shards:
        save_tensors(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        count += 1
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file of safetensors.

    Raises:
        OSError: It cannot be written, for want of space, say.
    """
    try:
        # transformers asks for the format, and takes no other word than this.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(
            f"{path.parent.parent}: weights cannot be written there ({error}); make room, or "
            "choose another folder"
        ) from error


def _dtype(row: hf_names.Row, dtype: np.dtype) -> np.dtype:
    return DTYPES["float32"] if row.path[-2:] == ("router", "bias") else dtype


def _size(row: hf_names.Row, dtype: np.dtype) -> int:
    return math.prod(row.shape) * _dtype(row, dtype).itemsize


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes a trained model as a Hugging Face directory."""

    run: Path
    """Output folder of a training run; or a Hugging Face directory, to write it anew."""
    output: Path
    """Directory to write; it must not exist, or be empty."""
    checkpoint: str = "last"
    """Of a run: last, best by validation loss, or a step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights: as the published ones, or without any loss."""
    max_shard_gb: float = MAX_SHARD_SIZE / 1e9
    """Largest file, in units of 10^9 bytes."""
    mesh: str | None = None
    """Sizes of mesh axes such as fsdp=8, for a model that one device cannot hold."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


def export(args: Args) -> None:
    """Reads the model onto the devices, and writes it from there.

    Raises:
        FileExistsError: The output folder is in use.
        FileNotFoundError: There is no such run, checkpoint or tokenizer.
        ValueError: An argument is none, or the model is of another version.
    """
    if not 1e-9 <= args.max_shard_gb < float("inf"):
        raise ValueError(f"--max-shard-gb must be positive, got {args.max_shard_gb}")
    if group.is_first():
        check_unused(args.output)
    console = rich.get_console()
    checkpoint = int(args.checkpoint) if args.checkpoint.isdecimal() else args.checkpoint
    with phase(console, f"reading {args.run}"):
        model = open_model(
            args.run,
            Execution(sharding=make_sharding(args.mesh)),
            checkpoint=checkpoint,
            console=console,
        )
    with phase(console, f"writing {args.output}"):
        export_pretrained(
            args.output,
            model.config,
            model.params,
            model.bias,
            tokenizer=args.run,
            dtype=args.dtype,
            max_shard_size=round(args.max_shard_gb * 1e9),
            console=console,
        )
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    console.print(
        f"{hf_names.total_size(model.config):,} numbers, {size / 1e9:,.3f} GB in {args.dtype}: "
        f'transformers.AutoModelForCausalLM.from_pretrained("{args.output}")',
        highlight=False,
        soft_wrap=True,
    )


COMMAND_LINE = CommandLine(
    "examples.moonlight.hf_export", Args, __doc__, groups={"processes": "several processes"}
)

# What may lie elsewhere on each host; process 0 alone writes.
OWN_PATHS = ("run", "output")


def main() -> None:
    """The program."""
    COMMAND_LINE.run(lambda args: work_together(export, args, own=OWN_PATHS))


if __name__ == "__main__":
    main()
