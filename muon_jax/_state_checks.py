"""Refuse a state that was made for other parameters, by the leaf that shows it."""

from collections.abc import Sequence
from typing import Any

from muon_jax._common.paths import flatten_with_names, show
from muon_jax._routes import Route


def check_state_of(state: Any, routes: Sequence[Route]) -> None:
    """Raise where the state of `muon` has not one momentum for each parameter, of its shape.

    Args:
      state: as `optax.partition` keeps it; one with other groups is left to Optax.
      routes: the routes of the parameters.

    Raises:
      ValueError: with the leaf, what it is and what the state holds.
      TypeError: for what is no state of `optax.partition`.
    """
    if not hasattr(state, "inner_states"):
        raise TypeError(
            f"muon was given a state of type {type(state).__name__}; expected the one that its "
            "init made, as tx.update(grads, state, params)."
        )
    states = state.inner_states
    if not isinstance(states, dict) or not {"muon", "adam"} <= {*states}:
        return
    held = {
        path: (optimizer, tuple(moment.shape))
        for optimizer in ("muon", "adam")
        for path, moment in flatten_with_names(states[optimizer].inner_state[0].mu)[0]
    }
    for route in routes:
        optimizer, shape = held.pop(route.path, (None, None))
        if optimizer is None:
            _refuse(f"it holds nothing for {show(route.path)}, shape {route.shape}")
        if shape != route.shape:
            _refuse(
                f"{show(route.path)} has shape {route.shape}, but its momentum in the state has "
                f"{shape}"
            )
        if optimizer != route.optimizer:
            _refuse(
                f"{show(route.path)}, shape {route.shape}, belongs to {route.optimizer!r}, but its "
                f"momentum is kept by {optimizer!r}"
            )
    for path, (_, shape) in held.items():
        _refuse(f"it holds a momentum of {show(path)}, shape {shape}, which is no parameter")


def _refuse(found: str) -> None:
    raise ValueError(
        f"The optimizer's state was made for other parameters: {found}. Make one for these with "
        "tx.init(params), or restore the one that belongs to them."
    )
