"""Who orthogonalizes what: the words of a plan.

The matrices of one shape, over all leaves, form a *group*. Seen from one matrix, an axis of the
mesh does one of these things:

    stack axes   shard the stack that the matrix lies in: other coordinates hold other matrices
    cut axes     cut the matrix: each coordinate holds a *piece* of its momentum
    copy axes    neither: each coordinate holds the same piece

Cut and copy axes span the *team*, the devices that divide the work on the matrix among them. Where
the parameter is cut too, along its *kept axes*, the update returns to it in pieces.

What enters Newton-Schulz is the *direction*, ``mu M + G``; what leaves it is the *result*; a *rule*
(`_update_rule`) makes the *update* of it. A group's matrices lie in *parts*, runs of them that
take one *route*:

    local       the team is one device, which has whole matrices: no direction travels
    exchange    as many matrices as devices, or more: each goes whole to one *owner*
    split       fewer: a matrix goes to several owners, its *sharers*, who divide its rows
    replicated  every device gets and orthogonalizes all: for matrices too small to matter

An owner has *slots*, each for one matrix. A slot that stays empty travels as zeros, and is not
computed. `planner` makes the plan, `distributed` runs it.

**An example.** Three matrices of 64x128 on four devices, ``{"data": 4}``; the parameters are
replicated, and bfloat16 travels. ZeRO-1 cuts the momenta along their columns: of each of the three,
device d holds the piece of columns 32 d to 32 d + 31. So "data" is a cut axis and no kept one, and
the team is all four devices. By `exchange` matrix i goes to device i, and device 3 gets none:

    owners = [[0], [1], [2], [-1]]        a row for each device, a column for each slot

    phase  collective  one device sends                                          bytes
    3      all_to_all  a 64x32 piece to each of three others                    12,288
    4      -           12,058,624 FLOPs on each of the devices 0, 1 and 2
    6      all_gather  its 64x128 result to each of three others                49,152

The phases are those of `distributed`. The empty slot costs a quarter of the last line. Where that
is much, the part goes *through the state*: phase 5 first returns each device its own pieces of the
three results, 12,288 bytes, and phase 6 gathers those, 36,864 bytes, without the empty slot. Here
that adds up to the same bytes, and to one collective more.

By `split`, between all four devices:

    owners = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]

    phase  collective  one device sends                                          bytes
    3      all_to_all  three 64x32 pieces to each of three others               36,864
    4      all_gather  seven times its 16 rows of three 64x64 matrices,        129,024
                       twice its 16 rows of three iterates, 64x128              73,728
           -           9,043,968 FLOPs on every device
    6      all_gather  its 16 rows of three results to each of three others     36,864

The five steps are taken as 2 + 2 + 1 (`_products`): two at once gather a Gram matrix, a polynomial
of it and the next step's Gram matrix, one alone gathers its Gram matrix. The last iterates are the
results of phase 6. Between pairs of neighbours the table of owners
would be [[0, 1], [0, 1], [2, -1], [2, -1]]. Matrices so small take neither route: to start two
collectives, or eleven, takes longer than to send 36,864 bytes once, in phase 3 of `replicated`, and
compute all three on every device.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from muon_jax._matrices import LeafViews
from muon_jax._mesh.cost import Traffic
from muon_jax._mesh.layout import Cut, Layout
from muon_jax._mesh.specs import Sizes

RouteName = Literal["local", "exchange", "split", "replicated"]


class PlannedLeaf(NamedTuple):
    """What the planner knows of a leaf.

    Attributes:
      views: the matrices of the leaf.
      layout: where the leaf lies.
      dtype: the dtype in which its directions travel and are multiplied.
      momentum: the dtype in which its momentum is kept.
    """

    views: LeafViews
    layout: Layout
    dtype: jnp.dtype
    momentum: jnp.dtype


class Member(NamedTuple):
    """One view of one leaf in a group.

    Attributes:
      leaf: the index of the leaf.
      view: the index of the view in the leaf.
      matrices: the number of its matrices in one device's shard of the state.
      state_cut: how their momentum is cut over `GroupKey.cut_axes`.
      param_cut: how the parameter is cut over `GroupKey.kept_axes`.
    """

    leaf: int
    view: int
    matrices: int
    state_cut: Cut
    param_cut: Cut


class GroupKey(NamedTuple):
    """What the matrices of a group have in common. All axes are in the mesh's order.

    Attributes:
      rows: the rows of the wide matrix.
      cols: the columns of the wide matrix, at least `rows`.
      dtype: the dtype in which directions and results travel.
      team: the mesh axes over which the work is divided.
      cut_axes: the axes of the team that cut the momentum's matrices.
      kept_axes: the axes of the team that cut the parameter's matrices.
      stack_axes: the mesh axes that shard the stacks of the state.
      gathered_stack_axes: the stack axes along which the parameter is replicated, so that its
        update is gathered.
    """

    rows: int
    cols: int
    dtype: jnp.dtype
    team: tuple[str, ...]
    cut_axes: tuple[str, ...]
    kept_axes: tuple[str, ...]
    stack_axes: tuple[str, ...]
    gathered_stack_axes: tuple[str, ...]

    @property
    def gathered_axes(self) -> tuple[str, ...]:
        """All axes over which the result is gathered: the parameter is replicated there."""
        return (
            *self.gathered_stack_axes,
            *(axis for axis in self.team if axis not in self.kept_axes),
        )

    @property
    def bytes(self) -> int:
        """The bytes of one matrix."""
        return self.rows * self.cols * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MatrixRun:
    """Matrices that follow each other in a group: what the parts of all routes have.

    Attributes:
      start: the number of the first matrix, in the group's stack.
      stop: the number behind the last.
    """

    start: int
    stop: int

    @property
    def matrices(self) -> int:
        """The number of matrices."""
        return self.stop - self.start

    @property
    def padding(self) -> int:
        """The number of empty slots in the whole team."""
        return 0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Everywhere(MatrixRun):
    """Every device of the team orthogonalizes all matrices of the part.

    Attributes:
      route: ``"local"`` for a team of one device, else ``"replicated"``.
    """

    route: Literal["local", "replicated"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Exchange(MatrixRun):
    """Each matrix goes whole to one owner.

    Attributes:
      owners: an array `[team, slots]` of the matrix, counted from `start`, in each slot, or -1.
      through_state: whether the result returns to the momentum's pieces before it is gathered. It
        costs a second exchange, and saves gathering the empty slots.
    """

    route: ClassVar[RouteName] = "exchange"
    owners: np.ndarray
    through_state: bool = False

    @property
    def slots(self) -> int:
        """The number of matrices that one device holds at a time."""
        return self.owners.shape[1]

    @property
    def padding(self) -> int:
        """The number of empty slots in the whole team."""
        return int((self.owners < 0).sum())


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Split(Exchange):
    """Each matrix goes to several owners, neighbours on a mesh axis, who divide its rows.

    Attributes:
      ways: the number of devices that share a matrix.
      axis: the mesh axis along which they are neighbours.
      returns_rows: whether each returns the rows that it computed, and no whole result.
    """

    route: ClassVar[RouteName] = "split"
    ways: int
    axis: str
    returns_rows: bool

    @property
    def padding(self) -> int:
        """The number of empty slots, those of sharers counted once."""
        return super().padding // self.ways


Part = Everywhere | Exchange | Split
"""A run of a group's matrices that take the same route together."""


def runs_of_equal_parts(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    """Neighbours that differ in nothing but which matrices they hold: one program for each run."""

    def program(part: Part) -> tuple[object, ...]:
        fields = {**vars(part), "start": 0, "stop": part.matrices}
        if isinstance(part, Exchange):
            fields["owners"] = part.owners.tobytes()
        return (type(part), *fields.items())

    return (tuple(run) for _, run in itertools.groupby(parts, program))


class Group(NamedTuple):
    """All matrices of one shape that lie over the same mesh axes.

    Attributes:
      key: what they have in common.
      members: the members that the matrices come from.
      parts: runs of them, one after the other.
      traffic: what one device sends for each part.
      heads: what one device sends before, so that heads which are cut over devices are whole.
      flops: FLOPs of Newton-Schulz on each device, an array shaped like the mesh.
      flops_of_one: FLOPs of Newton-Schulz on one matrix.
    """

    key: GroupKey
    members: tuple[Member, ...]
    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    heads: Traffic
    flops: np.ndarray
    flops_of_one: int

    @property
    def sent(self) -> Traffic:
        """All that one device sends."""
        return sum(self.traffic, self.heads)

    @property
    def state_piece(self) -> tuple[int, ...]:
        """The rows and columns of a momentum's piece; if members differ, (-1,): a flat piece."""
        return _common_shape([member.state_cut for member in self.members])

    @property
    def param_piece(self) -> tuple[int, ...]:
        """The same of the parameter's pieces."""
        return _common_shape([member.param_cut for member in self.members])


class Plan(NamedTuple):
    """The groups, and the FLOPs of Newton-Schulz on each device (an array shaped like the mesh)."""

    groups: tuple[Group, ...]
    flops: np.ndarray


def length(axes: Sequence[str], sizes: Sizes) -> int:
    """The number of coordinates along several axes."""
    return math.prod(sizes[axis] for axis in axes)


def _common_shape(cuts: Sequence[Cut]) -> tuple[int, ...]:
    shapes = {cut.local for cut in cuts}
    return shapes.pop() if len(shapes) == 1 else (-1,)
