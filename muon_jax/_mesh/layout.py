"""How a leaf, and the matrices in it, are cut over the devices of a mesh.

JAX has no uneven layout across a jit boundary, so ZeRO-1 shards each leaf of the state on
dimensions that divide: on the matrix axes first, then on stack axes, else over those mesh axes that
divide, else not at all. Of a matrix' two sides it is the longer, or the other where the shards of
that suit a TPU's tiles better (`tiles`).

Not on stack axes first, though every device would then hold whole matrices: where layers run in a
`lax.scan`, each layer's gradient is reduced inside the loop, one slice of the stack at a time. Onto
shards of a matrix axis that is a reduce-scatter; onto shards of the stack it is an all-reduce, and
sends twice the bytes: more than exchanging the momentum costs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec
from jaxtyping import Array, Inexact

from muon_jax._matrices import LeafViews, MatrixView, is_tall
from muon_jax._mesh.specs import AnyMesh, Sizes, Spec, local_shape, partition_spec, spec_axes
from muon_jax._mesh.split_layout import SplitLayout, split_layout, whole_parts
from muon_jax._mesh.tiles import scatter_waste


class Layout(NamedTuple):
    """Where one leaf lies: the parameter, and the optimizer's state of it.

    Attributes:
      shape: the leaf's shape.
      param: the parameter's spec.
      state: its state's.
      split: the layout of an axis that is split into heads; None without one.
    """

    shape: tuple[int, ...]
    param: Spec
    state: Spec
    split: SplitLayout | None = None

    def param_spec(self, mesh: AnyMesh) -> PartitionSpec:
        """The parameter's spec, as JAX writes it."""
        return partition_spec(self.param, mesh)

    def state_spec(self, mesh: AnyMesh) -> PartitionSpec:
        """Its state's spec, as JAX writes it."""
        return partition_spec(self.state, mesh)

    @property
    def of_views(self) -> "Layout":
        """Where the leaf lies as its views see it."""
        if self.split is None:
            return self
        return Layout(self.split.shape, self.split.param, self.split.state)


def zero1_layout(
    shape: tuple[int, ...],
    param: Spec,
    zero1_axes: Sequence[str],
    sizes: Sizes,
    views: LeafViews | None = None,
) -> Layout:
    """Choose the state's layout: the parameter's, further sharded over the axes it leaves free.

    Args:
      shape: the leaf's shape.
      param: the parameter's own spec.
      zero1_axes: the mesh axes that may be used; those that `param` uses already are left alone.
      sizes: the mesh.
      views: the leaf's matrices; None for AdamW.
    """
    free = [a for a in zero1_axes if a not in spec_axes(param) and sizes[a] > 1]
    if 0 in shape:
        free = []
    free.sort(key=lambda axis: -sizes[axis])  # the longest is the first stage of a reduction
    state = list(param)
    local = list(local_shape(shape, param, sizes))
    if views is not None and views.split is not None:
        local[views.split] = whole_parts(param, views, sizes)
    order = _dimension_order(shape, views)

    def shard(axes: Sequence[str]) -> bool:
        count = math.prod(sizes[axis] for axis in axes)
        fitting = [dim for dim in order if local[dim] % count == 0 and local[dim] > 0]
        if not fitting:
            return False
        dim = _least_waste(fitting, local, count, views)
        state[dim] += tuple(axes)
        local[dim] //= count
        return True

    if free and not shard(free):
        for axis in free:
            shard([axis])
    split = None
    if views is not None and views.split is not None:
        split = split_layout(param, tuple(state), views, sizes)
    return Layout(shape, param, tuple(state), split)


def tile_waste(layout: Layout, views: LeafViews, sizes: Sizes) -> float:
    """What a TPU sends to reduce-scatter a leaf's gradient, to what its elements need: 1 to 2."""
    sides = _sides(views)
    cut = [dim for dim in sides if len(layout.state[dim]) > len(layout.param[dim])]
    if len(cut) != 1 or 0 in layout.shape:
        return 1.0
    local = local_shape(layout.shape, layout.state, sizes)
    (dim,) = cut
    count = math.prod(sizes[axis] for axis in layout.state[dim][len(layout.param[dim]) :])
    return _waste(dim, sides, [*local[:dim], local[dim] * count, *local[dim + 1 :]], count)


def _least_waste(
    fitting: Sequence[int], local: Sequence[int], count: int, views: LeafViews | None
) -> int:
    """The dimension to cut by `count`: the first, or the other side if that suits a TPU better.

    It is decided by the lengths of the sides alone, so that tall and wide matrices agree.
    """
    sides = _sides(views)
    if fitting[0] not in sides:
        return fitting[0]
    both = [dim for dim in fitting if dim in sides]
    return min(both, key=lambda dim: _waste(dim, sides, local, count))


def _sides(views: LeafViews | None) -> tuple[int, ...]:
    """The two dimensions of a leaf that are its matrices' sides; none where a side has more."""
    if views is None or views.split is not None:
        return ()
    view = views[0]
    return (*view.reduction, *view.output) if len(view.reduction) == len(view.output) == 1 else ()


def _waste(dim: int, sides: tuple[int, ...], local: Sequence[int], count: int) -> float:
    """What cutting dimension `dim` of a shard by `count` wastes."""
    across = local[sum(sides) - dim]
    # In a loop over a stack `tiles.laid_out` has no say: there the longer side may lie along lanes.
    only_lanes = len(local) > 2 and local[dim] > across
    return scatter_waste(local[dim] // count, across, only_lanes=only_lanes)


def _dimension_order(shape: tuple[int, ...], views: LeafViews | None) -> list[int]:
    """Dimensions in the order in which they are tried."""
    if views is None:
        return [*reversed(range(len(shape)))]  # stacks come first in a shape
    view = views[0]
    sides = (view.reduction, view.output)
    # Along the longer side all matrices of one shape are cut alike once they are turned wide.
    if not is_tall([math.prod(view.shape[d] for d in dims) for dims in sides]):
        sides = sides[::-1]
    # Blocks that lie side by side cannot be cut out of shards of their common axis.
    fused = {view.block.axis for view in views if view.block is not None}
    order = [d for d in (*sides[0], *sides[1], *view.batch_axes) if d not in fused]
    if views.split is None:
        return order
    # Whole heads first: the axis that holds them is none that a loop over layers slices, and each
    # device then orthogonalizes what it has.
    return [views.split, *views.own_axes(order)]


class Cut(NamedTuple):
    """How the pieces of a wide matrix lie over mesh axes: each side as `(axes, local length)` runs.

    A side is one run, such as ``[(("data",), 96)]``, unless it is made of several dimensions of the
    leaf of which an inner one is sharded, as heads x head_dim may be.
    """

    rows: tuple[tuple[tuple[str, ...], int], ...]
    cols: tuple[tuple[tuple[str, ...], int], ...]

    @property
    def local(self) -> tuple[int, int]:
        """The rows and columns of one piece."""
        return tuple(math.prod(length for _, length in side) for side in self)  # type: ignore

    def only(self, axes: Sequence[str]) -> "Cut":
        """The same pieces, as parts of what all other axes leave of the matrix."""
        rows, cols = (
            tuple((tuple(a for a in named if a in axes), length) for named, length in side)
            for side in self
        )
        return Cut(rows, cols)

    def join(
        self, pieces: Inexact[Array, "_ batch *piece"], axes: Sequence[str], sizes: Sizes
    ) -> Inexact[Array, "batch _ _"]:
        """Put the pieces of all coordinates along `axes` (row-major) together, flat or not."""
        count = pieces.shape[1]
        lengths = [length for side in self for _, length in side]
        x = pieces.reshape(*(sizes[axis] for axis in axes), count, *lengths)
        x = x.transpose(self._order(axes))
        rows, cols = self._whole(sizes)
        return x.reshape(count, rows, cols)

    def split(
        self, matrices: Inexact[Array, "batch _ _"], axes: Sequence[str], sizes: Sizes
    ) -> Inexact[Array, "_ batch _ _"]:
        """The inverse of `join`: the pieces of all coordinates along `axes`."""
        count = len(matrices)
        runs = [run for side in self for run in side]
        split = [n for named, length in runs for n in (*(sizes[a] for a in named), length)]
        order = self._order(axes)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        x = matrices.reshape(count, *split).transpose(inverse)
        return x.reshape(math.prod(sizes[axis] for axis in axes), count, *self.local)

    def _whole(self, sizes: Sizes) -> tuple[int, int]:
        rows, cols = (
            math.prod(length * math.prod(sizes[a] for a in named) for named, length in side)
            for side in self
        )
        return rows, cols

    def _order(self, axes: Sequence[str]) -> list[int]:
        order, run = [len(axes)], len(axes) + 1
        for side in self:
            for named, _ in side:
                order += [*(axes.index(axis) for axis in named), run]
                run += 1
        return order


def cut_of(view: MatrixView, spec: Spec, sizes: Sizes) -> Cut:
    """How a view's matrices, turned wide, are cut where their leaf lies as `spec` says."""
    local = local_shape(view.block_shape, spec, sizes)
    sides = []
    for dims in (view.reduction, view.output):
        runs: list[tuple[tuple[str, ...], int]] = []
        for dim in dims:
            axes = tuple(axis for axis in spec[dim] if sizes[axis] > 1)
            if runs and not axes:
                runs[-1] = (runs[-1][0], runs[-1][1] * local[dim])
            else:
                runs.append((axes, local[dim]))
        sides.append(tuple(runs))
    return Cut(*(sides[::-1] if view.is_tall else sides))


def local_view(view: MatrixView, spec: Spec, sizes: Sizes) -> MatrixView:
    """The same matrices, as far as one device's shard holds them."""
    return view.of_shape(local_shape(view.shape, spec, sizes))
