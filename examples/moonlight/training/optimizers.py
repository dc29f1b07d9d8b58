"""The optimizers that the example trains with."""

from collections.abc import Mapping, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from muon_jax import muon


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    mesh: Mesh | None = None,
    param_specs: Any = None,
    clip: Sequence[optax.GradientTransformation] = (),
    roles: Any = None,
    heads: Any = "joint",
    *,
    max_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Clipping, then the optimizer. Clipping after Muon would divide the update by its own norm.

    QK-Clip, the `clip` of "muonclip", comes last: it scales the weights after the update. `roles`
    are what the model's own loss shows of its parameters, or anything else that `muon` takes as
    dimension numbers; None leaves it to their names. `heads` says what is a matrix in attention's
    projections, see `attention.muon_heads`. A `max_norm` of 0 clips nothing. `b1`, `b2` and `eps`
    are AdamW's; `options` are more keywords of `muon`.
    """
    if name == "adamw":
        optimizer = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    else:
        optimizer = muon(
            schedule,
            weight_decay=weight_decay,
            mesh=mesh,
            param_specs=param_specs,
            muon_weight_dimension_numbers=roles,
            heads=heads,
            adam_b1=b1,
            adam_b2=b2,
            eps=eps,
            **(options or {}),
        )
    norm = [optax.clip_by_global_norm(max_norm)] if max_norm else []
    return optax.chain(*norm, optimizer, *clip)
