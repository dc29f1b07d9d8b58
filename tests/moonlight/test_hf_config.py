"""config.json in both generations of keys, and the table of names, without any weights."""

import dataclasses
import json
import math

import pytest

from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.config import config_fields, parse_config, read_config
from examples.moonlight.model.config import MoonlightConfig
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

PUBLISHED = MoonlightConfig.preset("moonlight-16b-a3b")

# moonshotai/Moonlight-16B-A3B-Instruct, as published with transformers 4.
LEGACY = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
NEW_KEYS = {
    name: value
    for name, value in LEGACY.items()
    if name not in ("rope_theta", "rope_scaling", "torch_dtype", "scoring_func", "topk_method")
} | {
    "dtype": "bfloat16",
    "head_dim": 64,
    "qk_head_dim": 192,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 50000, "rope_type": "default"},
}


@pytest.mark.parametrize("fields", [LEGACY, NEW_KEYS], ids=["legacy", "v5"])
def test_both_generations_of_keys_give_the_published_model(fields):
    assert parse_config(fields) == PUBLISHED


def test_a_dense_file_may_leave_out_what_transformers_defaults():
    fields = config_fields(hf_toy.LLAMA, dtype="float32")
    for name in ("rope_theta", "rope_scaling", "rms_norm_eps", "num_key_value_heads"):
        del fields[name]
    expected = dataclasses.replace(
        hf_toy.LLAMA, rope_theta=10_000.0, rms_norm_eps=1e-6, num_key_value_heads=6
    )
    assert parse_config(fields) == expected


@pytest.mark.parametrize(
    "config", [PUBLISHED, *hf_toy.FAMILIES.values()], ids=["16b", *hf_toy.FAMILIES]
)
def test_what_is_written_is_read_again(config, tmp_path):
    fields = config_fields(config, dtype="bfloat16", eos_token_id=7)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == config
    assert fields["rope_theta"] == config.rope_theta and fields["torch_dtype"] == "bfloat16"
    assert fields["bos_token_id"] is None and fields["eos_token_id"] == 7


ABSENT = object()


@pytest.mark.parametrize(
    "model_type, field, value, message",
    [
        ("deepseek_v3", "model_type", "deepseek_v2", "model_type is 'deepseek_v2'; supported are"),
        ("deepseek_v3", "q_lora_rank", 1536, "q_lora_rank is 1536; deepseek_v3 is supported with"),
        ("deepseek_v3", "q_lora_rank", ABSENT, "q_lora_rank is 1536, transformers' default"),
        ("deepseek_v3", "n_group", 8, "n_group is 8; .* with 1 only"),
        ("deepseek_v3", "topk_group", 4, "topk_group is 4"),
        ("deepseek_v3", "norm_topk_prob", False, "norm_topk_prob is False; .* with True only"),
        ("deepseek_v3", "scoring_func", "softmax", "scoring_func is 'softmax'; .* 'sigmoid' only"),
        ("deepseek_v3", "topk_method", "greedy", "topk_method is 'greedy'"),
        ("deepseek_v3", "moe_layer_freq", 2, "moe_layer_freq is 2"),
        ("deepseek_v3", "attention_bias", True, "attention_bias is True"),
        (
            "deepseek_v3",
            "tie_word_embeddings",
            True,
            "tie_word_embeddings is .*: save",
        ),
        ("deepseek_v3", "rope_interleave", False, "rope_interleave is False"),
        ("deepseek_v3", "num_nextn_predict_layers", -1, "num_nextn_predict_layers must be an int"),
        (
            "deepseek_v3",
            "num_mtp_layers",
            True,
            "num_mtp_layers must be an .* got True",
        ),
        ("deepseek_v3", "num_key_value_heads", 2, "num_key_value_heads is 2; .* with 4 or None"),
        ("deepseek_v3", "head_dim", 7, "head_dim is 7; .* with 6 or None"),
        ("deepseek_v3", "qk_head_dim", 7, "qk_head_dim is 7; .* with 14 or None"),
        ("deepseek_v3", "hidden_act", "gelu", "hidden_act is 'gelu'; .* with 'silu' only"),
        ("deepseek_v3", "quantization_config", {"quant_method": "fp8"}, "quantization_config is"),
        ("deepseek_v3", "kv_lora_rank", ABSENT, "kv_lora_rank is missing"),
        ("deepseek_v3", "kv_lora_rank", "x", "kv_lora_rank must be an integer >= 1 and below"),
        ("deepseek_v3", "rms_norm_eps", "x", "rms_norm_eps must be a number, got 'x'"),
        ("deepseek_v3", "rope_theta", True, "rope_theta must be a number, got True"),
        (
            "deepseek_v3",
            "rope_scaling",
            {"type": "yarn", "factor": 4},
            "rope_scaling is .*'yarn'.* give",
        ),
        ("llama", "rope_parameters", {"rope_type": "llama3"}, "rope_parameters is .*'llama3'"),
        (
            "llama",
            "rope_parameters",
            {"rope_theta": 5.0},
            "the bases of rope differ: rope_theta 100",
        ),
        ("llama", "attention_bias", True, "attention_bias is True"),
        ("llama", "mlp_bias", True, "mlp_bias is True"),
        ("llama", "attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window is True"),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"], "layer_types is"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused_by_field_and_value(
    model_type, field, value, message
):
    fields = config_fields(hf_toy.FAMILIES[model_type], dtype="float32")
    if value is ABSENT:
        del fields[field]
    else:
        fields[field] = value
    with pytest.raises(ValueError, match=f"^here: {message}"):
        parse_config(fields, where="here")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", r"config\.json, line 1: not valid JSON"),
        (b"\xff", r"config\.json is not UTF-8 text"),
        (b"[1]", r"config\.json: expected a JSON object, got list"),
        (b'{"n_group": 8, "n_group": 1}', "'n_group' occurs twice"),
    ],
)
def test_a_file_that_is_no_configuration_is_an_error(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_no_shared_experts_may_be_written_as_null():
    fields = config_fields(hf_toy.MOONLIGHT, dtype="float32") | {"n_shared_experts": None}
    assert parse_config(fields).n_shared_experts == 0


def test_a_folder_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)


# --- names ----------------------------------------------------------------------------------------


def test_the_published_model_has_the_published_tensors():
    """Counts and shapes as in the index of moonshotai/Moonlight-16B-A3B."""
    rows = hf_names.table(PUBLISHED)
    shapes = hf_names.shapes(rows)
    assert len(rows) == len(shapes) == 5_317
    assert sum(map(math.prod, shapes.values())) == 15_960_108_544 + 1_664
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (11_264, 2048)
    assert shapes["model.layers.26.mlp.experts.63.down_proj.weight"] == (2048, 1408)
    assert shapes["model.layers.1.mlp.shared_experts.up_proj.weight"] == (2816, 2048)
    assert shapes["model.layers.1.mlp.gate.weight"] == (64, 2048)
    assert shapes["model.layers.26.mlp.gate.e_score_correction_bias"] == (64,)
    assert shapes["model.layers.13.self_attn.kv_a_proj_with_mqa.weight"] == (576, 2048)
    assert shapes["model.layers.13.self_attn.kv_b_proj.weight"] == (4096, 512)
    assert shapes["lm_head.weight"] == (163_840, 2048)


# Of the config.json of Qwen/Qwen2.5-0.5B and HuggingFaceTB/SmolLM-135M, what a model depends on.
DENSE = {
    "qwen2.5-0.5b": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        290,
        494_032_768,
    ),
    "smollm-135m": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 2048,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
        272,
        134_515_008,
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_published_dense_models_have_their_numbers(name):
    fields, tensors, numbers = DENSE[name]
    config = parse_config(fields)
    assert len(hf_names.table(config)) == tensors
    assert hf_names.total_size(config) == numbers
