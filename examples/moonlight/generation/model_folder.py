"""A model with its tokenizer, from a Hugging Face directory or from a training run's folder."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from rich.console import Console
from tokenizers import Tokenizer

from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.common.json_text import MAX_JSON
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes.agreement import everywhere_equal
from examples.moonlight.common.untrusted import check_inside, is_there, read_bytes, shown
from examples.moonlight.data.tokenized import END_OF_TEXT
from examples.moonlight.data.tokenizer import CONFIG, listed_ids, load_tokenizer
from examples.moonlight.generation.chat import END, TEMPLATE, special_token
from examples.moonlight.generation.decoding import Generator
from examples.moonlight.huggingface.config import CONFIG_FILE, ModelConfig
from examples.moonlight.huggingface.names import extent
from examples.moonlight.huggingface.pretrained import (
    abstract_model,
    check_pretrained,
    load_pretrained,
)
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.run_folder import storage
from examples.moonlight.run_folder.folder import SETTINGS, checkpoints_of
from examples.moonlight.run_folder.reading import read_model

GENERATION_CONFIG = "generation_config.json"

# Tokens that end a text by their name, whether or not a configuration says so: Moonlight's, and
# that of the corpora that `tokenized.py` makes.
STOP_TOKENS = (END, "[EOS]", END_OF_TEXT)


# What a model's folder says of texts and their ends, besides the tokenizer.
COMPANIONS = (CONFIG, TEMPLATE, GENERATION_CONFIG)


class OpenModel(NamedTuple):
    """A model that can be run: `nnx.merge(graphdef, params, bias)`.

    Attributes:
        config: The architecture.
        graphdef: Static half of the model.
        params: The parameters.
        bias: The routers' biases; empty for a dense model.
        tokenizer: Its ids are rows of the embedding.
        stop_ids: Tokens that end a text.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    bias: nnx.State
    tokenizer: Tokenizer
    stop_ids: frozenset[int]

    def generator(self, console: Console, rows: int, length: int, **options: Any) -> Generator:
        """Compiles the model for `rows` texts of `length` tokens, and says so on the console.

        Args:
            console: Where it is said.
            rows: Texts that go through the model together.
            length: Tokens of the longest text, prompt included.
            **options: Others of `Generator`: the sampling, the chunk, the sharding.
        """
        with phase(console, f"compiling for {rows} x {length} tokens"):
            return Generator(
                self.graphdef, self.params, self.bias, batch=rows, length=length, **options
            )


class ModelFolder(NamedTuple):
    """What a model's folder says of the model, before its weights are read.

    Attributes:
        path: A Hugging Face directory, or the output folder of a training run.
        checkpoint: The checkpoint of a run: "last", "best" by validation loss, or a step.
        config: The architecture.
        tokenizer: Its ids are rows of the embedding.
    """

    path: Path
    checkpoint: str | int
    config: ModelConfig
    tokenizer: Tokenizer

    def load(
        self,
        execution: Execution,
        *,
        param_dtype: DTypeLike | None = None,
        console: Console | None = None,
    ) -> OpenModel:
        """Reads the weights onto the devices of an execution.

        Args:
            execution: How the model will be run.
            param_dtype: The dtype of a directory's parameters; None is the execution's. Those of a
                run are float32.
            console: Shows progress; None shows none.

        Raises:
            FileNotFoundError: The folder lacks a file.
            ValueError: A file is malformed, or several processes have different models.
        """
        folder, config = self.path, self.config
        check_same_model(config, self.tokenizer)
        published = is_there(folder / CONFIG_FILE)
        if not published:
            _check_run(folder, config, self.checkpoint)
        graphdef, *abstract = abstract_model(config, execution)
        if published:
            half = jnp.dtype(execution.dtype) == jnp.bfloat16
            dtype = param_dtype or (jnp.bfloat16 if half else jnp.float32)
            _, params, bias = load_pretrained(folder, execution, param_dtype=dtype, console=console)
        else:
            params, bias = _read_run(folder, abstract, execution, self.checkpoint)
        stops = stop_tokens(folder, self.tokenizer)
        return OpenModel(config, graphdef, params, bias, self.tokenizer, stops)


def open_folder(folder: Path, checkpoint: str | int = "last") -> ModelFolder:
    """Reads a model's configuration and tokenizer.

    Args:
        folder: A Hugging Face directory, or the output folder of a training run.
        checkpoint: The checkpoint of a run: "last", "best" by validation loss, or a step.

    Raises:
        FileNotFoundError: The folder holds neither, or lacks a file.
        ValueError: A file is malformed, the tokenizer has more tokens than the model, or a
            checkpoint is asked for where there is none to choose.
    """
    published = is_there(folder / CONFIG_FILE)
    if not published and not is_there(folder / SETTINGS):
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder}: there is no such folder; give a Hugging Face directory, or the output "
                "folder of a training run"
            )
        raise FileNotFoundError(
            f"{folder} is no model: found neither {CONFIG_FILE}, of a Hugging Face directory, nor "
            f"{SETTINGS}, of a training run"
        )
    if published and checkpoint != "last":
        raise ValueError(
            f"--checkpoint {checkpoint}: {folder} is a Hugging Face directory, which has one set "
            "of weights: leave it out"
        )
    config = check_pretrained(folder) if published else run_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, and the model's "
            f"vocabulary {config.vocab_size}: they do not belong together"
        )
    return ModelFolder(folder, checkpoint, config, tokenizer)


def open_model(
    folder: Path,
    execution: Execution,
    *,
    checkpoint: str | int = "last",
    param_dtype: DTypeLike | None = None,
    console: Console | None = None,
) -> OpenModel:
    """Reads a model onto the devices of an execution: `open_folder`, then `ModelFolder.load`."""
    opened = open_folder(folder, checkpoint)
    return opened.load(execution, param_dtype=param_dtype, console=console)


def check_same_model(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Makes sure that several processes, which may read from disks of their own, read one model.

    Raises:
        ValueError: Its architecture or its tokenizer is another one elsewhere.
    """
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
    everywhere_equal(dataclasses.asdict(config) | {"tokenizer": digest}, "the model")


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text, by all that a model's folder says.

    Raises:
        ValueError: `eos_token_id` is neither an id nor a list of ids.
    """
    path = folder / CONFIG
    names = (*STOP_TOKENS, special_token(read_json(path, missing_ok=True), "eos_token", path))
    vocab = tokenizer.get_vocab()
    ids = {vocab[name] for name in names if name in vocab}
    for file in (GENERATION_CONFIG, CONFIG_FILE):
        fields = read_json(folder / file, missing_ok=True)
        ids.update(listed_ids(fields, "eos_token_id", folder / file))
    return frozenset(ids)


def copy_companions(source: Path, folder: Path) -> None:
    """Gives a run the chat template and the stop ids of the model that it begins with."""
    for name in COMPANIONS:
        path = source / name
        if is_there(path):
            check_inside(path, source)
            write_atomically(folder / name, read_bytes(path, limit=MAX_JSON))


def run_config(folder: Path) -> ModelConfig:
    """The architecture of a training run.

    Raises:
        ValueError: Its settings cannot be read, or describe no model of this version.
    """
    path = folder / SETTINGS
    return config_of(read_json(path, missing_ok=True), path)


def config_of(settings: Mapping[str, Any], path: Path) -> ModelConfig:
    """The architecture that a file of settings has as its `config`.

    Args:
        settings: What the file holds.
        path: The file, for messages.

    Raises:
        ValueError: It describes no model of this version.
    """
    fields = settings.get("config", {})
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: config: expected an object, got {shown(fields)}")
    family: Any = MoonlightConfig if "kv_lora_rank" in fields else DenseConfig
    try:
        config = family(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its config describes no model of this version ({error}): train again"
        ) from error
    return config


def _check_run(folder: Path, config: ModelConfig, checkpoint: str | int) -> None:
    """Compares a run's configuration with its checkpoints, before anything of its size is built."""
    numbers = extent(config).numbers
    directory = checkpoints_of(folder)
    there = storage.files(directory) if directory.is_dir() else []
    size = sum(storage.size(directory / name) for name in there)
    if not size:
        raise FileNotFoundError(
            f"{directory} has no checkpoint {checkpoint}: the run has saved none yet; "
            "train on, with --resume"
        )
    # Weights hardly compress; to a thousandth they don't.
    if numbers > 1000 * size:
        raise ValueError(
            f"{folder / SETTINGS}: its config describes a model of {numbers:,} numbers, and "
            f"{directory} has {size:,} bytes: the file is damaged, or of another run"
        )


def _read_run(folder: Path, abstract: Any, execution: Execution, checkpoint: str | int) -> Any:
    place = execution.sharding
    shardings = (
        place.param_shardings(abstract[0]),
        jax.tree.map(lambda _: place.place(), abstract[1]),
    )
    params, bias = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tuple(abstract),
        shardings,
    )
    target = {"params": params, "router_bias": bias}
    _, model = read_model(checkpoints_of(folder), target, checkpoint)
    return model["params"], model["router_bias"]
