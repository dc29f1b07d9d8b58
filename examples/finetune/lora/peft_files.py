"""An adapter as a directory that PEFT loads, and one of PEFT's into a model of ours.

    write_peft(folder, model, config)      PeftModel.from_pretrained(base, folder)
    peft.save_pretrained(folder)           read_peft(folder, model)

PEFT accepts in silence what is no adapter of the model: tensors without the prefix are reported as
missing and start anew, a module that `target_modules` lacks is passed over with its tensors, and an
adapter then does nothing. Reading here refuses both, and every field of the configuration that
would make the adapter another one than plain LoRA.
"""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from examples.finetune.lora.adapters import LoraConfig, add_lora
from examples.finetune.lora.peft_names import (
    FACTORS,
    PREFIX,
    Place,
    adapted_places,
    is_target,
    places,
    target_names,
)
from examples.moonlight.common.files import read_json
from examples.moonlight.common.processes import group
from examples.moonlight.common.untrusted import is_there, shown, shown_name
from examples.moonlight.hf_export import check_unused, save_tensors
from examples.moonlight.huggingface.files import TensorFiles
from examples.moonlight.model.execution.sharding import on_host

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_INFINITE = float("inf")

# What these say does not change what an adapter computes once its tensors are there.
_FREE = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "task_type"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"),
    *("init_lora_weights", "loftq_config", "megatron_core", "qalora_group_size", "runtime_config"),
}


def write_peft(folder: Path, model: Any, config: LoraConfig, *, base: str | None = None) -> None:
    """Writes a model's adapters as PEFT's directory, float32, whole or not at all.

    Of several processes all call it, and the first writes; it returns when all is written.

    Args:
        folder: Where to; it must not exist, or be empty.
        model: The model with adapters, on devices of this process or of all.
        config: What they were made with.
        base: What `base_model_name_or_path` says: a folder or a name on the hub.

    Raises:
        FileExistsError: The folder is in use.
        ValueError: There are no adapters, or some that PEFT would not apply: see `peft_names.py`;
            or the model was made with another configuration.
    """
    if group.is_first():
        check_unused(folder)
    adapted, modules = adapted_places(model), _modules(model)
    tensors: dict[str, np.ndarray] = {}
    stacks: dict[tuple[str, str], np.ndarray] = {}
    for place in adapted:
        module = modules[place.module]
        if module.lora_scale != config.scale or module.lora_a.shape[-1] != config.rank:
            raise ValueError(
                f"{place.module} has rank {module.lora_a.shape[-1]} and scale {module.lora_scale}, "
                f"and config says {config.rank} and {config.scale}: give the model's own"
            )
        for factor, ending in FACTORS.items():
            key = place.module, factor
            if key not in stacks:
                stacks[key] = np.asarray(on_host(getattr(module, factor)[...]), np.float32)
            matrix = stacks[key][place.at]
            tensors[f"{PREFIX}{place.name}{ending}"] = np.ascontiguousarray(matrix.T)
    whole = config.alpha == int(config.alpha)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if whole else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_names(model.config, adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    if group.is_first():
        _write(folder.absolute(), content, tensors)
    group.barrier()


def _write(folder: Path, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        save_tensors(tensors, temporary / WEIGHTS_FILE)
        # safetensors lets nobody else read what it writes.
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_peft(folder: Path, model: Any) -> LoraConfig:
    """Gives a model the adapters of PEFT's directory, in place, where they lie on its mesh.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        model: A `LanguageModel` without adapters.

    Returns:
        What they are; `target_modules` by our names. The model is in training mode, as after
        `add_lora`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged; the adapter is no plain LoRA; it is not for this model; or a
            tensor is missing, too many, of another shape, or not finite.
    """
    path = folder / CONFIG_FILE
    if is_there(folder / PICKLE) and not is_there(folder / WEIGHTS_FILE):
        raise ValueError(
            f"{folder} holds its weights as a pickle ({PICKLE}), which could run any code: save "
            "them as safetensors with peft's save_pretrained first"
        )
    fields = read_json(path)
    rank, targets = _check_fields(fields, path)
    with TensorFiles(folder, WEIGHTS_FILE) as files:
        found = [place for place in places(model.config) if is_target(place.name, targets)]
        _check_targets(targets, found, path)
        _check_names(files, found, path)
        modules = tuple(dict.fromkeys(place.module for place in found))
        config = LoraConfig(
            rank=rank,
            alpha=float(fields["lora_alpha"]),
            dropout=float(fields.get("lora_dropout") or 0.0),
            target_modules=modules,
        )
        stacks = {
            (module, factor): _stack(files, found, module, factor, rank)
            for module in modules
            for factor in FACTORS
        }
    add_lora(model, config, nnx.Rngs(0))
    where, adapted = model.execution.sharding, _modules(model)
    for (module, factor), value in stacks.items():
        variable = getattr(adapted[module], factor)
        spec = where.param_spec((*module.split("."), factor), value.shape)
        if value.shape != variable.shape:
            raise ValueError(
                f"{folder}: the adapters of {module} are {list(value.shape)} in all, and the model "
                f"has {list(variable.shape)}: some of its layers have none"
            )
        variable[...] = jax.device_put(where.spread(value, *spec), where.place(*spec))
    return config


def _modules(model: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _check_fields(fields: dict[str, Any], path: Path) -> tuple[int, list[str]]:
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {shown(fields.get('peft_type'))}; only LORA can be read"
        )
    for name, value in fields.items():
        plain = name in _FREE or not value or (name == "bias" and value == "none")
        if not plain:
            raise ValueError(
                f"{path}: {shown_name(name)} is {shown(value)}, which is no plain LoRA: merge it "
                "in peft (merge_and_unload) and read the model"
            )
    rank, alpha, targets = (fields.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r must be a positive integer, got {shown(rank)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < _INFINITE:
        raise ValueError(f"{path}: lora_alpha must be a positive number, got {shown(alpha)}")
    names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not targets or not names:
        raise ValueError(
            f"{path}: target_modules must be a list of names, got {shown(targets)}; peft's "
            "save_pretrained writes one"
        )
    return rank, targets


def _check_targets(targets: list[str], found: list[Place], path: Path) -> None:
    for target in targets:
        if not any(is_target(place.name, [target]) for place in found):
            raise ValueError(
                f"{path}: target_modules names {shown_name(target)}, which is no matrix of this "
                "model that can have an adapter"
            )


def _check_names(files: TensorFiles, found: list[Place], path: Path) -> None:
    expected = {f"{PREFIX}{place.name}{end}" for place in found for end in FACTORS.values()}
    there = files.tensors.keys()
    if extra := sorted(there - expected):
        name = extra[0]
        if not name.startswith(PREFIX):
            why = f"the names of an adapter begin with {PREFIX}"
        else:
            why = f"target_modules in {path.name} has not its module, and PEFT would pass it over"
        raise ValueError(f"{files.folder / WEIGHTS_FILE} holds {shown_name(name)}: {why}")
    if missing := sorted(expected - there):
        raise ValueError(
            f"{files.folder / WEIGHTS_FILE} lacks {missing[0]}, which target_modules in "
            f"{path.name} asks for; {len(missing)} of {len(expected)} tensors are missing"
        )


def _stack(
    files: TensorFiles, found: list[Place], module: str, factor: str, rank: int
) -> np.ndarray:
    """A factor of a module as it is here, float32; layers in their order."""
    parts, stacked = [], False
    for place in found:
        if place.module != module:
            continue
        name = f"{PREFIX}{place.name}{FACTORS[factor]}"
        shape = (rank, place.rows) if factor == "lora_a" else (place.cols, rank)
        if files.tensors[name].shape != shape:
            raise ValueError(
                f"{name} has the shape {list(files.tensors[name].shape)}; the model and r = {rank} "
                f"ask for {list(shape)}"
            )
        parts.append(files.read(name).astype(np.float32).T)
        stacked = bool(place.at)
    return np.stack(parts) if stacked else parts[0]
