"""Trains a small model on a mesh, as one of several processes or as the only one.

test_processes.py starts it as a program, and calls `train` itself for the single process:

    python -m tests.mesh.process_worker ADDRESS NUMBER_OF_PROCESSES NUMBER FOLDER
"""

import pickle
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from muon_jax import muon, opt_state_shardings
from tests.mesh.mesh_model import (
    COSTLY_WORK,
    LEAVES,
    Gradients,
    compilations,
    make_gradients,
    make_mesh,
    make_params,
    make_tree,
)

STEPS = 10
DEVICES = 8


class Case(NamedTuple):
    """One training run.

    Attributes:
      mesh: the lengths of its axes, data and fsdp.
      axis_type: Auto or Explicit.
      init: whether the state is made by `tx.init` as it stands, or under jit, laid out by
        `opt_state_shardings`.
      fsdp: whether the parameters are sharded.
    """

    mesh: tuple[int, ...]
    axis_type: AxisType
    init: Literal["eager", "jit"]
    fsdp: bool = False


CASES = {
    "line": Case((8,), AxisType.Auto, "eager"),
    "square": Case((2, 4), AxisType.Auto, "jit"),
    "square, explicit, fsdp": Case((2, 4), AxisType.Explicit, "eager", fsdp=True),
}


class Shards(NamedTuple):
    """What one process holds of an array: start and stop on each dimension, and the values."""

    shape: tuple[int, ...]
    bounds: list[list[tuple[int, int]]]
    values: list[np.ndarray]


def param_specs(case: Case) -> dict[str, Any]:
    """Under FSDP what has two axes or more is sharded on the first, without it nothing is."""
    specs = []
    for _, shape in LEAVES:
        first = "fsdp" if case.fsdp and len(shape) > 1 else None
        specs.append(PartitionSpec(first, *[None] * (len(shape) - 1)))
    return make_tree(specs)


def make_optimizer(case: Case, mesh: Mesh) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0.02, 0.01, STEPS)
    # Explicit axes say themselves where the parameters lie.
    specs = param_specs(case) if case.fsdp and case.axis_type is AxisType.Auto else None
    optimizer = muon(
        schedule, weight_decay=0.1, mesh=mesh, param_specs=specs, mesh_costs=COSTLY_WORK
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def train(case: Case) -> dict[Gradients, dict[str, Shards]]:
    """Ten steps on all devices of all processes, with either kind of gradients: what is held then.

    One program does both. Each device has one example, so that gradients are sums over all
    processes.
    """
    mesh = make_mesh(case.mesh, case.axis_type)
    tx = make_optimizer(case, mesh)

    def loss(params: Any, batch: Any) -> jax.Array:
        if case.axis_type is AxisType.Explicit:
            params = jax.tree.map(lambda p: jax.sharding.reshard(p, replicated(p, mesh)), params)
        products = jax.tree.map(lambda p, x: jnp.sum(p[None] * x), params, batch)
        return jnp.stack(jax.tree.leaves(products)).sum() / DEVICES

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    results = {}
    for kind in get_args(Gradients):
        params = jax.tree.map(lambda x, s: place(x, mesh, s), make_params(), param_specs(case))
        if case.init == "eager":
            state = tx.init(params)
        else:
            state = jax.jit(tx.init, out_shardings=opt_state_shardings(tx, params))(params)
        start = state
        with compilations() as compiled:
            for number in range(STEPS):
                batch = make_batch(kind, number)
                spec = PartitionSpec(mesh.axis_names)
                batch = jax.tree.map(lambda x, s=spec: place(x, mesh, s), batch)
                params, state = step(params, state, batch)
        # The second kind of gradients is trained by the first one's program.
        assert len(compiled) == (0 if results else 1), f"{len(compiled)} programs"
        results[kind] = held({"params": params, "start": start, "state": state})
    return results


def make_batch(kind: Gradients, step: int) -> Any:
    """One gradient for each device, stacked; those made of Hadamard matrices differ in size."""
    if kind == "gaussian":
        each = [make_gradients(kind, DEVICES * step + device) for device in range(DEVICES)]
    else:
        same = make_gradients(kind, step)
        each = [jax.tree.map(lambda x, f=f: np.float32(f) * x, same) for f in range(1, DEVICES + 1)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def held(tree: Any) -> dict[str, Shards]:
    """The shards of this process, by path."""
    shards = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        bounds = [
            [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
            for shard in leaf.addressable_shards
        ]
        values = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shards[name] = Shards(leaf.shape, bounds, values)
    return shards


def replicated(x: jax.Array, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))


def place(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def main() -> None:
    address, processes, number, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(number))
    assert jax.device_count() == DEVICES, jax.devices()
    results = {}
    for name, case in CASES.items():
        results[name] = train(case)
        print(f"{name}: done", flush=True)
    (Path(folder) / f"{number}.pickle").write_bytes(pickle.dumps(results))
    jax.distributed.shutdown()


if __name__ == "__main__":
    # As a module, so that what is pickled here is known by the same name there.
    from tests.mesh import process_worker

    process_worker.main()
