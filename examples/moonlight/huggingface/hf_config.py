"""`config.json`: an architecture in Hugging Face's words, and in ours.

Read are the keys that transformers 4 wrote (`rope_theta`, `rope_scaling`, `torch_dtype`) and those
of transformers 5 (`rope_parameters`, `dtype`); written are the former, which both versions read.

A field that our models fix, such as `q_lora_rank`, is accepted at the one value that they have and
refused at every other: weights read under another convention would load and compute nonsense. A
field that the file leaves out has the value that transformers gives it. Fields that transformers
does not know either, training settings for the most part, are passed over as it does.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.moonlight.files import read_json
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
        defaults={"initializer_range": 0.02},
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
            "num_nextn_predict_layers": Fixed((0,), absent=0),
            "num_mtp_layers": Fixed((0,), absent=0),
        },
    ),
    "qwen2": Family(
        DenseConfig,
        "Qwen2ForCausalLM",
        defaults={"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False},
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

# Named otherwise by some writers.
_ALIASES = {"num_local_experts": "n_routed_experts"}

_DEFAULT_THETA = 10_000.0


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
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}: give the folder of a Hugging Face model"
        )
    return parse_config(read_json(path), where=str(path))


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
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type is {model_type!r}; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
    values: dict[str, Any] = family.defaults | {"rope_theta": _rope_theta(fields, where)}
    if family.config is DenseConfig:
        values["attention_bias"] = model_type == "qwen2"
        values.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
    for field in dataclasses.fields(family.config):
        value = fields.get(field.name)
        if value is not None and field.name not in ("rope_theta", "attention_bias"):
            values[field.name] = value
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}: {field.name} is missing")
        if field.type is float and field.name in values:
            values[field.name] = _number(values[field.name], field.name, where)
    for name, fixed in (family.fixed | _derived(model_type, fields)).items():
        value = fields.get(name, fixed.absent)
        if value not in fixed.supported:
            given = "" if name in fields else ", transformers' default for a file without it"
            raise ValueError(
                f"{where}: {name} is {value!r}{given}; {model_type} is supported with "
                f"{' or '.join(map(repr, fixed.supported))} only"
            )
    try:
        return family.config(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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
    layers = fields.get("num_hidden_layers")
    full = ["full_attention"] * layers if isinstance(layers, int) else None
    return {"layer_types": Fixed((None, full))} if model_type == "qwen2" else {}


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
                f"{where}: {name} is {rope!r}; supported is plain rope only, rope_type 'default'"
            )
        if "rope_theta" in rope:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    if len(set(found.values())) > 1:
        words = ", ".join(f"{name} {value!r}" for name, value in found.items())
        raise ValueError(f"{where}: the bases of rope differ: {words}; keep one of them")
    name, theta = next(iter(found.items()), ("rope_theta", _DEFAULT_THETA))
    return _number(theta, name, where)


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {name} must be a number, got {value!r}")
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
    "num_nextn_predict_layers",
    "q_lora_rank",
    "rope_interleave",
    "scoring_func",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "use_sliding_window",
}
