"""The shardings of an optimizer state, for `jax.jit` and for Orbax."""

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from muon_jax._paths import flatten_with_names
from muon_jax._record import recording
from muon_jax._specs import partition_spec


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

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4, mesh=mesh))
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> shardings = opt_state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
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
            layout = record.layout_of(path, tuple(leaf.shape)) if leaf.ndim else None
            spec = PartitionSpec() if layout is None else partition_spec(layout.param, mesh)
            sharding = NamedSharding(mesh, spec)
        shardings.append(sharding)
    return structure.unflatten(shardings)


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
