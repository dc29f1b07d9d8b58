"""The collectives of a `shard_map` body, moving bfloat16 as two bytes on every backend."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Num

from muon_jax._common.bits import moved
from muon_jax._mesh.cost import exchange_stages
from muon_jax._newton_schulz import Rows


def all_to_all(
    x: Num[Array, "devices *shape"], axes: Sequence[str]
) -> Num[Array, "devices *shape"]:
    """Send `x[i]` to device `i` along `axes` (row-major), and get its piece in that place.

    In the stages of `exchange_stages`: first to the column of the mesh, say, and then to the row.
    """
    if not axes:
        return x
    sizes = {axis: lax.axis_size(axis) for axis in axes}
    stages = exchange_stages(axes, sizes)
    lengths = [math.prod(sizes[axis] for axis in stage) for stage in stages]

    def exchange(bits: jax.Array) -> jax.Array:
        bits = bits.reshape(*lengths, *x.shape[1:])
        for number, stage in enumerate(stages):
            bits = lax.all_to_all(bits, stage, number, number, tiled=True)
        return bits.reshape(x.shape)

    return moved(x, exchange)


def all_gather(x: Num[Array, "*shape"], axes: Sequence[str]) -> Num[Array, "devices *shape"]:
    """Stack the arrays of all devices along `axes` (row-major), the same on each of them.

    One axis at a time, which costs the same bytes: a gather over hundreds of TPU chips at once
    becomes an all-reduce of zeros and the piece, twice the bytes.
    """

    def gather(bits: jax.Array) -> jax.Array:
        for axis in reversed(axes):
            bits = lax.all_gather(bits, axis, to="invarying")
        return bits.reshape(math.prod(bits.shape[: bits.ndim - x.ndim]), *x.shape)

    return moved(x, gather)


@dataclasses.dataclass(frozen=True)
class RowShare(Rows):
    """Neighbours that hold the same matrices and divide the work on them by rows.

    Attributes:
      axis: the mesh axis along which they are neighbours.
      size: the length of that axis.
      ways: the number of neighbours that share a matrix; it divides `size` and the rows.
      dtype: the dtype in which rows travel. It holds them without loss, as they are rounded to it,
        also where the CPU keeps them in a wider one.
    """

    axis: str
    size: int
    ways: int
    dtype: jnp.dtype

    def own(self, x: Inexact[Array, "*batch rows cols"]) -> Inexact[Array, "*batch _ cols"]:
        """The rows that this device computes."""
        rows = x.shape[-2] // self.ways
        start = lax.axis_index(self.axis) % self.ways * rows
        return lax.dynamic_slice_in_dim(x, start, rows, axis=x.ndim - 2)

    def gather(self, x: Inexact[Array, "*batch own cols"]) -> Inexact[Array, "*batch _ cols"]:
        """The rows of all sharers, each having computed its own."""
        groups = [[*range(k, k + self.ways)] for k in range(0, self.size, self.ways)]
        everyone = self.ways == self.size

        def gather(bits: jax.Array) -> jax.Array:
            return lax.all_gather(
                bits,
                self.axis,
                axis=bits.ndim - 2,
                tiled=True,
                axis_index_groups=None if everyone else groups,
            )

        with jax.named_scope("muon.split"):
            return moved(x.astype(self.dtype), gather).astype(x.dtype)


def axes_index(axes: Sequence[str]) -> jax.Array | int:
    """This device's row-major coordinate along `axes`."""
    return lax.axis_index(tuple(axes)) if axes else 0
