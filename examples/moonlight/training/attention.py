"""How the heads lie in a model's attention, for QK-Clip and for Muon by heads."""

from typing import Any, Literal

from examples.moonlight.model.config import MoonlightConfig
from muon_jax import GroupedQuery, MultiHeadLatent, split_heads


def attention_heads(config: Any) -> MultiHeadLatent | GroupedQuery:
    """How the heads lie in a model's attention kernels.

    Args:
        config: A `MoonlightConfig`, or the `DenseConfig` of a model with grouped queries.
    """
    if isinstance(config, MoonlightConfig):
        return MultiHeadLatent(
            heads=config.num_attention_heads,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            v_dim=config.v_head_dim,
        )
    return GroupedQuery(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )


def muon_heads(
    config: Any, choice: Literal["joint", "per_head", "groups"], heads_per_group: int | None
) -> Any:
    """What `muon` takes as `heads`.

    Args:
        config: The architecture, as for `attention_heads`.
        choice: What Muon takes for a matrix in attention's projections, as `Args.muon_heads`.
        heads_per_group: Query heads of a group; of "groups" alone.

    Raises:
        ValueError: The groups do not divide the model's heads, or cut key heads apart.
    """
    if choice == "joint":
        return choice
    structure, group = attention_heads(config), heads_per_group or 1
    if structure.heads % group:
        raise ValueError(
            f"--muon-heads-per-group {group} does not divide the {structure.heads} query heads of "
            "the model; choose a divisor"
        )
    try:
        return split_heads({r"self_attn$": structure}, group)
    except ValueError as error:
        raise ValueError(f"--muon-heads-per-group {group}: {error}") from error
