"""Transpositions that are written out, for XLA:CPU."""

import jax
from jax import lax

TILE = 32
"""Rows and columns that are transposed at a time: a cache line of bfloat16."""


def transpose_in_tiles(x: jax.Array) -> jax.Array:
    """``X^T``, written out; XLA:CPU walks whole columns of ``X`` for it unless it is cut in tiles.

    The barriers keep XLA from folding the transposition into a product, in a layout which is slow.
    """
    *batch, rows, cols = x.shape
    x, first = lax.optimization_barrier(x), len(batch)
    if rows % TILE or cols % TILE:
        return lax.optimization_barrier(x.mT)
    tiles = x.reshape(*batch, rows // TILE, TILE, cols // TILE, TILE)
    order = (*range(first), first + 2, first, first + 3, first + 1)
    turned = lax.optimization_barrier(tiles.transpose(order))
    return turned.swapaxes(first + 1, first + 2).reshape(*batch, cols, rows)
