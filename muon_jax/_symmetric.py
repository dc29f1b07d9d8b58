"""Symmetric products whose part above the diagonal is mirrored: ``X X^T``, and ``b A + c A A``.

X is cut into panels of rows. Each is multiplied with the rows up to its own end, and a block above
the diagonal is its mirror image, transposed. With four panels, 10 blocks of 16:

    panel 1    x . . .
    panel 2    x x . .
    panel 3    x x x .
    panel 4    x x x x

The library that XLA:CPU multiplies bfloat16 with adds up an entry's products in one order, whatever
rows are beside it, and the entry across the diagonal has the same products. So bits are those of
the whole product (tests).
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Num

from muon_jax._common.bits import moved
from muon_jax._transposition import TILE, transpose_in_tiles

MOST_PANELS = 4
"""Of four, 5/8 are multiplied; eight would leave out a sixteenth more, in twice the kernels."""

PANEL_ROWS = 128
"""What a panel has at least: 512x2048 takes 0.91 of the time with four panels, 0.93 with two."""

LEAST_ROWS, LEAST_COLS = 384, 640
"""What X has at least: 640x640 takes 0.87 of the time, 512x512 and 256x640 about all of it."""

Finish = Callable[..., Inexact[Array, "..."]]
"""From a block of the sums, and the same block of other symmetric matrices, to what is stored."""


def panels(rows: int, cols: int) -> int:
    """How many panels an X of this shape is cut into; 1 where the whole is about as fast.

    What is put together costs a pass over ``rows^2``, and what is left out ``rows^2 cols``: so the
    columns decide (EXPERIMENTS.md), and few rows are not worth the compilation.
    """
    if rows < LEAST_ROWS or cols < LEAST_COLS:
        return 1
    return min(MOST_PANELS, rows // PANEL_ROWS)


def left_out(rows: int, cols: int) -> float:
    """The share of the FLOPs of ``X X^T`` that is not computed: 0 to 3/8."""
    spans = _spans(rows, panels(rows, cols))
    return 1 - sum((stop - start) * stop for start, stop in spans) / rows**2


def mirrored(
    x: Inexact[Array, "*batch rows cols"],
    product: Callable[[jax.Array, jax.Array], jax.Array],
    finish: Finish,
    beside: Sequence[Inexact[Array, "*_ rows rows"]],
) -> Inexact[Array, "*batch rows rows"]:
    """``finish(X X^T, *beside)``, of which the blocks above the diagonal are mirrored.

    Args:
      x: real matrices.
      product: ``X Y^T`` of two matrices.
      finish: entry by entry, and rounds; what it makes of symmetric matrices is symmetric.
      beside: matrices that `finish` takes behind the sums, symmetric to the last bit.
    """
    spans = _spans(x.shape[-2], panels(*x.shape[-2:]))
    rows = moved(x, lambda x: [(x[..., start:stop, :], x[..., :stop, :]) for start, stop in spans])
    blocks = [
        moved(other, lambda other: [other[..., start:stop, :stop] for start, stop in spans])
        for other in beside
    ]
    below = [
        finish(product(own, before), *others)
        for (own, before), *others in zip(rows, *blocks, strict=True)
    ]
    return moved(below, lambda below: _mirror(below, spans))


def _mirror(
    below: list[Num[Array, "*batch _ _"]], spans: list[tuple[int, int]]
) -> Num[Array, "*batch rows rows"]:
    """The whole matrix, of the panels up to their diagonal blocks."""
    whole = []
    for number, (start, stop) in enumerate(spans):
        after = [transpose_in_tiles(panel[..., start:stop]) for panel in below[number + 1 :]]
        whole.append(jnp.concatenate([below[number], *after], axis=-1))
    return jnp.concatenate(whole, axis=-2)


def _spans(rows: int, count: int) -> list[tuple[int, int]]:
    """The first row of each panel and the first behind it; all begin with whole tiles."""
    starts = [rows * number // count // TILE * TILE for number in range(count)]
    return [*itertools.pairwise([*starts, rows])]
