"""How a model is computed, as one value that is handed through it."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.moonlight.model.execution.sharding import ModelSharding

EXPERT_ROUTES = ("dense", "ragged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is computed; what it computes stays the same to rounding, but for a capacity.

    Attributes:
        dtype: Compute dtype of everything between the embedding and the logits; norms, the softmax,
            routing and the loss are float32 in any case, and so are the parameters.
        sharding: The devices, and what lies where on them.
        experts: How routed experts are computed. "dense" runs every expert on every token: the fast
            route for few small experts, and on CPU. "ragged" runs only the chosen ones, and on a
            mesh sends tokens to their experts.
        expert_capacity: Takes at most this multiple of an even share of tokens per expert from each
            device, and drops the rest, which `ModelStats.dropped_l` counts; of the ragged route
            only. None drops nothing.
        expert_block: Tokens per device that travel to experts at a time, on a mesh; None is all.
        remat: Keep only each layer's input for the backward pass, and compute the rest anew.
        unroll: Write the layers one after the other in the program, where a loop over them would
            compile faster and run slower on CPU.
        attention_block: Queries and keys of a block of attention, of which one is held in memory;
            None is all of them.
        loss_block: Tokens per device whose logits are held at a time in the loss; None is all.
        monitor: Measure what `ModelStats` marks as monitored.
    """

    dtype: DTypeLike = jnp.float32
    sharding: ModelSharding = dataclasses.field(default_factory=ModelSharding)
    experts: Literal["dense", "ragged"] = "dense"
    expert_capacity: float | None = None
    expert_block: int | None = None
    remat: bool = False
    unroll: bool = False
    attention_block: int | None = None
    loss_block: int | None = None
    monitor: bool = False

    def __post_init__(self):
        """Raises ValueError for a field out of its range."""
        if self.experts not in EXPERT_ROUTES:
            raise ValueError(f"experts must be one of {EXPERT_ROUTES}, got {self.experts!r}.")
        for name in ("attention_block", "expert_block", "loss_block"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}.")
        if self.expert_capacity is not None:
            if not 0 < self.expert_capacity < float("inf"):
                raise ValueError(
                    f"expert_capacity must be a positive number or None, got {self.expert_capacity}"
                )
            if self.experts != "ragged":
                raise ValueError(
                    "expert_capacity limits the tokens that are sent to experts, and the dense "
                    'route sends none: choose experts="ragged" or leave the capacity out.'
                )
