"""The shardings of an optimizer state, for `jax.jit` and for Orbax."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from muon_jax._paths import Path, flatten_with_names
from muon_jax._record import Record, recording
from muon_jax._specs import Spec, param_layouts, partition_spec


def opt_state_shardings(tx: Any, params: PyTree) -> PyTree:
    """The sharding of every array in ``tx.init(params)``, without making any.

    On Auto axes `jax.eval_shape` shows none, and a checkpoint is best read straight into its place.
    The state of `muon` has the layout in which its `init` leaves it. Arrays that other
    transformations keep, such as the sums of `optax.MultiSteps`, lie like the parameter that their
    path ends with; all others, such as counts, are replicated.

    Args:
      tx: an optimizer with `muon(..., mesh=mesh)` or `scale_by_muon(..., mesh=mesh)` somewhere in
        it: any chain, partition or wrapper that has an `init`.
      params: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree of `jax.sharding.NamedSharding` with the structure of ``tx.init(params)``.

    Raises:
      ValueError: where nothing in `tx` was given a mesh; and where `tx.init` would.
      TypeError: where `tx` is no optimizer.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4, mesh=mesh))
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> shardings = opt_state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"opt_state_shardings takes an optimizer, not its state; got {tx!r}.")
    with recording() as record:
        # A function of its own: JAX would not trace one again that it knows.
        jaxpr, state = jax.make_jaxpr(lambda p: tx.init(p), return_shape=True)(params)
    leaves, structure = flatten_with_names(state)
    written = [_written_sharding(jaxpr.jaxpr, var) for var in jaxpr.jaxpr.outvars]
    mesh = next((sharding.mesh for sharding in written if sharding is not None), None)
    if mesh is None:
        raise ValueError(
            "opt_state_shardings found no optimizer of muon_jax with a mesh: pass "
            "muon(..., mesh=mesh), or scale_by_muon(..., mesh=mesh)."
        )
    shardings = []
    for (path, leaf), sharding in zip(leaves, written, strict=True):
        if sharding is None:
            spec = _beside(record, path, tuple(leaf.shape), params) if leaf.ndim else None
            spec = PartitionSpec() if spec is None else partition_spec(spec, mesh)
            sharding = NamedSharding(mesh, spec)
        shardings.append(sharding)
    return structure.unflatten(shardings)


def _beside(record: Record, path: Path, shape: tuple[int, ...], params: PyTree) -> Spec | None:
    """Where the parameter lies whose path ends `path`, for the state of another transformation."""
    layout = record.layout_of(path, shape)
    if layout is not None or record.mesh is None:
        return layout and layout.param
    # A parameter that muon_jax does not update: its own word, or that of the given specs.
    for start in range(len(path) + 1):
        for name, leaf in flatten_with_names(params)[0]:
            if name == path[start:] and tuple(jnp.shape(leaf)) == shape:
                named = _nested(name, leaf)
                specs, mesh = record.param_specs, record.mesh
                return param_layouts(named, specs, mesh, whole=False)[0]
    return None


def _nested(path: Path, leaf: Any) -> Any:
    """A tree of dicts with one leaf, at this path."""
    for name in reversed(path):
        leaf = {name: leaf}
    return leaf


def _written_sharding(jaxpr: Jaxpr, var: Any) -> NamedSharding | None:
    """The sharding that the program itself gives to a variable where it is made."""
    if isinstance(var, Literal):
        return None
    for eqn in jaxpr.eqns:
        if var not in eqn.outvars:
            continue
        index = eqn.outvars.index(var)
        if eqn.primitive.name == "sharding_constraint":
            return eqn.params["sharding"]
        if eqn.primitive.name == "device_put":
            return eqn.params["devices"][index]
        inner = eqn.params.get("jaxpr")
        if isinstance(inner, ClosedJaxpr):
            return _written_sharding(inner.jaxpr, inner.jaxpr.outvars[index])
    return None
