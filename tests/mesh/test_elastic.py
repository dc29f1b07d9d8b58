"""An optimizer state saved on one mesh goes on, on any other, as if nothing had happened."""

import functools
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from muon_jax import muon, opt_state_shardings, sharding_report
from tests.checkers import abstract, relative_error
from tests.mesh.mesh_model import (
    COSTLY_WORK,
    LEAVES,
    SHAPES,
    Gradients,
    compilations,
    make_gradients,
    make_mesh,
    make_params,
    make_tree,
)

pytestmark = pytest.mark.one_stack

STEPS = 3  # before the state is saved
KINDS = get_args(Gradients)

# Gaussians summed in another order, by the clipping and in split matrices, relative to each leaf's
# norm. Measured at most, where parameters are sharded: 1.6e-7 in the state, 1.2e-7 in the updates.
# A bfloat16 rounding that falls on the other side would be seen in the latter: hence the margin.
STATE_TOLERANCE = 1e-6
UPDATE_TOLERANCE = 5e-3


class Place(NamedTuple):
    """Where a run trains: the lengths of the mesh's axes, none for a device without a mesh."""

    mesh: tuple[int, ...]
    axis_type: AxisType = AxisType.Auto
    fsdp: bool = False

    def __str__(self) -> str:
        kind = "explicit" if self.axis_type is AxisType.Explicit else "auto"
        shape = "x".join(map(str, self.mesh)) or "no mesh"
        return "-".join([shape, kind, *["fsdp"] * self.fsdp])


class Run:
    """A training run, as its user writes it."""

    def __init__(self, where: Place, every_k: int = 1, only: tuple[str, ...] = tuple(SHAPES)):
        self.only = only
        self.mesh: Mesh | None = make_mesh(where.mesh, where.axis_type) if where.mesh else None
        specs = None
        if where.fsdp:
            rows = lambda n: PartitionSpec("fsdp", *[None] * (n - 1)) if n > 1 else PartitionSpec()  # noqa: E731
            specs = make_tree([rows(len(shape)) for _, shape in LEAVES])
        replicated = jax.tree.map(lambda p: PartitionSpec(*[None] * p.ndim), make_params())
        self.specs = self.part(specs or replicated)
        schedule = optax.linear_schedule(0.02, 0.01, 10)
        optimizer = muon(
            schedule,
            weight_decay=0.1,
            mesh=self.mesh,
            param_specs=specs,
            mesh_costs=None if self.mesh is None else COSTLY_WORK,
        )
        self.tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
        if every_k > 1:
            self.tx = optax.MultiSteps(self.tx, every_k).gradient_transformation()
        shardings = None
        if every_k > 1:
            # On Auto axes XLA would lay the sums out anew, and the second step would be compiled.
            shardings = opt_state_shardings(self.tx, jax.eval_shape(self.make_params))
        self.update = jax.jit(self.tx.update, out_shardings=(None, shardings))

    def part(self, tree: Any) -> Any:
        """What this run trains of the model."""
        return {name: tree[name] for name in self.only}

    def make_params(self) -> Any:
        return self.part(make_params())

    def place(self, tree: Any) -> Any:
        if self.mesh is None:
            return jax.device_put(tree, jax.devices()[0])
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs)
        return jax.device_put(tree, shardings)

    def step(self, state: Any, params: Any, kind: Gradients, number: int) -> tuple[Any, Any]:
        """One step; the updates as NumPy's, and the state."""
        gradients = self.place(self.part(make_gradients(kind, number)))
        updates, state = self.update(gradients, state, self.place(params))
        return jax.tree.map(np.asarray, updates), state

    @functools.cached_property
    def fresh(self) -> Any:
        """A state just made."""
        return self.tx.init(self.place(self.make_params()))

    @functools.cached_property
    def abstract_state(self) -> Any:
        """What to restore: shapes, dtypes, and where everything is to lie."""
        params = self.place(self.make_params())
        shapes = jax.eval_shape(self.tx.init, params)
        if self.mesh is None:
            here = SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: here, shapes)
        else:
            shardings = opt_state_shardings(self.tx, params)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )


class Saved(NamedTuple):
    """A checkpoint, and what its run did next.

    Attributes:
      folder: of the checkpoint.
      state: that was saved, as NumPy's.
      params: at that time, as NumPy's.
      updates: of the next step.
      after: the state after it, as NumPy's.
    """

    folder: Any
    state: Any
    params: Any
    updates: Any
    after: Any


def start(run: Run, kind: Gradients, folder: Any, steps: int = STEPS) -> Saved:
    """Train, save, and go on for one step."""
    params = make_params()
    state = run.tx.init(run.place(params))
    for number in range(steps):
        updates, state = run.step(state, params, kind, number)
        params = jax.tree.map(np.add, params, updates)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
    on_host = jax.tree.map(np.asarray, state)
    updates, after = run.step(state, params, kind, steps)
    return Saved(folder / "state", on_host, params, updates, jax.tree.map(np.asarray, after))


@functools.cache
def run_at(where: Place) -> Run:
    """The run at a place, one for all tests: its program is compiled once."""
    return Run(where)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by the place where they were made and the kind of gradients, made once."""

    @functools.cache
    def make(where: Place, kind: Gradients) -> Saved:
        return start(run_at(where), kind, tmp_path_factory.mktemp("checkpoint"))

    return make


def restore(run: Run, folder: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, run.abstract_state)


def assert_lies_as_in_a_fresh_state(restored: Any, run: Run) -> None:
    """Each device holds of the restored state what it holds of a state just made."""
    fresh = run.fresh
    devices = {jax.devices()[0]} if run.mesh is None else {*run.mesh.devices.flat}
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(fresh), strict=True):
        assert jax.typeof(actual) == jax.typeof(expected) or not expected.ndim
        assert abstract(actual) == abstract(expected)
        pieces, wanted = (
            {shard.device: shard.index for shard in x.addressable_shards}
            for x in (actual, expected)
        )
        # Counts that wrappers make eagerly lie on one device until the first step.
        assert {*pieces} == devices
        assert pieces == wanted or (not expected.ndim and {*wanted} != devices)


def assert_equal(actual: Any, expected: Any) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b, jax.tree_util.keystr(path))


def largest_error(actual: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


EIGHT = Place((8,))
EIGHT_EXPLICIT = Place((8,), AxisType.Explicit)
ALONE = Place(())
JOURNEYS = [
    (EIGHT, Place((4,))),
    (EIGHT, Place((1,))),
    (EIGHT, ALONE),
    (EIGHT, EIGHT_EXPLICIT),
    (EIGHT, Place((2, 4), fsdp=True)),
    (EIGHT_EXPLICIT, Place((2, 4), AxisType.Explicit)),
    (ALONE, EIGHT),
]


def test_every_route_is_taken():
    params = jax.eval_shape(make_params)
    for shape in ((8,), (4,), (2, 4)):
        report = sharding_report(params, mesh=make_mesh(shape), mesh_costs=COSTLY_WORK)
        routes = " + ".join(row.route for row in report.rows)
        assert all(route in routes for route in ("local", "exchange", "split")), routes
        assert [leaf.path for leaf in report.leaves if leaf.replicas > 1] == ["bias"]


@pytest.mark.parametrize(("old", "new"), JOURNEYS, ids=lambda place: str(place))
def test_the_next_update_is_the_same(old, new, saved):
    run = run_at(new)
    for kind in KINDS:
        before = saved(old, kind)
        state = restore(run, before.folder)
        assert_equal(state, before.state)
        assert_lies_as_in_a_fresh_state(state, run)
        updates, after = run.step(state, before.params, kind, STEPS)
        if kind == "hadamard":
            assert_equal(updates, before.updates)
            assert_equal(after, before.after)
        else:
            errors = largest_error(after, before.after), largest_error(updates, before.updates)
            assert errors[0] <= STATE_TOLERANCE
            assert errors[1] <= UPDATE_TOLERANCE
        # It goes on with the same program, which also takes a state that was never saved. (Without
        # a mesh that one is not committed to its device, and JAX compiles again.)
        with compilations() as compiled:
            run.step(after, before.params, kind, STEPS + 1)
            if run.mesh is not None:
                run.step(run.fresh, before.params, kind, 0)
        assert not compiled


def test_gradients_accumulate_across_a_restart(tmp_path):
    steps = 3  # saved with one of the next two gradients summed
    few = ("odd", "embed", "bias")
    old = Run(EIGHT, every_k=2, only=few)
    params = old.make_params()
    state = old.tx.init(old.place(params))
    for number in range(steps):
        updates, state = old.step(state, params, "hadamard", number)
        params = jax.tree.map(np.add, params, updates)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(steps, args=ocp.args.StandardSave(state))
    expected, expected_state = old.step(state, params, "hadamard", steps)

    run = Run(Place((2, 4)), every_k=2, only=few)
    with ocp.CheckpointManager(tmp_path) as manager:
        arguments = ocp.args.StandardRestore(run.abstract_state)
        restored = manager.restore(manager.latest_step(), args=arguments)
    assert_equal(restored, jax.tree.map(np.asarray, state))
    assert int(restored.mini_step) == 1
    assert_lies_as_in_a_fresh_state(restored, run)
    updates, after = run.step(restored, params, "hadamard", steps)
    assert all(np.abs(update).max() > 0 for update in jax.tree.leaves(updates))
    assert_equal(updates, expected)
    assert_equal(after, jax.tree.map(np.asarray, expected_state))
    with compilations() as compiled:
        run.step(after, params, "hadamard", steps + 1)
    assert not compiled
