"""From the state's layout to the parameters': the gather that ends AdamW's half of ZeRO-1."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from muon_jax._mesh.collectives import all_gather
from muon_jax._mesh.layout import Layout
from muon_jax._mesh.specs import Sizes, local_shape, spec_axes

FUSED_GATHER_BYTES = 2**20
"""Shards up to this size share one collective; copying larger ones together would cost more."""


def gather_bytes(shards: Sequence[Any], layouts: Sequence[Layout], sizes: Sizes) -> int:
    """Bytes that one device sends in `gather_to_params`, by the shards' shapes and dtypes."""
    return sum(
        sum(_nbytes(shards[i]) for i in members) * (math.prod(sizes[a] for a in axes) - 1)
        for axes, members in _gathered_together(shards, layouts, sizes)
    )


def gather_to_params(
    shards: Sequence[Inexact[Array, "..."]], layouts: Sequence[Layout], sizes: Sizes
) -> list[Inexact[Array, "..."]]:
    """Inside a `shard_map`: from the state's layout to the parameters', in few collectives."""
    out = list(shards)
    for axes, members in _gathered_together(shards, layouts, sizes):
        with jax.named_scope("adamw.gather"):
            if len(members) == 1:  # a large one keeps its axes, see `part_runner`
                (i,) = members
                out[i] = _join(all_gather(shards[i], axes), layouts[i], axes, sizes)
                continue
            pieces = all_gather(jnp.concatenate([shards[i].reshape(-1) for i in members]), axes)
        start = 0
        for i in members:
            stop = start + shards[i].size
            out[i] = _join(pieces[:, start:stop], layouts[i], axes, sizes)
            start = stop
    return out


def _gathered_together(
    shards: Sequence[Any], layouts: Sequence[Layout], sizes: Sizes
) -> list[tuple[tuple[str, ...], list[int]]]:
    """The collectives: the mesh axes that each goes over, and the places of its shards.

    Shards up to `FUSED_GATHER_BYTES` travel together, where they are gathered over the same axes
    and differ along the same.
    """
    together = defaultdict(list)
    for index, (shard, layout) in enumerate(zip(shards, layouts, strict=True)):
        kept = spec_axes(layout.param)
        axes = tuple(axis for axis in sizes if axis in spec_axes(layout.state) - kept)
        alone = index if _nbytes(shard) > FUSED_GATHER_BYTES else None
        differs = frozenset(axis for axis in kept if sizes[axis] > 1)
        together[axes, differs, shard.dtype, alone].append(index)
    return [(axes, members) for (axes, *_), members in together.items() if axes]


def _nbytes(shard: Any) -> int:
    return shard.size * shard.dtype.itemsize


def _join(
    pieces: Inexact[Array, "devices *shard"], layout: Layout, axes: Sequence[str], sizes: Sizes
) -> Inexact[Array, "..."]:
    local = local_shape(layout.shape, layout.state, sizes)
    x = pieces.reshape(*(sizes[axis] for axis in axes), *local)
    order: list[int] = []
    for dim, named in enumerate(layout.state):
        order += [*(axes.index(a) for a in named if a in axes), len(axes) + dim]
    return x.transpose(order).reshape(local_shape(layout.shape, layout.param, sizes))
