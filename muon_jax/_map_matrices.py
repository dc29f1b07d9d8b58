"""The matrices of a tree, as `muon` sees them, and the way back: what variants are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from muon_jax._attention.split_heads import Heads
from muon_jax._common.paths import is_absent, show
from muon_jax._common.trees import PyTree
from muon_jax._matrices import LeafViews
from muon_jax._routes import Route
from muon_jax._routing.route_leaves import DimensionNumbers, route_leaves


def map_matrices(
    function: Callable[[Inexact[Array, "batch fan_in fan_out"]], Any],
    tree: PyTree,
    params: PyTree,
    *,
    muon_weight_dimension_numbers: DimensionNumbers = None,
    heads: Heads = "joint",
) -> dict[str, list[Any]]:
    """Apply a function to the matrices of each Muon leaf, as `muon` sees them.

    Args:
      function: takes `[batch, fan_in, fan_out]`, such as `svd_entropy` or `orthogonality_error`.
      tree: parameters, updates or momenta; a pytree like `params`.
      params: the parameters, or their `jax.ShapeDtypeStruct`s, which are routed.
      muon_weight_dimension_numbers: as given to `muon`.
      heads: as given to `muon`.

    Returns:
      From each leaf's path to the results for its views: one, or one for each fused block.

    Raises:
      ValueError, TypeError: where `muon` would, for the same parameters.

    Examples:
      >>> params = {"up": {"kernel": jnp.eye(4, 8), "bias": jnp.zeros(8)}}
      >>> errors = map_matrices(orthogonality_error, params, params)
      >>> {path: errors_of_leaf[0].tolist() for path, errors_of_leaf in errors.items()}
      {'up/kernel': [0.0]}
    """
    if not callable(function):
        raise TypeError(f"map_matrices takes a function of matrices first; got {function!r}.")
    routes, structure = route_leaves(params, muon_weight_dimension_numbers, heads)
    return {
        show(route.path): [function(matrices) for matrices in route.views.take(leaf)]
        for route, leaf in zip(routes, leaves_like(structure, tree, routes), strict=True)
        if route.views is not None and not is_absent(leaf)
    }


def put_matrices(
    matrices: Mapping[str, Sequence[Inexact[Array, "batch fan_in fan_out"]]],
    tree: PyTree,
    params: PyTree,
    *,
    muon_weight_dimension_numbers: DimensionNumbers = None,
    heads: Heads = "joint",
) -> PyTree:
    """Put matrices in the places that `map_matrices` took them from.

    Together the two make a transformation of matrices that works on stacks, fused blocks and
    heads: see "A variant of Muon in thirty lines" in the documentation.

    Args:
      matrices: what `map_matrices` returned for the same `tree`, with a function that keeps the
        shape. It maps each leaf's path to one `[batch, fan_in, fan_out]` for each of its views.
      tree: parameters, updates or momenta; a pytree like `params`.
      params: the parameters, or their `jax.ShapeDtypeStruct`s, which are routed.
      muon_weight_dimension_numbers: as given to `muon`.
      heads: as given to `muon`.

    Returns:
      `tree` with Muon's leaves made of `matrices`, each in the leaf's own dtype. AdamW's leaves,
      and None and masked ones, are the tree's.

    Raises:
      ValueError, TypeError: where `muon` would, for the same parameters; ValueError for a leaf
        whose matrices are missing or of another shape, and for a path that is none of Muon's.

    Examples:
      Updates with columns of unit length, in whatever leaves hold them:

      >>> def normalised(x):
      ...     return x / jnp.linalg.norm(x, axis=1, keepdims=True)
      >>> updates = {"mlp": {"kernel": jnp.full((4, 3), 2.0), "bias": jnp.ones(3)}}
      >>> updates = put_matrices(map_matrices(normalised, updates, updates), updates, updates)
      >>> print(updates["mlp"]["kernel"][0], updates["mlp"]["bias"])
      [0.5 0.5 0.5] [1. 1. 1.]
    """
    routes, structure = route_leaves(params, muon_weight_dimension_numbers, heads)
    left = dict(matrices)
    leaves = []
    for route, leaf in zip(routes, leaves_like(structure, tree, routes), strict=True):
        if route.views is not None and not is_absent(leaf):
            leaf = _put(route.views, left.pop(show(route.path), ()), leaf, show(route.path))
        leaves.append(leaf)
    if left:
        raise ValueError(
            f"put_matrices was given matrices of {min(left)!r}, which is no leaf of Muon's that "
            "the tree has; give it what map_matrices returned for this tree."
        )
    return structure.unflatten(leaves)


def _put(
    views: LeafViews, stacks: Sequence[jax.Array], leaf: Inexact[Array, "*shape"], where: str
) -> Inexact[Array, "*shape"]:
    expected, came = [view.matrices for view in views], [*map(jnp.shape, stacks)]
    if came != expected:
        raise ValueError(
            f"put_matrices: the matrices of {where} have the shapes {expected}; got {came}. Give "
            "it what map_matrices returned for this tree, with a function that keeps the shape."
        )
    return views.put(stacks).astype(leaf.dtype)


def leaves_like(structure: Any, tree: PyTree, routes: Sequence[Route]) -> list[Any]:
    """The leaves of a tree like the parameters'."""
    try:
        leaves = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"The tree differs from that of params: {error}") from error
    for route, leaf in zip(routes, leaves, strict=True):
        if not is_absent(leaf) and jnp.shape(leaf) != route.shape:
            raise ValueError(
                f"{show(route.path)} has shape {jnp.shape(leaf)} in the tree, and {route.shape} in "
                "params."
            )
    return leaves
