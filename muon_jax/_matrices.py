"""See a parameter as batches of matrices, and put the matrices back.

`optax.contrib.MuonDimensionNumbers` says which axes of a leaf are reduced (fan-in) and which are
outputs (fan-out); all others are a batch. `FusedBlocks` and `SplitAxis` add what it cannot say:
that an axis holds several matrices side by side, such as Q, K and V, or equal ones, such as heads.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact
from optax.contrib import MuonDimensionNumbers

from muon_jax._common.checks import is_integer


@dataclasses.dataclass(frozen=True)
class FusedBlocks:
    """Several matrices side by side along one axis, each to be orthogonalized by itself.

    Attributes:
      sizes: the length of each block along `axis`; together they fill it.
      axis: the fused axis, one of the matrix axes; None means the output axis.
      dimension_numbers: the matrix axes of the whole leaf, of which `axis` is one. None means
        `[in, out]`, for a leaf of two axes: which of more are the matrices' cannot be known.

    Raises:
      TypeError: for sizes or an axis that are no whole numbers, and for other dimension numbers;
        what the leaf contradicts raises from the optimizer's `init`.

    Examples:
      A fused QKV kernel `[d, q + k + v]` and a gate-up stack `[experts, d, 2 * f]`:

      >>> qkv = FusedBlocks(sizes=(512, 128, 128))
      >>> gate_up = FusedBlocks((1408, 1408), dimension_numbers=MuonDimensionNumbers(1, 2))
    """

    sizes: tuple[int, ...]
    axis: int | None = None
    dimension_numbers: MuonDimensionNumbers | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not isinstance(sizes, Sequence):
            raise TypeError(f"FusedBlocks.sizes lists the length of each block; got {sizes!r}.")
        if not all(map(is_integer, sizes)):
            raise TypeError(f"FusedBlocks.sizes must be whole numbers; got {sizes!r}.")
        if self.axis is not None and not is_integer(self.axis):
            raise TypeError(f"FusedBlocks.axis must be one axis, an integer; got {self.axis!r}.")
        numbers = self.dimension_numbers
        if numbers is not None and not isinstance(numbers, MuonDimensionNumbers):
            raise TypeError(
                "FusedBlocks.dimension_numbers must be optax.contrib.MuonDimensionNumbers or None; "
                f"got {numbers!r}."
            )
        object.__setattr__(self, "sizes", tuple(map(int, sizes)))


@dataclasses.dataclass(frozen=True)
class SplitAxis:
    """Equal matrices side by side along one axis: what ``heads=`` makes of a projection's kernel.

    One reshape takes them apart, and the axis of `parts` that it adds is a batch.

    Attributes:
      axis: the axis, one of the matrix axes, counted from 0.
      parts: how many lie along it.
      dimension_numbers: the matrix axes of the whole leaf.
    """

    axis: int
    parts: int
    dimension_numbers: MuonDimensionNumbers


MatrixSpec = MuonDimensionNumbers | FusedBlocks | SplitAxis
"""What says which axes of a leaf form its matrices."""


def is_matrix_spec(node: object) -> bool:
    """Whether a tree node says which axes form the matrices of a leaf."""
    return isinstance(node, MatrixSpec)


def is_tall(shape: Sequence[int]) -> bool:
    """Whether matrices `[..., rows, cols]` are taller than wide."""
    return shape[-2] > shape[-1]


@dataclasses.dataclass(frozen=True)
class _Block:
    """One slice of the leaf along one axis."""

    axis: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One batch of equal matrices inside a leaf: `[batch, fan_in, fan_out]`."""

    shape: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    block: _Block | None = None

    def of_shape(self, shape: tuple[int, ...]) -> "MatrixView":
        """The same axes of another leaf, such as a shard of this one."""
        return dataclasses.replace(self, shape=shape)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes that are neither reduction nor output, in the leaf's order."""
        matrix = {*self.reduction, *self.output}
        return tuple(axis for axis in range(len(self.shape)) if axis not in matrix)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of the part of the leaf that this view covers."""
        shape = list(self.shape)
        if self.block is not None:
            shape[self.block.axis] = self.block.size
        return tuple(shape)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """`(batch, fan_in, fan_out)`."""
        shape = self.block_shape
        batch, fan_in, fan_out = (
            math.prod(shape[axis] for axis in axes)
            for axes in (self.batch_axes, self.reduction, self.output)
        )
        return batch, fan_in, fan_out

    @property
    def is_tall(self) -> bool:
        """Whether its matrices have more rows than columns: on a mesh they are turned wide."""
        return is_tall(self.matrices)

    def take(self, leaf: Inexact[Array, "*shape"]) -> Inexact[Array, "batch fan_in fan_out"]:
        """The matrices of this view."""
        if self.block is not None:
            block = self.block
            leaf = jax.lax.slice_in_dim(
                leaf, block.start, block.start + block.size, axis=block.axis
            )
        order = (*self.batch_axes, *self.reduction, *self.output)
        return leaf.transpose(order).reshape(self.matrices)

    def put(self, matrices: Inexact[Array, "batch fan_in fan_out"]) -> Inexact[Array, "*shape"]:
        """The inverse of `take`: the part of the leaf that this view covers."""
        order = (*self.batch_axes, *self.reduction, *self.output)
        block_shape = self.block_shape
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrices.reshape([block_shape[axis] for axis in order]).transpose(inverse)


@dataclasses.dataclass(frozen=True)
class LeafViews:
    """All the matrices of one leaf: one view, or one for each fused block.

    Attributes:
      each: the views of the leaf; where an axis is split, of the leaf with `[parts, rest]` in its
        place.
      split: that axis, which is also where its parts are in the views.
    """

    each: tuple[MatrixView, ...]
    split: int | None = None

    def __len__(self) -> int:
        """The number of views."""
        return len(self.each)

    def __iter__(self) -> Iterator[MatrixView]:
        """The views, in the leaf's order."""
        return iter(self.each)

    def __getitem__(self, index: int) -> MatrixView:
        """The view of that number."""
        return self.each[index]

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes of the leaf itself along which nothing but stacks lie."""
        axes = self.each[0].batch_axes
        return axes if self.split is None else self.own_axes(axes)

    def own_axes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Axes of the views as axes of the leaf, without the one that is split."""
        if self.split is None:
            return (*axes,)
        both = (self.split, self.split + 1)
        return tuple(axis - (axis > self.split) for axis in axes if axis not in both)

    def take(self, leaf: Inexact[Array, "*shape"]) -> list[Inexact[Array, "_ _ _"]]:
        """The matrices of each view."""
        if self.split is not None:
            leaf = leaf.reshape(self.each[0].shape)
        return [view.take(leaf) for view in self.each]

    def put(self, stacks: Sequence[Inexact[Array, "_ _ _"]]) -> Inexact[Array, "*shape"]:
        """The leaf made of the matrices of each view."""
        parts = [view.put(stack) for view, stack in zip(self.each, stacks, strict=True)]
        block = self.each[0].block
        leaf = parts[0] if block is None else jnp.concatenate(parts, axis=block.axis)
        if self.split is None:
            return leaf
        return leaf.reshape(*leaf.shape[: self.split], -1, *leaf.shape[self.split + 2 :])


def leaf_views(shape: Sequence[int], spec: MatrixSpec, where: str) -> LeafViews:
    """The matrices of a leaf of `shape`, as `spec` declares them.

    Args:
      shape: the shape of the leaf.
      spec: which axes form its matrices.
      where: the leaf's path, for errors.

    Raises:
      ValueError: for axes out of range, named twice or missing, for blocks that do not lie on a
        matrix axis or do not fill it, and for blocks of three axes or more of which none is said
        to be a matrix's.
      TypeError: for axes that are no integers.
    """
    shape = tuple(shape)
    numbers: Any = spec if isinstance(spec, MuonDimensionNumbers) else spec.dimension_numbers
    if isinstance(spec, FusedBlocks):
        numbers = _numbers_of_blocks(shape, spec, where)
    reduction = _axes(numbers.reduction_axis, shape, where, "reduction_axis")
    output = _axes(numbers.output_axis, shape, where, "output_axis")
    shared = sorted({*reduction} & {*output})
    if shared:
        raise ValueError(
            f"{where}, shape {shape}: axis {shared[0]} is both a reduction and an output axis in "
            f"{numbers}; each axis belongs to one of them, or to neither (a batch)."
        )
    whole = MatrixView(shape, reduction, output)
    if isinstance(spec, SplitAxis):
        return _split_views(whole, spec)
    if not isinstance(spec, FusedBlocks):
        return LeafViews((whole,))

    if spec.axis is None and len(output) > 1:
        raise ValueError(
            f"{where}, shape {shape}: FusedBlocks.axis must say which of the output axes {output} "
            "holds the blocks."
        )
    given = numbers.output_axis if spec.axis is None else spec.axis
    (axis,) = _axes(given, shape, where, "FusedBlocks.axis")
    if axis in whole.batch_axes:
        raise ValueError(
            f"{where}, shape {shape}: FusedBlocks.axis={spec.axis} is a batch axis under "
            f"{numbers}, whose matrices are separate already; name a reduction or output axis."
        )
    if not spec.sizes or any(size < 1 for size in spec.sizes) or sum(spec.sizes) != shape[axis]:
        raise ValueError(
            f"{where}, shape {shape}: FusedBlocks.sizes={tuple(spec.sizes)} must be positive and "
            f"add up to the length of axis {axis}, {shape[axis]}; they add up to {sum(spec.sizes)}."
        )
    starts = [sum(spec.sizes[:index]) for index in range(len(spec.sizes))]
    return LeafViews(
        tuple(
            dataclasses.replace(whole, block=_Block(axis, start, size))
            for start, size in zip(starts, spec.sizes, strict=True)
        )
    )


def _split_views(whole: MatrixView, spec: SplitAxis) -> LeafViews:
    before, after = whole.shape[: spec.axis], whole.shape[spec.axis + 1 :]
    rest, left = divmod(whole.shape[spec.axis], spec.parts)
    assert not left and spec.axis not in whole.batch_axes, (whole, spec)

    def behind_parts(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis + (axis >= spec.axis) for axis in axes)

    view = MatrixView(
        (*before, spec.parts, rest, *after),
        behind_parts(whole.reduction),
        behind_parts(whole.output),
    )
    return LeafViews((view,), spec.axis)


def _numbers_of_blocks(
    shape: tuple[int, ...], spec: FusedBlocks, where: str
) -> MuonDimensionNumbers:
    if spec.dimension_numbers is not None:
        return spec.dimension_numbers
    if len(shape) > 2:
        raise ValueError(
            f"{where}, shape {shape}: FusedBlocks({spec.sizes}) does not say which of its "
            f"{len(shape)} axes form the matrices. For a stack of [in, out] matrices write "
            f"FusedBlocks({spec.sizes}, dimension_numbers=MuonDimensionNumbers(-2, -1))."
        )
    return MuonDimensionNumbers(0, 1)


def _axes(axes: Any, shape: tuple[int, ...], where: str, name: str) -> tuple[int, ...]:
    several = isinstance(axes, Sequence) and not isinstance(axes, str)
    listed: list[Any] = [*axes] if several else [axes]
    rank = len(shape)
    if not all(map(is_integer, listed)):
        raise TypeError(
            f"{where}, shape {shape}: {name}={axes!r} must be an axis or several, as integers from "
            f"{-rank} to {rank - 1}."
        )
    wrong = [axis for axis in listed if not -rank <= axis < rank]
    if wrong or not listed:
        raise ValueError(
            f"{where}, shape {shape}: {name}={axes} does not name axes of a leaf of rank {rank}; "
            f"use axes from {-rank} to {rank - 1}."
        )
    normal = tuple(axis % rank for axis in listed)
    if len({*normal}) < len(normal):
        raise ValueError(f"{where}, shape {shape}: {name}={axes} names an axis twice.")
    return normal
