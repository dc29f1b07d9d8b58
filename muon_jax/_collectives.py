"""The collectives of a `shard_map` body, moving bfloat16 as two bytes on every backend."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Num


def all_to_all(
    x: Num[Array, "devices *shape"], axes: Sequence[str]
) -> Num[Array, "devices *shape"]:
    """Send `x[i]` to device `i` along `axes` (row-major); what comes has its sender's place."""
    if not axes:
        return x
    return _from_wire(lax.all_to_all(_to_wire(x), tuple(axes), 0, 0, tiled=True), x.dtype)


def all_gather(x: Num[Array, "*shape"], axes: Sequence[str]) -> Num[Array, "devices *shape"]:
    """Stack the arrays of all devices along `axes` (row-major), the same on each of them.

    One axis at a time, which costs the same bytes: a gather over hundreds of TPU chips at once
    becomes an all-reduce of zeros and the piece, twice the bytes.
    """
    out = _to_wire(x)
    for axis in reversed(axes):
        out = lax.all_gather(out, axis, to="invarying")
    return _from_wire(out.reshape(-1, *x.shape), x.dtype)


class RowShare(NamedTuple):
    """Neighbours that hold the same matrices and divide the work on them by rows.

    Attributes:
      axis: the mesh axis along which they are neighbours.
      size: its length.
      ways: how many of them share; divides `size` and the rows.
    """

    axis: str
    size: int
    ways: int

    def own(self, x: Inexact[Array, "*batch rows cols"]) -> Inexact[Array, "*batch _ cols"]:
        """The rows that this device computes."""
        rows = x.shape[-2] // self.ways
        start = lax.axis_index(self.axis) % self.ways * rows
        return lax.dynamic_slice_in_dim(x, start, rows, axis=x.ndim - 2)

    def gather(self, x: Inexact[Array, "*batch own cols"]) -> Inexact[Array, "*batch _ cols"]:
        """The rows of all sharers, each having computed its own."""
        groups = [[*range(k, k + self.ways)] for k in range(0, self.size, self.ways)]
        everyone = self.ways == self.size
        with jax.named_scope("muon.split"):
            out = lax.all_gather(
                _to_wire(x),
                self.axis,
                axis=x.ndim - 2,
                tiled=True,
                axis_index_groups=None if everyone else groups,
            )
        return _from_wire(out, x.dtype)


def axes_index(axes: Sequence[str]) -> jax.Array | int:
    """This device's row-major coordinate along `axes`."""
    return lax.axis_index(tuple(axes)) if axes else 0


# XLA:CPU widens a bfloat16 collective to float32. The bits, as an integer, it leaves alone.
def _to_wire(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_wire(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x
