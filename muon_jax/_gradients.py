"""Match gradients to parameters, and refuse those that do not fit."""

from typing import Any

import jax.numpy as jnp

from muon_jax._common.paths import is_absent, show
from muon_jax._common.trees import PyTree
from muon_jax._routes import Route


def gradient_leaves(
    structure: Any, updates: PyTree, like: list[Any], routes: list[Route]
) -> list[Any]:
    """The gradients in the order of the parameters' leaves, None and masked ones included.

    Args:
      structure: the parameters' tree structure.
      updates: the gradients.
      like: parameters or momenta, to whose shapes the gradients must agree.
      routes: their paths, for errors.

    Raises:
      ValueError: where a tree or a shape differs.
      TypeError: for a gradient that is not floating-point, or complex where its parameter is real.
    """
    try:
        gradients = structure.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"The gradients' tree differs from that of the parameters given to init: {error}"
        ) from error
    for route, gradient, leaf in zip(routes, gradients, like, strict=True):
        if is_absent(gradient) or is_absent(leaf):
            continue
        if jnp.shape(gradient) != jnp.shape(leaf):
            raise ValueError(
                f"{show(route.path)}: its gradient has shape {jnp.shape(gradient)}, but the "
                f"parameter given to init had {jnp.shape(leaf)}."
            )
        dtype = jnp.result_type(gradient)
        kind = jnp.inexact if jnp.iscomplexobj(leaf) else jnp.floating
        if not jnp.issubdtype(dtype, kind) or jnp.dtype(dtype).itemsize < 2:
            raise TypeError(
                f"{show(route.path)}: its gradient has dtype {dtype}, which is no gradient of a "
                f"parameter of dtype {leaf.dtype}."
            )
    return gradients
