"""The optimizers that the example trains with."""

from collections.abc import Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from muon_jax import UseRoles, muon


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    mesh: Mesh | None = None,
    param_specs: Any = None,
    clip: Sequence[optax.GradientTransformation] = (),
    roles: UseRoles | None = None,
    heads: Any = "joint",
) -> optax.GradientTransformation:
    """Clipping, then the optimizer. Clipping after Muon would divide the update by its own norm.

    QK-Clip, the `clip` of "muonclip", comes last: it scales the weights after the update. `roles`
    are what the model's own loss shows of its parameters; None leaves it to their names. `heads`
    says what is a matrix in attention's projections, see `attention.muon_heads`.
    """
    if name == "adamw":
        optimizer = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay)
    else:
        optimizer = muon(
            schedule,
            weight_decay=weight_decay,
            mesh=mesh,
            param_specs=param_specs,
            muon_weight_dimension_numbers=roles,
            heads=heads,
        )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer, *clip)
