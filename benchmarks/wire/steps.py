"""Whole training steps, compiled and counted: the rows of `benchmarks.wire`.

A step differentiates a loss on a batch that is sharded over the mesh, then runs
`optax.chain(optax.clip_by_global_norm(1.0), optimizer)` and `optax.apply_updates`.

`python -m benchmarks.wire.steps v5e-8 separate fsdp` prints the rows of two cases as lines of JSON.
`benchmarks.wire` runs it for each target, in a process with `targets.environment`.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from benchmarks.step import newton_schulz_flops
from benchmarks.targets import TARGETS, Target, make_mesh
from benchmarks.wire.cases import CASES, OPTIMIZERS, Case, Optimizer
from benchmarks.wire.counts import count
from muon_jax import muon, opt_state_shardings

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
MESH_AXES = {1: ("data",), 2: ("data", "pipe")}


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile, and what its state takes on each device."""

    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    state_bytes: int

    def compiled_text(self) -> str:
        """The HLO that one device runs."""
        jitted = jax.jit(self.step, donate_argnums=(0, 1), out_shardings=self.out_shardings)
        return jitted.lower(*self.arguments).compile().as_text() or ""


def build(case: Case, optimizer: Optimizer, mesh: Mesh) -> Program:
    """Lay a case out on a mesh and make its step, with abstract arguments."""
    axes = tuple(mesh.axis_names)
    specs = {name: case.param_spec(shape, axes) for name, shape in case.shapes.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs[name]))
        for name, shape in case.shapes.items()
    }
    given = None if case.parameters == "replicated" else specs
    ours = muon(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mesh=mesh, param_specs=given)
    states = {
        name: NamedSharding(mesh, case.state_spec(shape, axes, mesh.size))
        for name, shape in case.shapes.items()
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        ours if optimizer == "muon_jax" else _peer(optimizer, params, states),
    )
    if optimizer == "muon_jax":
        shardings = opt_state_shardings(tx, params)
    else:
        shardings = jax.tree.map_with_path(
            lambda path, _: states.get(getattr(path[-1], "key", ""), NamedSharding(mesh, P())),
            jax.eval_shape(tx.init, params),
        )
    state = jax.tree.map(_placed, jax.eval_shape(tx.init, params), shardings)
    shape, spec = case.batch(axes, mesh.size)
    batch = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    loss = case.loss()

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    out = ({name: leaf.sharding for name, leaf in params.items()}, shardings)
    return Program(step, (params, state, batch), out, _bytes_per_device(state))


def _peer(
    optimizer: Optimizer,
    params: dict[str, jax.ShapeDtypeStruct],
    states: dict[str, NamedSharding],
) -> optax.GradientTransformation:
    """An optimizer to compare with."""
    if optimizer == "optax muon":
        return optax_muon(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            consistent_rms=0.2,
            muon_weight_dimension_numbers={name: MuonDimensionNumbers(-2, -1) for name in params},
        )
    adamw = optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=WEIGHT_DECAY)
    stages = {name: _stages(params[name].sharding, states[name]) for name in params}
    wire = jnp.bfloat16 if optimizer == "adamw bf16" else None

    def scatter(x: jax.Array, path: list[NamedSharding]) -> jax.Array:
        for sharding in path[1:]:
            x = lax.with_sharding_constraint(x, sharding)
        return x

    def gather(x: jax.Array, path: list[NamedSharding]) -> jax.Array:
        # XLA:CPU gathers bfloat16 as float32, the bits as an integer it leaves alone.
        sent = x if wire is None else lax.bitcast_convert_type(x.astype(wire), jnp.uint16)
        with jax.named_scope("adamw.gather"):
            for sharding in reversed(path):
                sent = lax.with_sharding_constraint(sent, sharding)
        return sent if wire is None else lax.bitcast_convert_type(sent, wire).astype(x.dtype)

    return optax.chain(_each(scatter, stages), adamw, _each(gather, stages))


def _stages(param: Any, state: NamedSharding) -> list[NamedSharding]:
    """From the parameter's layout to the state's, one mesh axis at a time, the longest first.

    On many TPU chips XLA makes an all-reduce of a reduce-scatter, and of many an all-gather, over
    more than one ring at once (AdamW's as well).
    """
    mesh, stages = state.mesh, [param]
    used = {axis for names in param.spec for axis in _names(names)}
    free = {axis for names in state.spec for axis in _names(names)} - used
    for axis in sorted(free, key=lambda axis: -mesh.shape[axis]):
        used |= {axis}
        kept = [tuple(a for a in _names(names) if a in used) for names in state.spec]
        stages.append(NamedSharding(mesh, P(*(names or None for names in kept))))
    return stages


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _each(function: Callable[[Any, Any], Any], other: Any) -> optax.GradientTransformation:
    """A stateless transformation of each leaf, with something of its own."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return {name: function(x, other[name]) for name, x in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def rows(
    target: Target, names: Iterable[str], optimizers: Sequence[str] = OPTIMIZERS
) -> Iterator[dict[str, Any]]:
    """Compile the cases for a target, one row for each optimizer as soon as it is there."""
    mesh = make_mesh(target, target.mesh, MESH_AXES[len(target.mesh)])
    for name in names:
        case = CASES[name]
        for optimizer in filter(optimizers.__contains__, case.optimizers):
            start = time.perf_counter()
            program = build(case, optimizer, mesh)
            text = program.compiled_text()
            compile_s = time.perf_counter() - start
            yield {
                "target": target.name,
                "case": name,
                "optimizer": optimizer,
                "devices": mesh.size,
                "parameters": case.count,
                "even_flops": newton_schulz_flops(case.shapes, optimizer) / mesh.size,
                "state_bytes": program.state_bytes,
                "compile_s": compile_s,
                **count(optimizer, text),
            }


if __name__ == "__main__":
    target, names, optimizers = sys.argv[1:]
    for row in rows(TARGETS[target], names.split(","), optimizers.split(",")):
        print(json.dumps(row), flush=True)
