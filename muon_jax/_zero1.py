"""ZeRO-1 on a mesh: where the state lies, how it is made there, how updates leave it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact, PyTree

from muon_jax._collectives import all_gather
from muon_jax._cost import MeshCosts, others
from muon_jax._injectable import unheld
from muon_jax._layout import Layout, Sizes, zero1_layout
from muon_jax._matrices import LeafViews
from muon_jax._paths import is_absent, show
from muon_jax._record import note_adam_gather, note_layouts, note_mesh
from muon_jax._routes import Route
from muon_jax._specs import (
    AnyMesh,
    Spec,
    check_mesh,
    check_zero1_axes,
    is_explicit,
    local_shape,
    param_layouts,
    partition_spec,
    place,
    spec_axes,
)

FUSED_GATHER_BYTES = 2**20
"""Shards up to this size share one collective; copying larger ones together would cost more."""


class Zero1(NamedTuple):
    """The mesh, the axes to shard the state over, where the parameters lie, what sending costs."""

    mesh: AnyMesh
    axes: tuple[str, ...]
    param_specs: Any
    costs: MeshCosts

    @property
    def sizes(self) -> Sizes:
        """The length of each mesh axis, in the mesh's order."""
        return dict(self.mesh.shape)

    def layouts(self, params: PyTree, routes: Sequence[Route]) -> list[Layout]:
        """The layout of each leaf of `params`, which `routes` were made for."""
        check_outside_shard_map()
        layouts = []
        specs = param_layouts(params, self.param_specs, self.mesh)
        for route, spec in zip(routes, specs, strict=True):
            _check_blocks(route, spec, self.mesh)
            layouts.append(zero1_layout(route.shape, spec, self.axes, self.sizes, route.views))
        note_mesh(self.mesh, self.axes, self.param_specs)
        note_layouts([route.path for route in routes], layouts)
        return layouts

    def layouts_in_update(
        self,
        structure: Any,
        params: PyTree | None,
        gradients: Sequence[Any],
        moments: Sequence[jax.Array],
        routes: Sequence[Route],
    ) -> list[Layout]:
        """The layouts that `init` chose, from what `update` sees.

        The parameters show where they lie if they are given, else, on Explicit axes, the gradients
        do. The state's own layout says nothing of it.
        """
        shown = structure.flatten_up_to(params) if params is not None else gradients
        if self.param_specs is not None or (params is None and not is_explicit(self.mesh)):
            shown = [None] * len(routes)
        like = [
            jax.ShapeDtypeStruct(moment.shape, moment.dtype) if is_absent(leaf) else leaf
            for leaf, moment in zip(shown, moments, strict=True)
        ]
        layouts = self.layouts(structure.unflatten(like), routes)
        if params is None and self.param_specs is None and is_explicit(self.mesh):
            self._check_moments(moments, layouts, routes)
        return layouts

    def _check_moments(
        self, moments: Sequence[jax.Array], layouts: Sequence[Layout], routes: Sequence[Route]
    ) -> None:
        for moment, layout, route in zip(moments, layouts, routes, strict=True):
            seen = jax.typeof(moment).sharding
            state = partition_spec(layout.state, self.mesh)
            if not seen.mesh.empty and seen.spec != state:
                raise ValueError(
                    f"{show(route.path)}, shape {route.shape}: its momentum lies as {seen.spec}, "
                    f"but its gradient is sharded as if it were {state}: the parameter lies "
                    "otherwise than the gradient. Pass params to update, or param_specs=."
                )

    def arrive(self, gradients: Sequence[Any], layouts: Sequence[Layout]) -> list[Any]:
        """Lay gradients out as the state is, over several axes in two stages.

        A sum over data parallelism that is still to be done then ends as a reduce-scatter over the
        longest axis first. In one stage, over many TPU chips, XLA makes it an all-reduce.
        """
        arrived = []
        for gradient, layout in zip(gradients, layouts, strict=True):
            free = spec_axes(layout.state) - spec_axes(layout.param)
            if len(free) > 1:
                longest = max(self.sizes, key=lambda a: self.sizes[a] if a in free else 0)
                later = free - {longest}
                first = tuple(tuple(a for a in named if a not in later) for named in layout.state)
                gradient = place(gradient, self.mesh, partition_spec(first, self.mesh))
            arrived.append(gradient)
        return arrived

    def zeros(self, like: Sequence[tuple[Layout, Any]]) -> list[jax.Array]:
        """Zeros in the state's layout, each of a dtype; no device ever holds a whole leaf."""

        def make() -> list[jax.Array]:
            specs = [partition_spec(layout.state, self.mesh) for layout, _ in like]
            zeros = [jnp.zeros(layout.shape, dtype) for layout, dtype in like]
            return [place(x, self.mesh, spec) for x, spec in zip(zeros, specs, strict=True)]

        return self._on_devices(jax.jit(make)())

    def replicate(self, scalars: Sequence[Any]) -> list[jax.Array]:
        """Lay scalars out on the whole mesh, those that are not yet."""
        there = [isinstance(getattr(x, "sharding", None), NamedSharding) for x in scalars]
        if all(there):
            return [*scalars]
        spread = jax.jit(lambda xs: [place(x, self.mesh, PartitionSpec()) for x in xs])
        return self._on_devices(spread([*scalars]))

    def _on_devices(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """Raise where arrays were asked of a mesh that has no devices."""
        for x in arrays:
            if not isinstance(x, Tracer) and not isinstance(x.sharding, NamedSharding):
                raise ValueError(
                    f"mesh is abstract, {self.mesh}: it says how arrays lie, and has no devices to "
                    "make them on. Pass a jax.sharding.Mesh, or call this under jax.set_mesh."
                )
        return arrays


def resolve_zero1(
    mesh: Any, zero1_axes: Any, param_specs: Any, mesh_costs: Any = None
) -> Zero1 | None:
    """Check the arguments that belong to a mesh; None without one.

    Raises:
      ValueError, TypeError: where one of them is given without a mesh, or does not fit it.
    """
    mesh = unheld(mesh)
    if mesh is None:
        given = {"zero1_axes": zero1_axes, "param_specs": param_specs, "mesh_costs": mesh_costs}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} says how to use a mesh: pass mesh= as well.")
        return None
    mesh = check_mesh(mesh)
    costs = MeshCosts() if mesh_costs is None else mesh_costs
    if not isinstance(costs, MeshCosts):
        raise TypeError(
            f"mesh_costs must be a muon_jax.MeshCosts, such as MeshCosts(2500); got {costs!r}."
        )
    return Zero1(mesh, check_zero1_axes(mesh, zero1_axes), param_specs, costs)


def check_outside_shard_map() -> None:
    """Raise where the caller is one device of a `shard_map`, and sees its shards alone."""
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "An optimizer with mesh= was called inside a shard_map, where each device is on its "
            "own. Call its init and update outside, on the whole arrays; or leave mesh= out inside "
            "a shard_map whose devices hold whole matrices."
        )


def on_shards(
    body: Callable[..., Any], mesh: AnyMesh, args: Any, in_specs: Any, out_specs: Any
) -> Any:
    """Run `body` on each device's shards of `args`, laid out as `in_specs` says first."""
    check_outside_shard_map()
    leaves, structure = jax.tree.flatten(args)
    specs = jax.tree.leaves(in_specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    placed = [place(x, mesh, spec) for x, spec in zip(leaves, specs, strict=True)]
    alone = [_axes_of_length_one(mesh, spec) for spec in specs]

    def on_one(*shards: Any) -> Any:
        # JAX counts a value as different along such an axis if its spec names it, and would not
        # let it meet others. A sum over one device says otherwise, and costs nothing.
        merged = [
            lax.psum(x, axes) if axes else x
            for x, axes in zip(jax.tree.leaves(shards), alone, strict=True)
        ]
        return body(*structure.unflatten(merged))

    mapped = jax.shard_map(on_one, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped(*structure.unflatten(placed))


def _axes_of_length_one(mesh: AnyMesh, spec: PartitionSpec) -> tuple[str, ...]:
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(axis for axes in entries for axis in axes if mesh.shape[axis] == 1)


def gather_to_params(
    shards: Sequence[Inexact[Array, "..."]], layouts: Sequence[Layout], sizes: Sizes
) -> list[Inexact[Array, "..."]]:
    """Inside a `shard_map`: from the state's layout to the parameters', in few collectives.

    Shards up to `FUSED_GATHER_BYTES` travel together, where they are gathered over the same axes
    and differ along the same.
    """
    together = defaultdict(list)
    for index, (shard, layout) in enumerate(zip(shards, layouts, strict=True)):
        kept = spec_axes(layout.param)
        axes = tuple(axis for axis in sizes if axis in spec_axes(layout.state) - kept)
        alone = index if shard.nbytes > FUSED_GATHER_BYTES else None
        differs = frozenset(axis for axis in kept if sizes[axis] > 1)
        together[axes, differs, shard.dtype, alone].append(index)
    out, sent = list(shards), 0.0
    for (axes, *_), members in together.items():
        if not axes:
            continue
        with jax.named_scope("adamw.gather"):
            if len(members) == 1:  # a large one keeps its axes, see `_part_runner`
                sending = shards[members[0]]
            else:
                sending = jnp.concatenate([shards[i].reshape(-1) for i in members])
            pieces = all_gather(sending, axes)
        sent += pieces.nbytes * others(len(pieces))
        if len(members) == 1:
            out[members[0]] = _join(pieces, layouts[members[0]], axes, sizes)
            continue
        start = 0
        for i in members:
            stop = start + shards[i].size
            out[i] = _join(pieces[:, start:stop], layouts[i], axes, sizes)
            start = stop
    note_adam_gather(sent)
    return out


def _join(
    pieces: Inexact[Array, "devices *shard"], layout: Layout, axes: Sequence[str], sizes: Sizes
) -> Inexact[Array, "..."]:
    local = local_shape(layout.shape, layout.state, sizes)
    x = pieces.reshape(*(sizes[axis] for axis in axes), *local)
    order: list[int] = []
    for dim, named in enumerate(layout.state):
        order += [*(axes.index(a) for a in named if a in axes), len(axes) + dim]
    return x.transpose(order).reshape(local_shape(layout.shape, layout.param, sizes))


def _check_blocks(route: Route, spec: Spec, mesh: AnyMesh) -> None:
    views: LeafViews | None = route.views
    block = views.views[0].block if views else None
    if block is not None and any(mesh.shape[axis] > 1 for axis in spec[block.axis]):
        raise ValueError(
            f"{show(route.path)}, shape {route.shape}: the axis {block.axis} that holds its blocks "
            f"is sharded ({partition_spec(spec, mesh)}), and blocks cannot be cut out of shards. "
            "Shard its other axes, or keep the blocks in separate parameters or along an axis of "
            "their own."
        )
