"""Weights from a Hugging Face directory, read straight to where they lie on a mesh.

Each device's part of a parameter is read by itself, from those bytes of the files that it consists
of: one part is on the host at a time, and no device sees another's. Nothing is allocated before
`config.json`, the index and every tensor's name, shape and dtype are known to fit, so that a model
is loaded whole or not at all; `hf_check.py` does that alone.
"""

import collections
import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from rich import progress
from rich.console import Console

from examples.moonlight.common.untrusted import shown_name
from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.config import (
    CONFIG_FILE,
    ModelConfig,
    layers_ahead,
    parse_config,
    read_fields,
)
from examples.moonlight.huggingface.files import TensorFiles, first_not_finite
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import Dense
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.moonlight import Moonlight

PARAM_DTYPES = ("float32", "bfloat16")

# Of every axis: where a part begins and ends.
Bounds = tuple[tuple[int, int], ...]


class Pretrained(NamedTuple):
    """A model as it was read: `nnx.merge(graphdef, params, bias)` runs it.

    Attributes:
        config: The architecture.
        params: The parameters, float32 masters or bfloat16.
        bias: The routers' biases, float32; empty for a dense model.
    """

    config: ModelConfig
    params: nnx.State
    bias: nnx.State


def load_pretrained(
    folder: Path,
    execution: Execution | None = None,
    *,
    param_dtype: DTypeLike = jnp.float32,
    console: Console | None = None,
) -> Pretrained:
    """Reads a `deepseek_v3`, `qwen2` or `llama` directory onto the devices of an execution.

    Args:
        folder: Holds `config.json` and safetensors, in one file or in shards, experts one by one or
            fused, in float32, bfloat16 or float16.
        execution: Its `sharding` says what lies where; None is one device.
        param_dtype: The parameters' dtype: float32 to train, where lr * weight decay of 3e-5 would
            vanish in a bfloat16 weight; bfloat16 halves the memory of generation. Router biases are
            float32 in any case.
        console: Shows a progress bar, and says what is left out; None does neither.

    Returns:
        The configuration, the parameters and the router biases.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The configuration is not supported, a file is damaged or leads out of the
            folder, or a tensor is missing, too many, has another shape than the model's, or holds
            NaN, infinity, or a number that is infinite in `param_dtype`.
    """
    if jnp.dtype(param_dtype).name not in PARAM_DTYPES:
        raise ValueError(
            f"param_dtype must be one of {PARAM_DTYPES}, got {jnp.dtype(param_dtype).name}"
        )
    execution = execution or Execution()
    with checked_files(folder) as (config, files, rows):
        if console is not None and (words := left_out(files, config)):
            console.print(words, markup=False, highlight=False, soft_wrap=True)
        _, params, bias = abstract_model(config, execution)
        place = execution.sharding
        shardings = (
            place.param_shardings(params),
            jax.tree.map(lambda _: place.place(), bias),
        )
        by_path = collections.defaultdict(list)
        for row in rows:
            by_path[row.path].append(row)
        leaves, treedef = jax.tree_util.tree_flatten_with_path((params, bias))
        numbers = sum(math.prod(leaf.shape) for _, leaf in leaves)
        with byte_bar(console) as bar:
            task = bar.add_task("reading", total=numbers * jnp.dtype(param_dtype).itemsize)
            arrays = []
            for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
                names = path_names(path)
                dtype = jnp.float32 if names[-2:] == ("router", "bias") else param_dtype
                arrays.append(read_parameter(files, by_path[names], leaf.shape, dtype, sharding))
                bar.advance(task, math.prod(leaf.shape) * jnp.dtype(param_dtype).itemsize)
    return Pretrained(config, *jax.tree.unflatten(treedef, arrays))


def make_model(config: ModelConfig, *, rngs: nnx.Rngs, execution: Execution) -> Moonlight | Dense:
    """A model of either family with new weights."""
    if isinstance(config, MoonlightConfig):
        return Moonlight(config, rngs=rngs, execution=execution)
    return Dense(config, rngs=rngs, execution=execution)


def abstract_model(config: ModelConfig, execution: Execution) -> tuple[Any, nnx.State, nnx.State]:
    """The model's graphdef, parameters and router biases, with shapes only."""
    model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0), execution=execution))
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return graphdef, params, bias


def path_names(path: Iterable[Any]) -> hf_names.Path:
    """The keys of nested dicts in a JAX key path."""
    return tuple(key.key for key in path if hasattr(key, "key"))


def check_pretrained(folder: Path) -> ModelConfig:
    """Reads the configuration of a directory whose files hold the model that it describes.

    Only headers are read. What a configuration alone says may be of any size: nothing is built from
    it before.

    Raises:
        FileNotFoundError: Where `load_pretrained` would.
        ValueError: Where `load_pretrained` would, but for values, which are not read.
    """
    with checked_files(folder) as (config, _, _):
        return config


@contextlib.contextmanager
def checked_files(folder: Path) -> Iterator[tuple[ModelConfig, TensorFiles, list[hf_names.Row]]]:
    """A directory's configuration, its opened files, and the table that they match.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The configuration is not supported, a file is damaged or leads out of the
            folder, or a tensor is missing, too many, or has another shape than the model's.
    """
    fields = read_fields(folder)
    config = parse_config(fields, where=str(folder / CONFIG_FILE))
    with TensorFiles(folder) as files:
        yield config, files, matching_table(files, config, ahead=layers_ahead(fields))


def tensors_ahead(
    files: TensorFiles, config: ModelConfig, ahead: int | None = None
) -> dict[int, list[str]]:
    """The tensors, by layer, of layers behind the last that predict tokens further ahead.

    They are no part of the model, here as in transformers, and are left out. Such a layer is known
    by its projection of two tokens' activations; others behind the last are a mistake.

    Args:
        files: What there is.
        config: The architecture.
        ahead: How many such layers there may be; None is any number.
    """
    found: dict[int, list[str]] = {}
    for name in files.tensors:
        match = re.match(r"model\.layers\.(\d{1,9})\.", name)
        layer = int(match[1]) - config.num_hidden_layers if match else -1
        if match and layer >= 0 and (ahead is None or layer < ahead):
            found.setdefault(int(match[1]), []).append(name)
    return {
        layer: names
        for layer, names in found.items()
        if f"model.layers.{layer}.{hf_names.AHEAD}" in names
    }


def left_out(files: TensorFiles, config: ModelConfig) -> str:
    """A sentence on the tensors that are not read; "" if all are."""
    layers = tensors_ahead(files, config)
    if not layers:
        return ""
    names = ", ".join(f"model.layers.{layer}" for layer in layers)
    count = sum(map(len, layers.values()))
    return f"left out, as transformers does: {names}, {count} tensors that predict further ahead"


def matching_table(
    files: TensorFiles, config: ModelConfig, *, ahead: int = 0
) -> list[hf_names.Row]:
    """The table for the layout that the files have, once every tensor is there as it says.

    Args:
        files: What there is.
        config: The architecture.
        ahead: How many layers behind the last may be left out; see `tensors_ahead`.

    Raises:
        ValueError: A tensor is missing, too many, or has another shape.
    """
    fused = any(name.endswith(hf_names.FUSED_EXPERTS) for name in files.tensors)
    rows: list[hf_names.Row] = []
    for row in hf_names.rows(config, fused=fused):
        # Row by row: the files bound how many there are, whatever config.json asks for.
        if row.name not in files.tensors:
            raise ValueError(
                f"{files.folder}: {row.name} is missing; config.json asks for "
                f"{hf_names.extent(config, fused=fused).tensors:,} tensors, and the files hold "
                f"{len(files.tensors):,}: fetch the missing files, or the config.json of these"
            )
        rows.append(row)
    expected = hf_names.shapes(rows)
    unread = {name for names in tensors_ahead(files, config, ahead).values() for name in names}
    extra = [
        name
        for name, info in files.tensors.items()
        if name not in expected
        and not name.endswith(hf_names.ROPE_BUFFER)
        and name not in unread
        and 0 not in info.shape
    ]
    if extra and extra != [hf_names.HEAD]:
        raise ValueError(
            f"{files.folder}: {_some(extra)} not part of the model that config.json describes"
        )
    for name, shape in expected.items():
        found = files.tensors[name]
        if found.shape != shape:
            raise ValueError(
                f"{name} in {found.file} has the shape {list(found.shape)}; config.json asks for "
                f"{list(shape)}"
            )
    if extra:
        _check_tied(files)
    return rows


def read_parameter(
    files: TensorFiles,
    rows: list[hf_names.Row],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: Sharding,
) -> jax.Array:
    """Reads a parameter, part by part: replicas share one reading.

    `jax.make_array_from_callback` would hold the parts of all local devices on the host at once,
    and read those of replicas once for each.

    Args:
        files: What to read from.
        rows: What the parameter consists of.
        shape: Its whole shape.
        dtype: Its dtype in memory.
        sharding: Where its parts go.
    """
    replicas = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        replicas[bounds_of(index, shape)].append(device)
    parts = []
    for bounds, devices in replicas.items():
        part = read_part(files, rows, bounds, dtype)
        parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def bounds_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Slices of an array as numbers."""
    return tuple(axis.indices(length)[:2] for axis, length in zip(index, shape, strict=True))


def read_part(
    files: TensorFiles, rows: list[hf_names.Row], bounds: Bounds, dtype: DTypeLike
) -> np.ndarray:
    """Reads a block of a parameter, from the tensors of which it consists."""
    part = np.empty([stop - start for start, stop in bounds], dtype)
    for row in rows:
        stack, inner = bounds[: len(row.at)], bounds[len(row.at) :]
        if not all(a <= i < b for i, (a, b) in zip(row.at, stack, strict=True)):
            continue
        if row.transposed:
            *outer, cols, (first, last) = inner
            inner = (*outer, (first + row.first, last + row.first), cols)
        # Cast as it lies, then transposed: NumPy takes six times as long for both at once.
        block = files.read(row.name, tuple(slice(*axis) for axis in inner))
        cast = block.astype(dtype, copy=False)
        if cast.itemsize < block.itemsize and first_not_finite(cast) is not None:
            raise ValueError(
                f"{row.name} in {files.tensors[row.name].file} holds numbers that are infinite in "
                f"{cast.dtype}: load it as {block.dtype}"
            )
        place = tuple(i - a for i, (a, _) in zip(row.at, stack, strict=True))
        part[place] = np.swapaxes(cast, -1, -2) if row.transposed else cast
    return part


def byte_bar(console: Console | None) -> progress.Progress:
    """A progress bar that counts bytes; in a pipe it would leave an empty line alone."""
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console is None or not (console.is_terminal or console.is_jupyter),
    )


def _check_tied(files: TensorFiles) -> None:
    """Accepts a head in the file of a tied model, if it is the embedding."""
    embedding, block = hf_names.EMBEDDING, 4096
    head, table = files.tensors[hf_names.HEAD], files.tensors[embedding]
    rows = table.shape[0]
    parts = [
        (slice(start, min(start + block, rows)), slice(0, table.shape[1]))
        for start in range(0, rows, block)
    ]
    same = head.shape == table.shape and all(
        np.array_equal(files.read(hf_names.HEAD, part), files.read(embedding, part))
        for part in parts
    )
    if not same:
        raise ValueError(
            f"{hf_names.HEAD} in {head.file} differs from {embedding}, and config.json ties them: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def _some(names: list[str]) -> str:
    others = len(names) - 1
    return shown_name(names[0]) + (f" and {others} other tensors are" if others else " is")
