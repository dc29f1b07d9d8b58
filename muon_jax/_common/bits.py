"""bfloat16 that is only moved, as its bits.

XLA:CPU widens what it moves in bfloat16 to float32, and leaves integers alone. Bits have no
derivative, so that of what is moved is given by hand: it moves alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def moved(tree: Any, move: Callable[[Any], Any]) -> Any:
    """``move(tree)``, of a function that moves elements and computes nothing.

    Leaves have any dtype, but no uint16 lies beside bfloat16.
    """
    if all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(tree)):
        return move(tree)

    @jax.custom_jvp
    def as_bits(tree: Any) -> Any:
        return from_bits(move(to_bits(tree)))

    @as_bits.defjvp
    def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        return as_bits(*primals), move(*tangents)

    return as_bits(tree)


def to_bits(tree: Any) -> Any:
    """The bits of leaves in bfloat16; the others as they are."""
    return jax.tree.map(
        lambda x: lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, tree
    )


def from_bits(tree: Any) -> Any:
    """The inverse of `to_bits`."""
    return jax.tree.map(
        lambda x: lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, tree
    )
