"""MuonClip: what `muon_jax.qk_clip` has to be told of this repository's models."""

from typing import Any

import jax
from flax import nnx

from examples.moonlight.model.config import MoonlightConfig
from muon_jax import GroupedQuery, MultiHeadLatent


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


def logits_by_module(params: nnx.State, max_logit_lh: jax.Array) -> dict[str, jax.Array]:
    """What `qk_clip` takes as `max_logits`, from `ModelStats.max_logit_lh` of a step.

    Args:
        params: The model's parameters: layers of their own in `first_layers`, the others stacked
            in `layers`.
        max_logit_lh: The largest logit of each layer and head, over all micro-batches.
    """
    firsts = len(params["first_layers"]) if "first_layers" in params else 0
    alone = {f"first_layers/{i}/self_attn": max_logit_lh[i] for i in range(firsts)}
    return alone | {"layers/self_attn": max_logit_lh[firsts:]}
