"""Run all matrices of one shape as one batch.

The stacks of all leaves are concatenated by shape, iterated together, and cut apart again. The
program then holds one iteration for each shape, not one for each layer. Tall matrices are not
turned to join the wide ones, though Newton-Schulz commutes with transposition: XLA would turn the
float32 that they are made of, gradients, momenta and parameters (EXPERIMENTS.md).

A batch beyond `max_group_bytes`, counted in the dtype it is stacked in, goes through in chunks, one
after the other in a loop (`_common.loops`): the iteration's buffers (iterate, Gram matrix,
polynomial) are those of one chunk, and the program holds two iterations at most, however many
chunks there are. The batch itself is held whole, narrow, and its results take its place.
"""

import collections
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from muon_jax._common.loops import BatchFunction, in_chunks
from muon_jax._common.pieces import cut
from muon_jax._matrices import LeafViews
from muon_jax._momentum import heavy_ball
from muon_jax._update_rule import UpdateRule

DEFAULT_MAX_GROUP_BYTES = 2**30
"""1 GiB: 512 matrices of 1024x1024 in bfloat16."""


def map_by_shape(
    function: BatchFunction,
    stacks: Sequence[Inexact[Array, "_ _ _"]],
    max_group_bytes: int = DEFAULT_MAX_GROUP_BYTES,
) -> list[Inexact[Array, "_ _ _"]]:
    """Apply `function` to all matrices, batched by shape.

    Args:
      function: maps a batch of matrices to one of the same shape and dtype, each by itself.
      stacks: any number of `[batch, rows, cols]`.
      max_group_bytes: the largest batch given to `function`, in bytes; a single larger matrix is
        a batch of its own.

    Returns:
      The results, in the order and the shapes of `stacks`.
    """
    groups = collections.defaultdict(list)
    for index, stack in enumerate(stacks):
        if stack.size:
            groups[*stack.shape[1:], jnp.dtype(stack.dtype)].append(index)

    results = [*stacks]
    for (rows, cols, dtype), members in groups.items():
        capacity = max(1, max_group_bytes // (rows * cols * dtype.itemsize))
        parts = [stacks[index] for index in members]
        pieces = _cut(in_chunks(function, parts, capacity), parts)
        for index, piece in zip(members, pieces, strict=True):
            results[index] = piece
    return results


def batched_update(
    views: Sequence[LeafViews],
    rule: UpdateRule,
    gradients: Sequence[Inexact[Array, "..."]],
    momenta: Sequence[Inexact[Array, "..."]],
    max_group_bytes: int,
) -> tuple[list[Inexact[Array, "..."]], list[Inexact[Array, "..."]]]:
    """One step of momentum, orthogonalization and scale, of all leaves, on one device.

    Args:
      views: the matrices of each leaf.
      rule: what is done to each matrix.
      gradients: one for each leaf.
      momenta: one for each leaf.
      max_group_bytes: see `map_by_shape`.

    Returns:
      The updates, in the gradients' dtypes, and the momenta.
    """
    new_momenta, stacks = [], []
    for leaf, gradient, momentum in zip(views, gradients, momenta, strict=True):
        new, direction = heavy_ball(momentum, gradient, rule.beta, rule.nesterov)
        new_momenta.append(new.astype(momentum.dtype))
        # Cast before slicing: a leaf cut into chunks is then kept in the narrow dtype.
        stacks += leaf.take(rule.iteration.cast(direction))
    pairs = zip(stacks, map_by_shape(rule.iteration, stacks, max_group_bytes), strict=True)
    updates = []
    for leaf, gradient in zip(views, gradients, strict=True):
        matrices = []
        for view in leaf:
            direction, result = next(pairs)
            _, *matrix = view.matrices
            measured = rule.measure(direction, result) if rule.is_measured else None
            matrices.append(rule.finish(result, measured, (matrix[0], matrix[1])))
        updates.append(leaf.put(matrices).astype(gradient.dtype))
    return updates, new_momenta


def _cut(
    whole: Inexact[Array, "_ _ _"], parts: list[Inexact[Array, "_ _ _"]]
) -> list[Inexact[Array, "_ _ _"]]:
    """Undo `concatenate`."""
    ends = itertools.accumulate((len(part) for part in parts), initial=0)
    # A stack may lie on several devices along its first axis, and then so does the batch.
    is_local = all(len(part) == 1 for part in parts)
    return cut(whole, [*itertools.pairwise(ends)], axis=0, is_local=is_local)
