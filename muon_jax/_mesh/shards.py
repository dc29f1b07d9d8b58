"""The border of the optimizer's `shard_map`: what goes in, how it lies there, what comes out."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from muon_jax._mesh.layout import Layout
from muon_jax._mesh.specs import AnyMesh, partition_spec, place, spec_axes
from muon_jax._mesh.tiles import laid_out, scatters_at_once


def on_shards(
    mesh: AnyMesh,
    body: Callable[..., Any],
    settings: Any,
    layouts: Sequence[Layout],
    gradients: Sequence[Any],
    *kept: Sequence[Any],
) -> Any:
    """Run one step of an optimizer on each device's shards of the leaves.

    Args:
      mesh: the devices.
      body: ``body(settings, gradients, *kept)``, which returns the updates in the parameters'
        layout, and what was kept, in the state's.
      settings: a tree. Its arrays, which `optax.inject_hyperparams` makes of numbers, arrive whole
        on each device; everything else in it stays a constant of the program.
      layouts: the layout of each leaf.
      gradients: one array for each leaf, of any layout; unreduced sums become reduce-scatters.
      *kept: lists of one array for each leaf, in the layout of the state.

    Returns:
      What `body` returns, as whole arrays.
    """
    parts, structure = jax.tree.flatten(settings)
    arrays = [part for part in parts if isinstance(part, jax.Array)]
    state = [layout.state_spec(mesh) for layout in layouts]
    param = [layout.param_spec(mesh) for layout in layouts]
    specs = [PartitionSpec()] * len(arrays) + state * (1 + len(kept))
    alone = [_axes_of_length_one(mesh, spec) for spec in specs]

    # The arrays are arguments, not a closure, which JAX refuses for those on Explicit axes.
    def on_one(*shards: jax.Array) -> Any:
        # JAX counts a value as different along such an axis if its spec names it, and would not
        # let it meet others. A sum over one device says otherwise, and costs nothing.
        merged = iter(
            [lax.psum(x, axes) if axes else x for x, axes in zip(shards, alone, strict=True)]
        )
        here = [next(merged) if isinstance(part, jax.Array) else part for part in parts]
        columns = [[next(merged) for _ in layouts] for _ in (gradients, *kept)]
        columns[0] = [_tiled(x, layout) for x, layout in zip(columns[0], layouts, strict=True)]
        return body(structure.unflatten(here), *columns)

    args = itertools.chain(arrays, _arrive(mesh, gradients, layouts), *kept)
    placed = [place(x, mesh, spec) for x, spec in zip(args, specs, strict=True)]
    out_specs = (param, *[state] * len(kept))
    return jax.shard_map(on_one, mesh=mesh, in_specs=(*specs,), out_specs=out_specs)(*placed)


def _tiled(gradient: jax.Array, layout: Layout) -> jax.Array:
    """A gradient's shard, in the layout in which a TPU's reduce-scatter leaves it best."""
    pairs = enumerate(zip(layout.state, layout.param, strict=True))
    scattered = [dim for dim, (state, param) in pairs if len(state) > len(param)]
    if gradient.ndim != 2 or len(scattered) != 1 or not gradient.size:
        return gradient
    return laid_out(gradient, scattered[0])


def _axes_of_length_one(mesh: AnyMesh, spec: PartitionSpec) -> tuple[str, ...]:
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(axis for axes in entries for axis in axes if mesh.shape[axis] == 1)


def _arrive(mesh: AnyMesh, gradients: Sequence[Any], layouts: Sequence[Layout]) -> list[Any]:
    """Lay gradients out as the state is, over several axes in two stages.

    A sum over data parallelism that is still to be done then ends as a reduce-scatter over the
    longest axis first. In one stage, over many TPU chips, XLA makes it an all-reduce. Where it does
    not, one stage is better: where gradients are clipped, the second is an all-reduce.
    """
    if scatters_at_once(mesh):
        return [*gradients]
    arrived = []
    for gradient, layout in zip(gradients, layouts, strict=True):
        free = spec_axes(layout.state) - spec_axes(layout.param)
        if len(free) > 1:
            longest = max(mesh.axis_names, key=lambda a: mesh.shape[a] if a in free else 0)
            later = free - {longest}
            first = tuple(tuple(a for a in named if a not in later) for named in layout.state)
            gradient = place(gradient, mesh, partition_spec(first, mesh))
        arrived.append(gradient)
    return arrived
