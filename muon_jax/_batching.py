"""Run all matrices of one shape, up to transposition, as one batch.

Newton-Schulz commutes with transposition, so the stacks of all leaves are brought to wide form,
concatenated by shape, iterated together, and cut apart again. The program then holds one
iteration for each shape, not one for each layer.

A batch is cut into chunks of at most `max_group_bytes`, counted in the dtype it is stacked in, so
that the iteration's buffers (iterate, Gram matrix, polynomial) are those of one chunk.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from muon_jax._matrices import LeafViews
from muon_jax._matrix_update import MatrixUpdate
from muon_jax._momentum import heavy_ball

DEFAULT_MAX_GROUP_BYTES = 2**30
"""1 GiB: 512 matrices of 1024x1024 in bfloat16."""


class _Piece(NamedTuple):
    """Matrices `start` to `stop` of one stack."""

    stack: int
    start: int
    stop: int


def map_by_shape(
    function: Callable[[Inexact[Array, "batch rows cols"]], Inexact[Array, "batch rows cols"]],
    stacks: Sequence[Inexact[Array, "_ _ _"]],
    max_group_bytes: int = DEFAULT_MAX_GROUP_BYTES,
) -> list[Inexact[Array, "_ _ _"]]:
    """Apply `function` to all matrices, batched by shape up to transposition.

    Args:
      function: maps a batch of wide matrices (rows <= cols) to one of the same shape and dtype,
        each matrix by itself, and commutes with transposition.
      stacks: any number of `[batch, rows, cols]`.
      max_group_bytes: the largest batch given to `function`, in bytes; a single larger matrix is
        a batch of its own.

    Returns:
      The results, in the order and the shapes of `stacks`.
    """
    groups = collections.defaultdict(list)
    for index, stack in enumerate(stacks):
        rows, cols = sorted(stack.shape[1:])
        if stack.size:
            groups[rows, cols, jnp.dtype(stack.dtype)].append(index)

    results = collections.defaultdict[int, list[jax.Array]](list)
    for (rows, cols, dtype), members in groups.items():
        capacity = max(1, max_group_bytes // (rows * cols * dtype.itemsize))
        # Wide stacks first, so that a batch has its tall ones together and transposes them once.
        members.sort(key=lambda index: _is_tall(stacks[index]))
        for chunk in _chunks([(index, len(stacks[index])) for index in members], capacity):
            batch = [stacks[piece.stack][piece.start : piece.stop] for piece in chunk]
            turn = sum(not _is_tall(part) for part in batch)
            wide, tall = batch[:turn], batch[turn:]
            turned = [_concatenate(tall).mT] if tall else []
            out = function(_concatenate([*wide, *turned]))
            count = sum(len(part) for part in wide)
            pieces = _cut(out[:count], wide) + _cut(out[count:].mT, tall)
            for piece, part in zip(chunk, pieces, strict=True):
                results[piece.stack].append(part)
    return [
        _concatenate(results[index]) if stack.size else stack for index, stack in enumerate(stacks)
    ]


def batched_update(
    views: Sequence[LeafViews],
    update: MatrixUpdate,
    gradients: Sequence[Inexact[Array, "..."]],
    momenta: Sequence[Inexact[Array, "..."]],
    max_group_bytes: int,
) -> tuple[list[Inexact[Array, "..."]], list[Inexact[Array, "..."]]]:
    """One step of momentum, orthogonalization and scale, of all leaves, on one device.

    Args:
      views: the matrices of each leaf.
      update: what is done to each matrix.
      gradients: one for each leaf.
      momenta: one for each leaf.
      max_group_bytes: see `map_by_shape`.

    Returns:
      The updates, in the gradients' dtypes, and the momenta.
    """
    new_momenta, stacks = [], []
    for leaf, gradient, momentum in zip(views, gradients, momenta, strict=True):
        new, nudged = heavy_ball(momentum, gradient, update.beta, update.nesterov)
        new_momenta.append(new.astype(momentum.dtype))
        # Cast before slicing: a leaf cut into chunks is then kept in the narrow dtype.
        stacks += leaf.take(update.iteration.cast(nudged))
    pairs = zip(stacks, map_by_shape(update.iteration, stacks, max_group_bytes), strict=True)
    updates = []
    for leaf, gradient in zip(views, gradients, strict=True):
        matrices = []
        for view in leaf.views:
            source, result = next(pairs)
            _, *matrix = view.matrices
            measured = update.measure(source, result) if update.is_measured else None
            matrices.append(update.finish(result, measured, (matrix[0], matrix[1])))
        updates.append(leaf.put(matrices).astype(gradient.dtype))
    return updates, new_momenta


def _chunks(members: list[tuple[int, int]], capacity: int) -> list[list[_Piece]]:
    """Cut consecutive matrices into chunks of nearly equal size, at most `capacity` each."""
    total = sum(count for _, count in members)
    count = -(-total // capacity)
    bounds = [total * k // count for k in range(count + 1)]
    chunks = []
    for low, high in itertools.pairwise(bounds):
        chunk, offset = [], 0
        for stack, length in members:
            start, stop = max(low - offset, 0), min(high - offset, length)
            if start < stop:
                chunk.append(_Piece(stack, start, stop))
            offset += length
        chunks.append(chunk)
    return chunks


def _is_tall(stack: Inexact[Array, "_ _ _"]) -> bool:
    return stack.shape[1] > stack.shape[2]


def _concatenate(parts: list[Inexact[Array, "_ _ _"]]) -> Inexact[Array, "_ _ _"]:
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _cut(
    whole: Inexact[Array, "_ _ _"], parts: list[Inexact[Array, "_ _ _"]]
) -> list[Inexact[Array, "_ _ _"]]:
    """Undo `_concatenate`."""
    ends = list(itertools.accumulate((len(part) for part in parts), initial=0))
    return [whole[start:stop] for start, stop in itertools.pairwise(ends)]
