"""Which parameters are matrices: read from the model's own loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.moonlight.huggingface.pretrained import ModelConfig, abstract_model
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.language_model import next_token_loss
from muon_jax import UseRoles, by_use


def read_roles(config: ModelConfig) -> UseRoles:
    """The role of every parameter, from the loss of a few tokens; nothing is computed.

    However a model is run, its parameters are the same. They are read on one device with the ragged
    route, which keeps experts apart; the dense route merges them into one wide product, of which
    `by_use` would have to ask whether it is one matrix.
    """
    return by_use(*abstract_loss(config, Execution(experts="ragged")))


def abstract_loss(
    config: ModelConfig, execution: Execution
) -> tuple[Callable[..., Any], *tuple[Any, ...]]:
    """The loss of a few tokens, its parameters, and the rest of its arguments, with shapes only."""
    graphdef, params, bias = abstract_model(config, execution)

    def loss(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array):
        return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)

    return loss, params, bias, jax.ShapeDtypeStruct((2, 9), jnp.int32)
