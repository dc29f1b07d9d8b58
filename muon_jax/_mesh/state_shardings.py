"""The shardings of an optimizer state, for `jax.jit` and for Orbax."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from muon_jax._common.paths import Path, flatten_with_names
from muon_jax._common.trees import PyTree
from muon_jax._mesh.placed import Placed, asked
from muon_jax._mesh.specs import partition_spec, resolve_param_specs
from muon_jax._mesh.zero1 import Zero1


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

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4, mesh=mesh))
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> shardings = opt_state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    if not callable(getattr(tx, "init", None)):
        raise TypeError(f"opt_state_shardings takes an optimizer, not its state; got {tx!r}.")
    with asked(True):
        state = jax.eval_shape(tx.init, params)
    leaves, structure = flatten_with_names(state, lambda node: isinstance(node, Placed))
    places = [leaf.place for _, leaf in leaves if isinstance(leaf, Placed)]
    if not places:
        raise ValueError(
            "opt_state_shardings found no optimizer of muon_jax with a mesh: pass "
            "muon(..., mesh=mesh), or scale_by_muon(..., mesh=mesh)."
        )
    zero1, layouts = places[0].zero1, {x.path: x.layout for x in places if x.layout is not None}
    specs = [
        leaf.spec
        if isinstance(leaf, Placed)
        else _beside(zero1, layouts, params, path, tuple(leaf.shape))
        for path, leaf in leaves
    ]
    return structure.unflatten([NamedSharding(zero1.mesh, spec) for spec in specs])


def _beside(
    zero1: Zero1, layouts: Any, params: PyTree, path: Path, shape: tuple[int, ...]
) -> PartitionSpec:
    """Where the parameter lies whose path ends `path`, for the state of another transformation."""
    named = dict(flatten_with_names(params)[0])
    for name in (path[start:] for start in range(len(path) + 1)):
        layout, param = layouts.get(name), named.get(name)
        if layout is not None and layout.shape == shape:
            return layout.param_spec(zero1.mesh)
        if param is not None and tuple(jnp.shape(param)) == shape:
            # A parameter that muon_jax does not update: its own word, or that of the given specs.
            for key in reversed(name):
                param = {key: param}
            (spec,) = resolve_param_specs(param, zero1.param_specs, zero1.mesh, whole=False)
            return partition_spec(spec, zero1.mesh)
    return PartitionSpec()
