"""What a Moonlight is, and how it is run.

`MoonlightConfig` decides what the model computes, and is written into checkpoints. `Execution`
decides how: dtype, devices, what is recomputed, which products are taken in blocks. A model trained
under one execution runs under any other, to rounding.
"""

import dataclasses
from typing import Any

import numpy as np

# --------------------------------------------------------------------------------------------------
# Architecture
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoonlightConfig:
    """Architecture of a Moonlight model; the fields are named as in Hugging Face's `deepseek_v3`.

    What the family fixes is not a field: queries have no latent (`q_lora_rank` null), experts form
    one group (`n_group` 1), scores are sigmoids normalised over the chosen experts, and the head is
    not tied to the embedding.

    Attributes:
        vocab_size: Rows of the embedding and columns of the head.
        hidden_size: Width d of the residual stream.
        num_hidden_layers: Decoder layers, the dense ones included.
        num_attention_heads: Query, key and value heads.
        kv_lora_rank: Width of the latent from which keys and values are expanded.
        qk_nope_head_dim: Width per head of the part of queries and keys without position.
        qk_rope_head_dim: Width of the rotated part; even. Its key is shared by all heads.
        v_head_dim: Width of values per head.
        intermediate_size: Inner width of the MLP of the dense layers.
        moe_intermediate_size: Inner width of one expert.
        n_routed_experts: Experts among which the router chooses.
        num_experts_per_tok: Routed experts that each token uses.
        n_shared_experts: Experts that every token uses, fused into one MLP; may be 0.
        first_k_dense_replace: Leading layers with a dense MLP in the place of experts; all layers,
            if there are no more of them.
        routed_scaling_factor: Gate scale of the routed experts' sum, see `gate_scale`.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Epsilon of every norm but the latent's.
        max_position_embeddings: Longest sequence accepted.
        initializer_range: Standard deviation of every initial matrix.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    max_position_embeddings: int
    rope_theta: float = 50_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        """Raises ValueError for a field, or a pair of fields, that no model can have."""
        check_fields(self, may_be_zero=("first_k_dense_replace", "n_shared_experts"))
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                "qk_rope_head_dim must be even, because rope rotates pairs; "
                f"got {self.qk_rope_head_dim}."
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                f"n_routed_experts ({self.n_routed_experts})."
            )

    @property
    def has_experts(self) -> bool:
        """Whether there are layers with experts. All layers are one stack, if there are none."""
        return self.first_k_dense_replace < self.num_hidden_layers

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def preset(cls, name: str) -> "MoonlightConfig":
        """Returns a named configuration; change single fields with `dataclasses.replace`.

        Args:
            name: "moonlight-16b-a3b", the published model; "small" (197M parameters), for a
                single GPU or TPU; "mini" (25M parameters), for the GPU of a free Colab; "tiny"
                (2.1M parameters), for a few minutes on two CPU cores.

        Raises:
            ValueError: No preset has this name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return PRESETS[name]


def check_fields(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Checks the fields of an architecture one by one, by their types.

    Args:
        config: A dataclass whose fields are integers, positive numbers, and booleans.
        may_be_zero: Names of the integers that may.

    Raises:
        ValueError: One is not what its type says.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            least = 0 if field.name in may_be_zero else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name} must be an integer >= {least}, got {value!r}.")
        elif field.type is float and not 0 < value < float("inf"):
            raise ValueError(f"{field.name} must be a positive finite number, got {value!r}.")
        elif field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be true or false, got {value!r}.")


# The gate scales are those printed with Figure 6 of arXiv 2502.16982; `gate_scale` derives them.
PRESETS = {
    "moonlight-16b-a3b": MoonlightConfig(
        vocab_size=163_840,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=11_264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        max_position_embeddings=8192,
    ),
    "small": MoonlightConfig(
        vocab_size=32_768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=2048,
        moe_intermediate_size=256,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.991,
        max_position_embeddings=2048,
    ),
    "mini": MoonlightConfig(
        vocab_size=8192,
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=192,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.409,
        max_position_embeddings=512,
    ),
    "tiny": MoonlightConfig(
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=384,
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.409,
        max_position_embeddings=128,
    ),
}


def gate_scale(experts: int, top_k: int, *, samples: int = 50_000, seed: int = 0) -> float:
    """Simulates the gate scale that gives routed experts the weight of one expert (Figure 6).

    Normalised weights p over k independent experts of unit RMS sum to an output of RMS `|p|_2`, so
    the scale is the mean of `1 / |p|_2` over Gaussian router logits (arXiv 2502.16982, App. C):
    `sqrt(k)` if the chosen scores were equal, a little less because they are not.

    Args:
        experts: Routed experts per layer.
        top_k: Experts chosen per token.
        samples: Simulated tokens; the standard error is below 1e-4 for the presets.
        seed: Seed of the NumPy generator, so that the result is deterministic.

    Returns:
        The scale, a Python float.

    Raises:
        ValueError: `top_k` is not between 1 and `experts`.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be between 1 and experts ({experts}), got {top_k}.")
    logits_ne = np.random.default_rng(seed).standard_normal((samples, experts))
    score_nk = 1 / (1 + np.exp(-np.partition(logits_ne, experts - top_k, axis=1)[:, -top_k:]))
    weight_nk = score_nk / score_nk.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.linalg.norm(weight_nk, axis=1)))


# --------------------------------------------------------------------------------------------------
# Execution
# --------------------------------------------------------------------------------------------------
