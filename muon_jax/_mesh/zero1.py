"""ZeRO-1 on a mesh: where the state of each leaf lies, and how it is made there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from muon_jax._common.injectable import unheld
from muon_jax._common.paths import show
from muon_jax._common.trees import PyTree
from muon_jax._matrices import LeafViews
from muon_jax._mesh.cost import MeshCosts
from muon_jax._mesh.layout import Layout, zero1_layout
from muon_jax._mesh.specs import (
    AnyMesh,
    Sizes,
    Spec,
    check_mesh,
    check_zero1_axes,
    partition_spec,
    place,
    resolve_param_specs,
)
from muon_jax._routes import Route


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
        _check_outside_shard_map()
        layouts = []
        specs = resolve_param_specs(params, self.param_specs, self.mesh)
        for route, spec in zip(routes, specs, strict=True):
            _check_blocks(route, spec, self.mesh)
            layouts.append(zero1_layout(route.shape, spec, self.axes, self.sizes, route.views))
        return layouts

    def replicate(self, scalars: Sequence[Any]) -> list[jax.Array]:
        """Lay scalars out on the whole mesh, those that are not yet."""
        there = [isinstance(getattr(x, "sharding", None), NamedSharding) for x in scalars]
        if all(there):
            return [*scalars]
        spread = jax.jit(lambda xs: [place(x, self.mesh, PartitionSpec()) for x in xs])
        return self.on_devices(spread([*scalars]))

    def on_devices(self, arrays: list[jax.Array]) -> list[jax.Array]:
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


def _check_blocks(route: Route, spec: Spec, mesh: AnyMesh) -> None:
    views: LeafViews | None = route.views
    block = views[0].block if views else None
    if block is not None and any(mesh.shape[axis] > 1 for axis in spec[block.axis]):
        raise ValueError(
            f"{show(route.path)}, shape {route.shape}: the axis {block.axis} that holds its blocks "
            f"is sharded ({partition_spec(spec, mesh)}), and blocks cannot be cut out of shards. "
            "Shard its other axes, or keep the blocks in separate parameters or along an axis of "
            "their own."
        )


def _check_outside_shard_map() -> None:
    """Raise where the caller is one device of a `shard_map`, and sees its shards alone."""
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "An optimizer with mesh= was called inside a shard_map, where each device is on its "
            "own. Call its init and update outside, on the whole arrays; or leave mesh= out inside "
            "a shard_map whose devices hold whole matrices."
        )
