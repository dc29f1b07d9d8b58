"""Who orthogonalizes what: the words of a plan.

The matrices of one shape, over all leaves, form a *group*. Seen from one matrix, the axes of the
mesh play one of these parts:

    stack    shard the stack that it lies in: other coordinates hold other matrices
    pieces   cut it: each coordinate holds a piece of its momentum
    copies   neither: each coordinate holds the same piece

`pieces` and `copies` are its *team*, the devices among which the work on the group is divided. Of
the pieces, those along axes that cut the parameter too are *kept*: the update returns to them cut.

Four routes:

    owned       a team of one: every device has whole matrices, and nothing is exchanged
    exchange    as many matrices as devices, or more: each goes whole to one owner
    split       fewer: `ways` devices share a matrix, each computing a part of its rows
    replicated  all devices orthogonalize all matrices; for those too small to matter

`_planner` makes the plan, `_distributed` runs it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from muon_jax._cost import Traffic
from muon_jax._layout import Cut, Layout
from muon_jax._matrices import LeafViews

RouteName = Literal["owned", "exchange", "split", "replicated"]


class PlannedLeaf(NamedTuple):
    """What the planner knows of a leaf.

    Attributes:
      views: its matrices.
      layout: where it lies.
      dtype: in which its momentum travels and is multiplied.
      momentum: the dtype in which its momentum is kept.
    """

    views: LeafViews
    layout: Layout
    dtype: jnp.dtype
    momentum: jnp.dtype


class Member(NamedTuple):
    """One view of one leaf in a group.

    Attributes:
      leaf: index of the leaf.
      view: index of the view in the leaf.
      matrices: in one device's shard of the state.
      source: how their momentum is cut over `Shape.pieces`.
      target: how the parameter is cut over `Shape.kept`.
    """

    leaf: int
    view: int
    matrices: int
    source: Cut
    target: Cut


class Shape(NamedTuple):
    """What the matrices of a group have in common.

    Attributes:
      rows: of the wide matrix.
      cols: of the wide matrix, at least `rows`.
      dtype: in which they are exchanged.
      team: the mesh axes over which the work is divided, in the mesh's order.
      pieces: those of them that cut the momentum's matrices.
      kept: those of them that cut the parameter's matrices.
      stack: the axes that shard the stacks of the state: other coordinates hold other matrices.
      stacked: those of them that do not shard the parameter's.
    """

    rows: int
    cols: int
    dtype: jnp.dtype
    team: tuple[str, ...]
    pieces: tuple[str, ...]
    kept: tuple[str, ...]
    stack: tuple[str, ...]
    stacked: tuple[str, ...]

    @property
    def gathered(self) -> tuple[str, ...]:
        """The axes over which the update is gathered: the parameter is replicated there."""
        return (*self.stacked, *(axis for axis in self.team if axis not in self.kept))

    @property
    def bytes(self) -> int:
        """Of one matrix."""
        return self.rows * self.cols * self.dtype.itemsize


class Part(NamedTuple):
    """A run of a group's matrices that take the same route together.

    Attributes:
      route: see the module.
      start: the first of them, in the group's stack.
      stop: the end of them.
      slots: matrices that one device holds at a time.
      owners: `[team, slots]`, the matrix (counted from `start`) in each slot, or -1; None for the
        routes on which every device holds all.
      ways: devices that share a matrix.
      axis: the mesh axis along which neighbours share it.
      through_state: whether the update returns to the momentum's pieces before it is gathered. It
        costs a second exchange, and saves gathering the empty slots.
    """

    route: RouteName
    start: int
    stop: int
    slots: int
    owners: np.ndarray | None = None
    ways: int = 1
    axis: str | None = None
    through_state: bool = False

    @property
    def matrices(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def is_full(self) -> bool:
        """Whether every slot of every device holds a matrix."""
        return self.padding == 0

    @property
    def padding(self) -> int:
        """Empty slots in the whole team, those of sharers counted once."""
        return 0 if self.owners is None else int((self.owners < 0).sum()) // self.ways


def runs_of_equal_parts(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    """Neighbours that differ in nothing but which matrices they hold: one program for each run."""

    def program(part: Part) -> tuple[object, ...]:
        owners = None if part.owners is None else part.owners.tobytes()
        return (*part._replace(start=0, stop=part.matrices, owners=None), owners)

    return (tuple(run) for _, run in itertools.groupby(parts, program))


class Group(NamedTuple):
    """All matrices of one shape that are cut over the same mesh axes.

    Attributes:
      shape: what they have in common.
      members: where they come from.
      parts: runs of them, one after the other.
      traffic: what one device sends for each part; behind these, what it sends for each leaf whose
        heads are cut over devices.
      flops: of Newton-Schulz on each device, an array shaped like the mesh.
      flops_of_one: of one matrix.
    """

    shape: Shape
    members: tuple[Member, ...]
    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    flops: np.ndarray
    flops_of_one: int


class Plan(NamedTuple):
    """The groups, and the FLOPs of Newton-Schulz on each device (an array shaped like the mesh)."""

    groups: tuple[Group, ...]
    flops: np.ndarray


def returns_rows(shape: Shape, part: Part, *, whole_result: bool) -> bool:
    """Whether the sharers of a matrix return the rows that they computed, and no whole matrix."""
    return part.ways > 1 and not (shape.kept or part.through_state or whole_result)
