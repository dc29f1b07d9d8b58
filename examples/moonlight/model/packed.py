"""Several samples in one row: which position belongs to which, and where it stands in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packed(NamedTuple):
    """Samples that lie behind each other in the rows of a batch.

    A position attends to itself and to earlier positions of its own segment. Padding is a segment
    too, number 0, so that its softmax has something to read; no statistic of attention counts it.

    Attributes:
        segment_bt: The sample of each position, an integer `[batch, time]`: 1, 2, ... in a row,
            and 0 for padding.
        position_bt: The place of each position in its sample, from 0, an integer `[batch, time]`.
    """

    segment_bt: jax.Array
    position_bt: jax.Array


def check_packed(packed: Packed, tokens_bt: jax.Array) -> None:
    """Checks that segments and positions are integers with the shape of the tokens.

    Raises:
        ValueError: They are not.
    """
    for name, value_bt in zip(packed._fields, packed, strict=True):
        if value_bt.shape != tokens_bt.shape or not jnp.issubdtype(value_bt.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be an integer array {list(tokens_bt.shape)} like the tokens, got "
                f"{value_bt.dtype}{list(value_bt.shape)}."
            )


def rope_positions(packed: Packed | None, time: int) -> jax.Array:
    """Positions for the rotation: `[1, time]` of whole rows, or `[batch, time]`."""
    return jnp.arange(time)[None] if packed is None else packed.position_bt
