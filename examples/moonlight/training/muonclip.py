"""MuonClip: what `muon_jax.qk_clip` has to be told at each step."""

import jax
from flax import nnx


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
