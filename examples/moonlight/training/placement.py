"""Where everything that training changes lies: on a mesh, ZeRO-1 for Muon."""

from typing import Any

import jax
import optax

from examples.moonlight.model.execution.sharding import ModelSharding
from examples.moonlight.training.steps import TrainState
from muon_jax import opt_state_shardings


def state_shardings(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    name: str,
    sharding: ModelSharding,
) -> TrainState:
    """Where each array of a training's state lies.

    Args:
        state: Abstract or not.
        optimizer: Whose state it is; on a mesh, a Muon that knows the mesh.
        name: "adamw", whose moments lie as their parameters do, or an optimizer of Muon's.
        sharding: The devices.
    """
    one: Any = sharding.place()
    params = sharding.param_shardings(state.params)
    if sharding.mesh is None:
        opt_state = jax.tree.map(lambda _: one, state.opt_state)
    elif name == "adamw":
        opt_state = optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            state.opt_state,
            params,
            transform_non_params=lambda _: one,
        )
    else:
        opt_state = opt_state_shardings(optimizer, state.params)
    return TrainState(params, jax.tree.map(lambda _: one, state.bias), opt_state)
