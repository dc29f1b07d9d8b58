"""Where the parameters lie on a mesh: read it, check it, write it down in one form.

The parameters' sharding comes from `param_specs`; else, on Explicit axes, from the arrays' types;
else they count as replicated. Tracers on Auto axes show no sharding, so there concrete arrays are
only checked: sharded ones without a spec, or against their spec, raise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from muon_jax._common.paths import flatten_with_names, is_absent, show
from muon_jax._common.prefix import match_prefix
from muon_jax._common.trees import PyTree

AnyMesh = Mesh | AbstractMesh

Spec = tuple[tuple[str, ...], ...]
"""The mesh axes that shard each dimension, major first."""

Sizes = Mapping[str, int]
"""The mesh: the length of each axis, in its order."""


def check_mesh(mesh: Any) -> AnyMesh:
    """Return `mesh`, or raise where it is none, or has axes that a program cannot be written for.

    Raises:
      TypeError: where it is no mesh.
      ValueError: where Auto and Explicit axes are mixed, or an axis is Manual.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',)); got "
            f"{mesh!r}."
        )
    kinds = {*mesh.axis_types}
    if AxisType.Manual in kinds or len(kinds) > 1:
        raise ValueError(
            f"mesh must have Auto axes or Explicit ones throughout; got {mesh.axis_types} for "
            f"{mesh.axis_names}. Pass axis_types= to jax.make_mesh, and call the optimizer outside "
            "of shard_map."
        )
    return mesh


def check_zero1_axes(mesh: AnyMesh, axes: Sequence[str] | str | None) -> tuple[str, ...]:
    """The axes to shard the state over, in the mesh's order; all of them for None.

    Raises:
      ValueError: for an axis that the mesh lacks.
      TypeError: for anything but names.
    """
    if axes is None:
        return mesh.axis_names
    if not isinstance(axes, Sequence):
        raise TypeError(f"zero1_axes must name mesh axes, such as ('data',); got {axes!r}.")
    named = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in named:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"zero1_axes={axes!r} names {axis!r}, which the mesh lacks; its axes are "
                f"{mesh.axis_names}."
            )
    return tuple(axis for axis in mesh.axis_names if axis in named)


def is_explicit(mesh: AnyMesh) -> bool:
    """Whether the mesh's axes are part of the arrays' types."""
    return AxisType.Explicit in mesh.axis_types


def partition_spec(spec: Spec, mesh: AnyMesh) -> PartitionSpec:
    """`spec` as JAX writes it: in full on Explicit axes, without trailing None on Auto ones.

    Compiled programs spell the shardings of their results so, unless an argument spells the same
    sharding otherwise.
    """
    length = len(spec)
    if not is_explicit(mesh):
        while length and not spec[length - 1]:
            length -= 1
    entries = (axes[0] if len(axes) == 1 else axes or None for axes in spec[:length])
    return PartitionSpec(*entries)


def local_shape(shape: Sequence[int], spec: Spec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one device's shard."""
    return tuple(
        length // math.prod(sizes[axis] for axis in axes)
        for length, axes in zip(shape, spec, strict=True)
    )


def spec_axes(spec: Spec) -> frozenset[str]:
    """All axes that shard some dimension."""
    return frozenset(axis for axes in spec for axis in axes)


def place(x: jax.Array, mesh: AnyMesh, spec: PartitionSpec) -> jax.Array:
    """Lay an array out on the mesh, eagerly or traced, on Auto and on Explicit axes."""
    sharding = NamedSharding(mesh, spec)  # pyright: ignore[reportArgumentType]
    if is_explicit(mesh):
        return jax.device_put(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def resolve_param_specs(
    params: PyTree, param_specs: Any, mesh: AnyMesh, *, whole: bool = True
) -> list[Spec]:
    """How each parameter lies on the mesh, in the order of ``jax.tree.leaves(params)``.

    Args:
      params: arrays, tracers or `jax.ShapeDtypeStruct`s.
      param_specs: a tree of `PartitionSpec` or `NamedSharding`, or a prefix of one, or None.
      mesh: the mesh.
      whole: whether `params` are all that `param_specs` may speak of.

    Raises:
      ValueError: for specs that the mesh, the shapes or the arrays contradict, for a tree that
        does not speak of a parameter, or speaks of one that is not there, for concrete sharded
        parameters without a spec, and for parameters committed to one device.
      TypeError: for an entry that is no spec.
    """
    leaves, _ = flatten_with_names(params)
    declared = None if param_specs is None else _declared(params, param_specs, whole)
    specs = []
    for index, (path, leaf) in enumerate(leaves):
        shape = tuple(jnp.shape(leaf))
        _check_devices_of(leaf, mesh, show(path), shape)
        seen = _seen_sharding(leaf, mesh)
        if declared is not None:
            spec = _normalize(declared[index], shape, mesh, show(path), "param_specs")
            if seen is not None:
                _check_agreement(spec, seen, leaf, mesh, show(path))
        elif seen is None:
            spec = ((),) * len(shape)
        elif is_explicit(mesh):
            spec = _normalize(seen, shape, mesh, show(path), "its type")
        else:
            spec = _normalize(seen, shape, mesh, show(path), "its sharding")
            if spec_axes(spec):
                raise ValueError(
                    f"{show(path)}, shape {shape}, is sharded as {partition_spec(spec, mesh)}, "
                    "but the optimizer was not told: under jit, arrays on Auto axes show no "
                    "sharding. Pass param_specs=, a tree of the parameters' PartitionSpecs."
                )
        specs.append(spec)
    return specs


def _declared(params: PyTree, tree: Any, whole: bool) -> list[Any]:
    is_spec = lambda node: is_absent(node) or isinstance(node, PartitionSpec | NamedSharding)  # noqa: E731
    entries, _ = flatten_with_names(tree, is_spec)
    for path, entry in entries:
        if not is_spec(entry):
            raise TypeError(
                f"param_specs has {entry!r} at {show(path)}; use jax.sharding.PartitionSpec, "
                "NamedSharding, or None for a replicated parameter."
            )
    return match_prefix(
        "param_specs",
        entries,
        params,
        "It speaks of every parameter (PartitionSpec() for a replicated one), as a tree like the "
        "parameters' or a prefix of it.",
        whole=whole,
    )


def _normalize(
    spec: PartitionSpec | NamedSharding | None,
    shape: tuple[int, ...],
    mesh: AnyMesh,
    where: str,
    source: str,
) -> Spec:
    if isinstance(spec, NamedSharding):
        _check_mesh_of(spec, mesh, where, shape, source)
        spec = spec.spec
    entries = () if spec is None else tuple(spec)
    if len(entries) > len(shape):
        raise ValueError(
            f"{where}, shape {shape}: {source} is {spec}, which has {len(entries)} entries for "
            f"{len(shape)} dimensions."
        )
    if PartitionSpec.UNCONSTRAINED in entries:
        raise ValueError(
            f"{where}, shape {shape}: {source} is {spec}, which leaves an axis to XLA; the "
            "optimizer has to know it. Name its mesh axes, or None."
        )
    for entry in entries:
        if not isinstance(entry, str | tuple | None):
            raise TypeError(
                f"{where}, shape {shape}: {source} is {spec}; its entries are names of mesh axes, "
                f"tuples of them, or None, not {entry!r}."
            )
    normal = tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in (*entries, *[None] * (len(shape) - len(entries)))
    )
    named = [axis for axes in normal for axis in axes]
    for axis in named:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{where}, shape {shape}: {source} is {spec}, but the mesh has no axis {axis!r}; "
                f"its axes are {mesh.axis_names}."
            )
        if named.count(axis) > 1:
            raise ValueError(f"{where}, shape {shape}: {source} is {spec}: {axis!r} comes twice.")
    for dim, axes in enumerate(normal):
        count = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dim] % count:
            raise ValueError(
                f"{where}, shape {shape}: {source} is {spec}, but {count} devices do not divide "
                f"dimension {dim} of length {shape[dim]}."
            )
    if is_explicit(mesh):
        return normal  # part of the array's type, whatever their length
    return tuple(tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in normal)


def _seen_sharding(leaf: Any, mesh: AnyMesh) -> NamedSharding | None:
    """The sharding that a leaf itself shows, where it lies on a mesh of these axes."""
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding if is_explicit(mesh) else None
    else:
        sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding


def _check_devices_of(leaf: Any, mesh: AnyMesh, where: str, shape: tuple[int, ...]) -> None:
    """Raise where an array is bound to one device: JAX would not move it to the mesh later."""
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array) or not leaf.committed:
        return
    if not isinstance(leaf.sharding, SingleDeviceSharding):
        return
    (device,) = leaf.sharding.device_set
    if mesh.size > 1 or (isinstance(mesh, Mesh) and device not in {*mesh.devices.flat}):
        raise ValueError(
            f"{where}, shape {shape}, is committed to {device}, but the optimizer was given a mesh "
            f"of {mesh.size} devices. Lay the parameters out on it: jax.device_put(params, "
            "jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))."
        )


def _check_mesh_of(
    sharding: NamedSharding, mesh: AnyMesh, where: str, shape: tuple[int, ...], source: str
) -> None:
    other = sharding.mesh
    if dict(other.shape) != dict(mesh.shape) or {*other.axis_types} != {*mesh.axis_types}:
        raise ValueError(
            f"{where}, shape {shape}: {source} is on a mesh {dict(other.shape)} of "
            f"{other.axis_types}, and the optimizer was given mesh={dict(mesh.shape)} of "
            f"{mesh.axis_types}. Use one mesh for both."
        )


def _check_agreement(spec: Spec, seen: NamedSharding, leaf: Any, mesh: AnyMesh, where: str) -> None:
    shape = tuple(jnp.shape(leaf))
    shown = _normalize(seen, shape, mesh, where, "its sharding")
    relevant = lambda s: [[a for a in axes if mesh.shape[a] > 1] for axes in s]  # noqa: E731
    if relevant(shown) != relevant(spec):
        raise ValueError(
            f"{where}, shape {shape}: param_specs says {partition_spec(spec, mesh)}, but the array "
            f"is sharded as {seen.spec}. Place it with jax.device_put, or correct the spec."
        )
