"""Toy models of every family that Hugging Face directories are read and written for."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.huggingface.config import ModelConfig, config_fields
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig

# Every width differs from every other, so that no exchange of two goes unnoticed; the even ones
# and the four experts divide over a mesh.
MOONLIGHT = MoonlightConfig(
    vocab_size=62,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    intermediate_size=36,
    moe_intermediate_size=20,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    rope_theta=100.0,
    max_position_embeddings=16,
)
QWEN2 = DenseConfig(
    vocab_size=62,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / num_attention_heads
    intermediate_size=36,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=16,
    attention_bias=True,
    tie_word_embeddings=True,
)
LLAMA = DenseConfig(
    vocab_size=62,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=36,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=16,
    attention_bias=False,
    tie_word_embeddings=False,
)
FAMILIES = {"deepseek_v3": MOONLIGHT, "qwen2": QWEN2, "llama": LLAMA}


def hard_tensors(config: ModelConfig, *, fused: bool = False, seed: int = 0):
    """Weights on disk that hide nothing: std 0.2, random gains, a bias that changes choices.

    The default initialization makes every branch so small that a wrong rope or scale changes no
    digit. The latent's rows of kv_a are small, so that the latent norm's epsilon counts.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in hf_names.shapes(hf_names.table(config, fused=fused)).items():
        value = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("e_score_correction_bias"):
            value = 0.3 * value
        elif "embed_tokens" not in name:
            value = 0.2 * value
        if "kv_a_proj" in name:
            value[: MOONLIGHT.kv_lora_rank] *= 3e-3
        tensors[name] = value.astype(np.float32)
    return tensors


def write_model(folder: Path, config: ModelConfig, tensors, *, shards: int = 1) -> Path:
    """A directory written without our export."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_fields(config, dtype="float32")))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map) -> None:
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
