"""A tuned model, ready to run or to be written: a checkpoint of ours, or a model as it is.

Whatever is decoded or exported from here has the adapters merged into its weights: no program below
this one meets a model with adapters beside it, and none can take the base for the tuned model.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from examples.finetune.base import check_base, find_base
from examples.finetune.checkpoint import Checkpoint
from examples.finetune.lora.adapters import LoraConfig
from examples.finetune.lora.merge import merged
from examples.finetune.lora.peft_files import CONFIG_FILE, read_peft
from examples.finetune.training.adapted import adapted
from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import shown
from examples.moonlight.data.tokenizer import load_tokenizer
from examples.moonlight.generation.model_folder import OpenModel, stop_tokens
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.huggingface.pretrained import abstract_model
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.run_folder.reading import read_folder


def open_checkpoint(
    checkpoint: Checkpoint, execution: Execution, console: Console | None = None
) -> OpenModel:
    """Reads a checkpoint's model onto the devices of an execution, adapters merged.

    Raises:
        Damaged: The checkpoint is not what was saved.
        ValueError: The base has other weights than those that the adapters were trained beside.
    """
    config, place = checkpoint.config, execution.sharding
    graphdef, params, bias = abstract_model(config, execution)
    shardings = place.param_shardings(params), jax.tree.map(lambda _: place.place(), bias)
    if checkpoint.lora is None or checkpoint.base is None:
        target = {
            "params": _placed(params, shardings[0]),
            "router_bias": _placed(bias, shardings[1]),
        }
        model = read_folder(checkpoint.folder, target)
        params, bias = model["params"], model["router_bias"]
    else:
        opened = checkpoint.base.load(execution, console)
        check_base(
            checkpoint.args["base"]["digest"], (opened.params, opened.bias), checkpoint.base.folder
        )
        factors = read_adapters(checkpoint, execution)
        weights = opened.params, opened.bias
        whole = with_adapters(config, execution, checkpoint.lora, factors, weights)
        _, params, bias = nnx.split(merged(whole), nnx.Param, RouterBias)
    tokenizer = load_tokenizer(checkpoint.texts)
    stop_ids = stop_tokens(checkpoint.texts, tokenizer)
    return OpenModel(config, graphdef, params, bias, tokenizer, stop_ids)


def open_peft(
    folder: Path, model: str | None, execution: Execution, console: Console | None = None
) -> tuple[Path, OpenModel]:
    """Reads a directory of PEFT's and its base, adapters merged.

    Args:
        folder: Holds `adapter_config.json`.
        model: The base; None takes it from the directory.
        execution: How it will be run.
        console: Shows progress; None shows none.

    Returns:
        The base's folder, and the model.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: The adapters are not for this model, or no plain LoRA.
    """
    named = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if model is None and not (isinstance(named, str) and Path(named).is_dir()):
        raise FileNotFoundError(
            f"--adapters {folder}: its base is {shown(named)}, which is no folder here: give "
            "--model with the base's folder"
        )
    base = find_base(model or named)
    opened = base.load(execution, console)
    whole: Any = nnx.merge(opened.graphdef, opened.params, opened.bias)
    read_peft(folder, whole)
    _, params, bias = nnx.split(merged(whole), nnx.Param, RouterBias)
    return base.folder, opened._replace(params=params, bias=bias)


def read_adapters(checkpoint: Checkpoint, execution: Execution) -> nnx.State:
    """The factors of a checkpoint.

    Raises:
        Damaged: The checkpoint is not what was saved.
    """
    assert checkpoint.lora is not None
    lora, place = checkpoint.lora, execution.sharding
    model = nnx.eval_shape(lambda: adapted(checkpoint.config, execution, lora))
    factors = nnx.state(model, nnx.LoRAParam)
    target = {"adapters": _placed(factors, place.param_shardings(factors))}
    return read_folder(checkpoint.folder, target)["adapters"]


def with_adapters(
    config: ModelConfig,
    execution: Execution,
    lora: LoraConfig,
    factors: nnx.State,
    weights: tuple[nnx.State, nnx.State] | None = None,
) -> Any:
    """A model with its adapters beside its weights, to be merged or written.

    Args:
        config: The architecture.
        execution: How the model is computed.
        lora: What the adapters are.
        factors: The adapters.
        weights: Parameters and router biases; None leaves shapes in their place.
    """
    # The masks of dropout are no part of a model that is not trained.
    plain = dataclasses.replace(lora, dropout=0.0)
    model = nnx.eval_shape(lambda: adapted(config, execution, plain))
    graphdef, _, params, bias = nnx.split(model, nnx.LoRAParam, nnx.Param, RouterBias)
    return nnx.merge(graphdef, factors, *(weights or (params, bias)))


def in_dtype(opened: OpenModel, execution: Execution) -> OpenModel:
    """The same with parameters in the compute dtype, which generation needs no better."""
    dtype = jnp.dtype(execution.dtype)
    if dtype == jnp.float32:
        return opened
    return opened._replace(params=jax.tree.map(lambda x: x.astype(dtype), opened.params))


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )
