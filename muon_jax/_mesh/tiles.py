"""Which cuts of a gradient a TPU's reduce-scatter takes as they are, and in which layout.

XLA:TPU keeps an array in tiles of 8 sublanes by 128 lanes, the two minor dimensions in either
order. Read off compiled programs (`benchmarks.tiles` makes the table; for float32 on eight chips):

    along lanes      shards of whole tiles, multiples of 128, arrive as they are. With others the
                     reduce-scatter is given up: an all-reduce, twice the bytes
    along sublanes   shards are cut into equal runs of tiles that fit a buffer of 305 tiles, twice
                     as many where the lanes are an odd number of tiles. What does not divide is
                     padded, and mended by collective-permutes: both send what the padding holds

So 1728 columns of 640 over eight devices, 216 each, are padded to 224 (27 tiles and 5 of lanes),
and sent 1.07 times; the 640 rows, 80 each, are sent once. Of 2048x2816 neither side suits the
sublanes, and the 2048, 256 each, suit the lanes. Where no side suits, as in 672x672, the report
says so.

Which dimension lies along the lanes XLA chooses by what stands around; `laid_out` tells it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Layout as TiledLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Inexact

from muon_jax._mesh.specs import AnyMesh

SUBLANES, LANES = 8, 128
BUFFER_TILES = 305
GIVEN_UP = 2.0  # an all-reduce
PLANE_CHIPS = 8


def scatter_waste(shard: int, other: int, *, only_lanes: bool = False) -> float:
    """What a TPU sends to reduce-scatter a matrix, divided by what its elements need: 1 to 2.

    Args:
      shard: the length of one device's shard, along the dimension that is cut.
      other: the length of the other dimension.
      only_lanes: whether that dimension will lie along the lanes, whatever suits it.
    """
    if _suits_lanes(shard):
        return 1.0
    return GIVEN_UP if only_lanes else _waste_of_sublanes(shard, other)


def laid_out(x: Inexact[Array, "rows cols"], dim: int) -> Inexact[Array, "rows cols"]:
    """A shard that a reduce-scatter cut along dimension `dim`, in the layout that suits a TPU.

    Elsewhere, and where either layout is as good, it is handed on as it is.
    """
    shard, other = x.shape[dim], x.shape[1 - dim]
    if not _suits_lanes(shard):
        return _in_order(x, (dim, 1 - dim))
    return x if _waste_of_sublanes(shard, other) == 1 else _in_order(x, (1 - dim, dim))


def scatters_at_once(mesh: AnyMesh) -> bool:
    """Whether XLA:TPU reduce-scatters over all axes of a mesh at once."""
    return isinstance(mesh, Mesh) and is_small_plane([*mesh.devices.flat])


def is_small_plane(devices: Sequence[Any]) -> bool:
    """Whether these are up to eight TPU chips in a plane.

    Over others, a cube of eight or 16 and more, XLA makes an all-reduce of a reduce-scatter; not on
    a slice of 4x8, which pads it to as much.
    """
    if len(devices) > PLANE_CHIPS or any(device.platform != "tpu" for device in devices):
        return False
    along = zip(*(device.coords for device in devices), strict=True)
    return sum(len({*places}) > 1 for places in along) < 3


def _suits_lanes(shard: int) -> bool:
    return shard % LANES == 0


def _waste_of_sublanes(shard: int, other: int) -> float:
    tiles, lanes = -(-shard // SUBLANES), -(-other // LANES)
    runs = -(-tiles // max(1, BUFFER_TILES // lanes))
    runs *= 1 + lanes % 2
    padded = -(-tiles // runs) * runs * SUBLANES
    return min(GIVEN_UP, 1 + 2 * (padded - shard) / shard)


@functools.partial(jax.jit, static_argnames="order")
def _in_order(x: Inexact[Array, "*shape"], order: tuple[int, ...]) -> Inexact[Array, "*shape"]:
    def on_tpu(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, TiledLayout(order))

    return lax.platform_dependent(x, tpu=on_tpu, default=lambda x: x)
