"""What an optimizer can be given as parameters, and what is given to it by mistake."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._common.paths import Path, flatten_with_names, show

# Collections of Flax Linen that model.init returns beside "params".
_COLLECTIONS = frozenset({"batch_stats", "cache", "intermediates", "perturbations"})


def check_tree(params: Any, paths: list[Path]) -> None:
    """Raise for an empty tree, and for the variables of a Linen model given whole.

    Raises:
      ValueError: for either; a tree whose leaves are all masked is not empty.
    """
    if not paths and _is_bare(params):
        raise ValueError(
            f"muon was given a parameter tree without leaves: {params!r}. With Flax pass "
            'variables["params"] or nnx.state(model, nnx.Param).'
        )
    _check_variables(params)
    nodes = {path[: i + 1] for path in paths for i, _ in enumerate(path[:-1])}
    for node in sorted(nodes):
        if node[-1] in _COLLECTIONS and (*node[:-1], "params") in nodes:
            raise ValueError(
                f"The parameters hold the collection {show(node)} beside "
                f"{show((*node[:-1], 'params'))}: these are a Linen model's variables, of which "
                'only the parameters are trained. Pass variables["params"].'
            )


def _check_variables(params: Any) -> None:
    """Raise for the statistics among an NNX model's whole state, which `init` sees as Variables."""
    is_other = lambda node: any(  # noqa: E731
        kind.__name__ in ("BatchStat", "Cache", "Intermediate")
        and str(kind.__module__).startswith("flax.nnx")
        for kind in type(node).__mro__
    )
    for path, node in flatten_with_names(params, is_other)[0]:
        if is_other(node):
            raise ValueError(
                f"The parameters hold {show(path)}, an nnx.{type(node).__name__}, which is not "
                "trained. Pass nnx.state(model, nnx.Param), or wrt=nnx.Param to nnx.Optimizer."
            )


def parameter_shape(path: Path, leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf that an optimizer can update.

    Raises:
      TypeError: for a leaf that is no array of a real or complex floating-point dtype of 16 bits
        or more.
    """
    try:
        # A key array's dtype is none of NumPy's, and jnp.result_type would not take it.
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        is_inexact = jnp.issubdtype(dtype, jnp.inexact)
        shape = tuple(jnp.shape(leaf))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{show(path)} is {leaf!r}, of type {type(leaf).__name__}, and no array. Keep it out "
            "of the parameters: filter them, such as by nnx.Param or equinox.is_inexact_array."
        ) from error
    if not is_inexact:
        raise TypeError(
            f"{show(path)} has dtype {dtype}, and an optimizer updates floating-point or complex "
            "leaves only. Keep it out of the parameters: filter it by type (nnx.Param), mask it "
            "with optax.masked, or give it to optax.set_to_zero in optax.partition."
        )
    if jnp.dtype(dtype).itemsize < 2:
        raise TypeError(
            f"{show(path)} has dtype {dtype}, which is too narrow to take updates. Keep the "
            "parameter in float32 and cast it to eight bits where the model uses it, or give it to "
            "another optimizer with optax.partition."
        )
    return shape


def _is_bare(tree: Any) -> bool:
    """Whether a tree without leaves is nothing but empty containers and None."""
    plain = (Mapping, list, tuple, type(None))
    masked = optax.MaskedNode
    return not jax.tree.leaves(
        tree, is_leaf=lambda node: isinstance(node, masked) or not isinstance(node, plain)
    )
