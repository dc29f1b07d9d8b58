"""A readable report of the ZeRO-1 plan: who orthogonalizes what, and what it costs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from muon_jax._common.alike import groups_of_alike, one_name
from muon_jax._common.paths import show
from muon_jax._common.tables import in_units, table
from muon_jax._common.trees import PyTree
from muon_jax._leaves import Leaf
from muon_jax._mesh.layout import tile_waste
from muon_jax._mesh.plan import Group, Part, PlannedLeaf, Split
from muon_jax._mesh.specs import Sizes, local_shape, spec_axes
from muon_jax._mesh.zero1 import Zero1
from muon_jax._muon import muon, optimizer_of


@dataclasses.dataclass(frozen=True)
class ShardingRow:
    """One shape group: matrices of one shape that are cut over the same mesh axes.

    Attributes:
      shape: `(rows, cols)` of each matrix, turned wide.
      matrices: the number of such matrices in the whole model.
      route: the route that the matrices take; the routes of several parts are joined by "+".
      owners: the number of devices that orthogonalize some of the matrices.
      padding: the number of empty slots, which travel as zeros and are not computed.
      bytes_in: bytes that one device sends so that the owners have their matrices, and bytes that
        it sends to the devices with which it shares a matrix.
      bytes_out: bytes that one device sends so that all have the update.
      flops: FLOPs of Newton-Schulz on the busiest device.
      balance: the busiest device's FLOPs, divided by an even share of the group's FLOPs.
      state_bytes: bytes of the momentum on one device.
      tile_waste: what a TPU sends to reduce-scatter a gradient, divided by what its elements need.
        Above 1 no side of the matrix, cut over the mesh, suits the tiles in which a TPU keeps it.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> (row,) = sharding_report({"kernel": jnp.ones((96, 64))}, mesh=mesh).rows
      >>> row.shape, row.matrices, row.route
      ((64, 96), 1, 'local')
    """

    shape: tuple[int, int]
    matrices: int
    route: str
    owners: int
    padding: int
    bytes_in: int
    bytes_out: int
    flops: int
    balance: float
    state_bytes: int
    tile_waste: float


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """Where one parameter's state lies.

    Attributes:
      path: the parameter's path.
      optimizer: ``"muon"`` or ``"adam"``.
      param: the parameter's own PartitionSpec.
      state: the PartitionSpec of the parameter's state.
      state_bytes: bytes of the state on one device.
      replicas: the number of devices that hold the same piece of the state.
      indivisible: whether a mesh axis is left that would divide the state further, if the
        parameter's shape allowed.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> (leaf,) = sharding_report({"kernel": jnp.ones((96, 64))}, mesh=mesh).leaves
      >>> leaf.path, leaf.optimizer, leaf.state_bytes
      ('kernel', 'muon', 24576)
    """

    path: str
    optimizer: str
    param: PartitionSpec
    state: PartitionSpec
    state_bytes: int
    replicas: int
    indivisible: bool


@dataclasses.dataclass(frozen=True, repr=False)
class ShardingReport:
    """The rows of `sharding_report`; printed, or shown by a notebook, they are a table.

    Attributes:
      rows: one row for each shape group.
      leaves: one row for each parameter, in the order of ``jax.tree.leaves(params)``.
      devices: the number of devices in the mesh.
      flops: FLOPs of Newton-Schulz on the busiest device, all groups together; of symmetric
        products, too, of which CPUs mirror a part.
      balance: the busiest device's FLOPs, divided by an even share of all FLOPs.
      adam_gather_bytes: bytes that one device sends to gather AdamW's updates.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> report = sharding_report({"kernel": jnp.ones((96, 64))}, mesh=mesh)
      >>> report.devices, report.state_bytes("muon")
      (1, 24576)
    """

    rows: tuple[ShardingRow, ...]
    leaves: tuple[LeafRow, ...]
    devices: int
    flops: int
    balance: float
    adam_gather_bytes: int

    def state_bytes(self, optimizer: str) -> int:
        """Bytes of the state of ``"muon"`` or ``"adam"`` on one device."""
        return sum(leaf.state_bytes for leaf in self.leaves if leaf.optimizer == optimizer)

    def __str__(self) -> str:
        header = ("matrix", "matrices", "route", "owners", "padding")
        header += ("in", "out", "FLOPs", "balance", "state")
        cells = [
            (
                "x".join(map(str, row.shape)),
                f"{row.matrices:,}",
                row.route,
                str(row.owners),
                str(row.padding),
                _bytes(row.bytes_in),
                _bytes(row.bytes_out),
                in_units(row.flops, "FLOP"),
                f"{row.balance:.2f}x",
                _bytes(row.state_bytes),
            )
            for row in self.rows
        ]
        muon_state, adam_state = (_bytes(self.state_bytes(name)) for name in ("muon", "adam"))
        lines = [
            f"per device and step, on {self.devices} devices:",
            *table(header, cells),
            f"muon: {in_units(self.flops, 'FLOP')} on the busiest device, {self.balance:.2f}x an "
            f"even share; state {muon_state}",
            f"adam: gathers {_bytes(self.adam_gather_bytes)}; state {adam_state}",
        ]
        lines += [
            f"  {row.shape[0]}x{row.shape[1]}: cut over the mesh, no side suits a TPU's tiles; to "
            f"reduce-scatter its gradients sends {row.tile_waste:.2f}x their bytes there"
            for row in self.rows
            if row.tile_waste > 1
        ]
        lines += [
            f"  {one_name(paths)}: its state, {_bytes(size)}, cannot be divided further than "
            f"{state}; {replicas} devices hold the same"
            for paths, (size, state, replicas) in groups_of_alike(
                (leaf.path, (leaf.state_bytes, leaf.state, leaf.replicas))
                for leaf in self.leaves
                if leaf.indivisible
            )
        ]
        return "\n".join(lines)

    __repr__ = __str__


def _bytes(count: int) -> str:
    return in_units(count, "B")


def sharding_report(params: PyTree, *, mesh: Any, **keywords: Any) -> ShardingReport:
    """How `muon` divides its work and its state over a mesh.

    No step is run or traced: the report is made by the functions of shapes that the optimizer
    itself calls, so what it says is what the program does.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      mesh: the mesh, as given to `muon`.
      **keywords: any other keywords as given to `muon`: `param_specs`, `zero1_axes`, `ns_steps`,
        `max_group_bytes` and so on.

    Returns:
      A `ShardingReport`; print it.

    Raises:
      ValueError, TypeError: where `muon` would, for the same arguments.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> sharding_report({"kernel": jnp.ones((64, 64))}, mesh=mesh)
      per device and step, on 1 devices:
      matrix  matrices  route  owners  padding  in   out  FLOPs       balance  state
      --------------------------------------------------------------------------------
      64x64   1         local  1       0        0 B  0 B  7.86 MFLOP  1.00x    16.4 kB
      muon: 7.86 MFLOP on the busiest device, 1.00x an even share; state 16.4 kB
      adam: gathers 0 B; state 0 B
    """
    if mesh is None:
        raise ValueError("sharding_report needs mesh=, the mesh that muon is given.")
    optimizer = optimizer_of(muon(**{"learning_rate": 1e-3, **keywords}, mesh=mesh))
    decided, step, adam = optimizer.decide_first(params), optimizer.muon, optimizer.adam
    zero1, rows, like = step.zero1, [], {"muon": [], "adam": []}
    assert zero1 is not None
    for param, leaf in zip(jax.tree.leaves(params), decided.leaves, strict=True):
        name, dtype = leaf.route.optimizer, jnp.result_type(param)
        like[name].append(jax.ShapeDtypeStruct(jnp.shape(param), dtype))
        kept = (step if name == "muon" else adam).moments(dtype)
        rows.append(_leaf_row(zero1, leaf, sum(moment.itemsize for moment in kept)))
    momenta = [x.update(dtype=step.moments(x.dtype)[0]) for x in like["muon"]]
    plan, planned = step.plan(decided.leaves_of("muon"), like["muon"], momenta)
    devices, flops = math.prod(zero1.sizes.values()), int(plan.flops.max())
    share = sum(_matrices(group, planned) * group.flops_of_one for group in plan.groups)
    return ShardingReport(
        tuple(_row(group, planned, zero1.sizes) for group in plan.groups),
        tuple(rows),
        devices,
        flops,
        flops * devices / share if share else 1.0,
        adam.gather_bytes(like["adam"], decided.leaves_of("adam")),
    )


def _leaf_row(zero1: Zero1, leaf: Leaf, itemsize: int) -> LeafRow:
    sizes, layout = zero1.sizes, leaf.lies
    unused = [a for a in sizes if sizes[a] > 1 and a not in spec_axes(layout.state)]
    return LeafRow(
        show(leaf.route.path),
        leaf.route.optimizer,
        layout.param_spec(zero1.mesh),
        layout.state_spec(zero1.mesh),
        math.prod(local_shape(layout.shape, layout.state, sizes)) * itemsize,
        math.prod(sizes[axis] for axis in unused),
        any(axis in zero1.axes for axis in unused),
    )


def _row(group: Group, leaves: Sequence[PlannedLeaf], sizes: Sizes) -> ShardingRow:
    key, matrices, traffic = group.key, _matrices(group, leaves), group.sent
    state = sum(
        member.matrices * math.prod(member.state_cut.local) * leaves[member.leaf].momentum.itemsize
        for member in group.members
    )
    teams = matrices // sum(member.matrices for member in group.members)
    busiest, devices = int(group.flops.max()), math.prod(sizes.values())
    members = [leaves[member.leaf] for member in group.members]
    return ShardingRow(
        (key.rows, key.cols),
        matrices,
        " + ".join(_describe(group.parts, teams)),
        int((group.flops > 0).sum()),
        sum(part.padding for part in group.parts) * teams,
        int(traffic.exchange + traffic.split),
        int(traffic.returned + traffic.gather),
        busiest,
        busiest * devices / (matrices * group.flops_of_one),
        state,
        max(tile_waste(leaf.layout, leaf.views, sizes) for leaf in members),
    )


def _describe(parts: Sequence[Part], teams: int) -> list[str]:
    counts: dict[str, int] = {}
    for part in parts:
        name = part.route
        if isinstance(part, Split):
            name += f" by {part.ways} on {part.axis}"
        counts[name] = counts.get(name, 0) + part.matrices * teams
    return [f"{count} {name}" if len(counts) > 1 else name for name, count in counts.items()]


def _matrices(group: Group, leaves: Sequence[PlannedLeaf]) -> int:
    return sum(leaves[m.leaf].views[m.view].matrices[0] for m in group.members)
