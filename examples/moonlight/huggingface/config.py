"""`config.json`: an architecture in Hugging Face's words, and in ours.

Read are the keys that transformers 4 wrote (`rope_theta`, `rope_scaling`, `torch_dtype`) and those
of transformers 5 (`rope_parameters`, `dtype`); written are the former, which both versions read.

A field that our models fix, such as `q_lora_rank`, is accepted at the one value that they have and
refused at every other: weights read under another convention would load and compute nonsense. A
field that the file leaves out has the value that transformers gives it, or the file is refused.
Fields that transformers does not know either, training settings for the most part, are passed over
as it does. So is `num_nextn_predict_layers`, whose layers stand beside the model: transformers
writes 1 for every model, and reads no tensor of theirs.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import is_there, shown, shown_name
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig

CONFIG_FILE = "config.json"

ModelConfig = MoonlightConfig | DenseConfig


class Fixed(NamedTuple):
    """A field whose value the model does not choose.

    Attributes:
        supported: The values that mean what the model computes.
        absent: What transformers takes where the file has no such field.
    """

    supported: tuple[Any, ...]
    absent: Any = None


class Family(NamedTuple):
    """How one `model_type` is read.

    Attributes:
        config: Our configuration's class; its fields are read by their names.
        architecture: The class in transformers.
        defaults: Fields that a file may leave out, with transformers' values.
        fixed: Fields that are checked.
    """

    config: type
    architecture: str
    defaults: dict[str, Any]
    fixed: dict[str, Fixed]


_FIXED = {
    "hidden_act": Fixed(("silu",), absent="silu"),
    "attention_dropout": Fixed((0.0,), absent=0.0),
    "partial_rotary_factor": Fixed((None, 1)),
    "quantization_config": Fixed((None,)),
}

FAMILIES = {
    "deepseek_v3": Family(
        MoonlightConfig,
        "DeepseekV3ForCausalLM",
        defaults={"rms_norm_eps": 1e-6, "initializer_range": 0.02},
        # transformers' defaults are those of the 671B model.
        fixed=_FIXED
        | {
            "q_lora_rank": Fixed((None,), absent=1536),
            "n_group": Fixed((1,), absent=8),
            "topk_group": Fixed((1,), absent=4),
            "norm_topk_prob": Fixed((True,), absent=True),
            "scoring_func": Fixed(("sigmoid",), absent="sigmoid"),
            "topk_method": Fixed(("noaux_tc",), absent="noaux_tc"),
            "moe_layer_freq": Fixed((1,), absent=1),
            "attention_bias": Fixed((False,), absent=False),
            "tie_word_embeddings": Fixed((False,), absent=False),
            "rope_interleave": Fixed((True,), absent=True),
        },
    ),
    "qwen2": Family(
        DenseConfig,
        "Qwen2ForCausalLM",
        defaults={
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
        },
        fixed=_FIXED | {"use_sliding_window": Fixed((False,), absent=False)},
    ),
    "llama": Family(
        DenseConfig,
        "LlamaForCausalLM",
        defaults={"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False},
        # With attention_bias, Llama's output projection has a bias too, which ours has not.
        fixed=_FIXED
        | {
            "attention_bias": Fixed((False,), absent=False),
            "mlp_bias": Fixed((False,), absent=False),
        },
    ),
}

# What helps with a field that is not supported; of most, nothing: the architecture is another one.
_REMEDIES = {
    "tie_word_embeddings": "save the model with a head of its own, a copy of the embedding",
    "quantization_config": "dequantize the weights first, and save them in bfloat16",
}

# Named otherwise by some writers.
_ALIASES = {"num_local_experts": "n_routed_experts"}

_DEFAULT_THETA = 10_000.0

# Fields that follow from others where they are null; elsewhere null is no value, but for one that
# DeepSeek's own code takes for 0.
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
_NULL_IS_ZERO = "n_shared_experts"

# Layers behind the last that predict tokens further ahead: by transformers' name, and DeepSeek's.
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers")

# Shapes and positions are int32.
_LARGEST = 2**31 - 1
_LEAST_NUMBER, _LARGEST_NUMBER = (
    float(np.finfo(np.float32).smallest_normal),
    float(np.finfo(np.float32).max),
)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> ModelConfig:
    """Reads a model directory's `config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no JSON object, or describes a model that ours cannot be; see
            `parse_config`.
    """
    return parse_config(read_fields(folder), where=str(folder / CONFIG_FILE))


def read_fields(folder: Path) -> dict[str, Any]:
    """Reads the fields of a model directory's `config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not is_there(path):
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}: give the folder of a Hugging Face model"
        )
    return read_json(path)


def layers_ahead(fields: Mapping[str, Any], where: str = CONFIG_FILE) -> int:
    """How many layers a file says to have behind the last, which predict tokens further ahead.

    Raises:
        ValueError: It is no such number.
    """
    found = {name: fields[name] for name in _AHEAD if fields.get(name) is not None}
    for name, value in found.items():
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise ValueError(
                f"{where}: {name} must be an integer >= 0 and below 2^31, got {shown(value)}"
            )
    return max(found.values(), default=0)


def parse_config(fields: Mapping[str, Any], where: str = CONFIG_FILE) -> ModelConfig:
    """Turns the fields of a `config.json` into our configuration.

    Args:
        fields: The JSON object.
        where: What error messages call it.

    Returns:
        A `MoonlightConfig` for `deepseek_v3`, a `DenseConfig` for `qwen2` and `llama`.

    Raises:
        ValueError: The model type is another, a field is missing or out of its range, or has a
            value that the model cannot represent.
    """
    where = shown_name(where)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type is {shown(model_type)}; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    layers_ahead(fields, where)
    for alias, name in _ALIASES.items():
        if alias in fields and fields.get(name, fields[alias]) != fields[alias]:
            raise ValueError(f"{where}: {alias} and {name} differ, and mean the same; keep one")
    fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
    values: dict[str, Any] = family.defaults | {"rope_theta": _rope_theta(fields, where)}
    if family.config is DenseConfig:
        values["attention_bias"] = model_type == "qwen2"
        if fields.get("num_key_value_heads", family.defaults.get("num_key_value_heads")) is None:
            values["num_key_value_heads"] = fields.get("num_attention_heads")
    for field in dataclasses.fields(family.config):
        if field.name in fields and field.name not in ("rope_theta", "attention_bias"):
            value = fields[field.name]
            if value is None and field.name == _NULL_IS_ZERO:
                value = 0
            if value is not None or field.name not in _MAY_BE_NULL:
                values[field.name] = _value(value, field, where)
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}: {field.name} is missing")
    for name, fixed in (family.fixed | _derived(model_type, fields)).items():
        value = fields.get(name, fixed.absent)
        if not any(_same(value, supported) for supported in fixed.supported):
            given = "" if name in fields else ", transformers' default for a file without it"
            raise ValueError(
                f"{where}: {name} is {shown(value)}{given}; {model_type} is supported with "
                f"{' or '.join(map(shown, fixed.supported))} only: "
                f"{_REMEDIES.get(name, 'give a model that has it so')}"
            )
    try:
        return family.config(**values)
    except ValueError as error:
        left_out = ", ".join(
            f"{name} {values[name]!r}"
            for name in family.defaults
            if name not in fields and name in str(error)
        )
        note = f" (transformers' default for a file without it: {left_out})" if left_out else ""
        raise ValueError(f"{where}: {error}{note}") from error


def _same(value: Any, supported: Any) -> bool:
    """Whether they are equal, and not because Python takes true for 1."""
    return isinstance(value, bool) == isinstance(supported, bool) and value == supported


def _value(value: Any, field: dataclasses.Field, where: str) -> Any:
    """A field's value, once it has the type that the architecture asks for."""
    if field.type is float:
        return _number(value, field.name, where)
    if field.type is bool and not isinstance(value, bool):
        raise ValueError(f"{where}: {field.name} must be true or false, got {shown(value)}")
    if field.type is int:
        least = 0 if field.name in ("first_k_dense_replace", "n_shared_experts") else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
            raise ValueError(
                f"{where}: {field.name} must be an integer >= {least} and below 2^31, got "
                f"{shown(value)}"
            )
    return value


def _derived(model_type: str, fields: Mapping[str, Any]) -> dict[str, Fixed]:
    """Fields that say again what others say, or say it per layer."""
    if model_type == "deepseek_v3":
        heads, rope = fields.get("num_attention_heads"), fields.get("qk_rope_head_dim")
        nope = fields.get("qk_nope_head_dim")
        width = nope + rope if isinstance(nope, int) and isinstance(rope, int) else None
        return {
            "num_key_value_heads": Fixed((heads, None), absent=128),
            "head_dim": Fixed((rope, None)),  # what rope rotates
            "qk_head_dim": Fixed((width, None)),
        }
    if model_type != "qwen2":
        return {}
    layers, types = fields.get("num_hidden_layers"), fields.get("layer_types")
    # As long as the list in the file, whatever the number says.
    full = ["full_attention"] * len(types) if isinstance(types, list) else None
    return {"layer_types": Fixed((None, full if full and len(full) == layers else None))}


def _rope_theta(fields: Mapping[str, Any], where: str) -> float:
    """The base of the rotary frequencies, from either generation of keys."""
    found = {} if fields.get("rope_theta") is None else {"rope_theta": fields["rope_theta"]}
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        plain = isinstance(rope, dict) and all(
            key == "rope_theta"
            or (key in ("rope_type", "type") and value == "default")
            or (key == "partial_rotary_factor" and value == 1)
            for key, value in rope.items()
        )
        if not plain:
            raise ValueError(
                f"{where}: {name} is {shown(rope)}; supported is plain rope only, rope_type "
                "'default': give a model whose rope is not scaled"
            )
        if "rope_theta" in rope:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    bases = {name: _number(value, name, where) for name, value in found.items()}
    if len(set(bases.values())) > 1:
        words = ", ".join(f"{name} {value!r}" for name, value in found.items())
        raise ValueError(f"{where}: the bases of rope differ: {words}; keep one of them")
    return next(iter(bases.values()), _DEFAULT_THETA)


def _number(value: Any, name: str, where: str) -> float:
    """A positive number that is one in float32, too, in which the model computes with it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {name} must be a number, got {shown(value)}")
    if not _LEAST_NUMBER <= value <= _LARGEST_NUMBER:
        raise ValueError(
            f"{where}: {name} must be a positive finite number in float32, got {shown(value)}"
        )
    return float(value)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def config_fields(
    config: ModelConfig,
    *,
    dtype: str,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The `config.json` of a model: every field that transformers would otherwise give a default.

    Args:
        config: The architecture.
        dtype: Name of the weights' dtype.
        bos_token_id: Token before a text.
        eos_token_id: Tokens that end a generation.
        pad_token_id: Token that fills a batch.
    """
    if isinstance(config, MoonlightConfig):
        model_type = "deepseek_v3"
    else:
        model_type = "qwen2" if config.attention_bias else "llama"
    family = FAMILIES[model_type]
    # The others of `fixed` belong to remote code or repeat what absence means.
    written = {name: family.fixed[name].supported[0] for name in _WRITTEN & family.fixed.keys()}
    fields = dataclasses.asdict(config) | written
    if model_type == "deepseek_v3":
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        fields["num_nextn_predict_layers"] = 0
    elif model_type == "qwen2":
        del fields["attention_bias"]
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **dict(sorted(fields.items())),
        "rope_scaling": None,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": dtype,
    }


_WRITTEN = {
    "attention_bias",
    "attention_dropout",
    "hidden_act",
    "mlp_bias",
    "moe_layer_freq",
    "n_group",
    "norm_topk_prob",
    "q_lora_rank",
    "rope_interleave",
    "scoring_func",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "use_sliding_window",
}
