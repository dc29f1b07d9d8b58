"""Collect the matrices of all leaves into groups: one shape, the same axes of the mesh.

Newton-Schulz commutes with transposition, so all matrices are counted as wide: those of
``[768, 3072]`` and of ``[3072, 768]`` are one group, if both are cut along their longer side.
"""

from collections import defaultdict
from collections.abc import Sequence

from muon_jax._matrices import MatrixView
from muon_jax._mesh.layout import Layout, cut_of, local_view
from muon_jax._mesh.plan import GroupKey, Member, PlannedLeaf
from muon_jax._mesh.specs import Sizes, Spec


def group_matrices(
    leaves: Sequence[PlannedLeaf], sizes: Sizes, zero1_axes: Sequence[str]
) -> dict[GroupKey, list[Member]]:
    """The members of each group, in the order of the leaves; views without matrices are in none."""
    groups = defaultdict(list)
    for index, leaf in enumerate(leaves):
        for number, view in enumerate(leaf.views):
            rows, cols = sorted(view.matrices[1:])
            if not all(view.matrices):
                continue
            layout = leaf.layout.of_views
            axes = _axes(view, layout, sizes, zero1_axes)
            groups[GroupKey(rows, cols, leaf.dtype, *axes)].append(
                Member(
                    index,
                    number,
                    local_view(view, layout.state, sizes).matrices[0],
                    cut_of(view, layout.state, sizes),
                    cut_of(view, layout.param, sizes),
                )
            )
    return groups


def _axes(
    view: MatrixView, layout: Layout, sizes: Sizes, zero1_axes: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """What each axis of the mesh does to a view's matrices: the axes of a `GroupKey`."""

    def on(spec: Spec, dims: Sequence[int]) -> tuple[str, ...]:
        named = {axis for dim in dims for axis in spec[dim]}
        return tuple(axis for axis in sizes if axis in named and sizes[axis] > 1)

    matrix_dims = (*view.reduction, *view.output)
    cut, kept = on(layout.state, matrix_dims), on(layout.param, matrix_dims)
    stack = on(layout.state, view.batch_axes)
    param_stack = on(layout.param, view.batch_axes)
    # Axes outside of `zero1_axes` that do not cut the matrix repeat the work: they are no copy axes
    # of the team.
    copies = [axis for axis in zero1_axes if axis not in stack and sizes[axis] > 1]
    team = tuple(axis for axis in sizes if axis in cut or axis in copies)
    return team, cut, kept, stack, tuple(axis for axis in stack if axis not in param_stack)
