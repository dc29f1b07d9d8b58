"""States of `optax.contrib.muon` become ours, and ours become theirs, and training goes on."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, scale_by_muon

import muon_jax
from muon_jax import muon, opt_state_shardings, state_from_optax, state_to_optax
from tests.checkers import assert_close, assert_trees_equal, gaussian

RATE = optax.linear_schedule(0.1, 0.0, 100)
# Two float32 programs with their sums in another order, and a momentum that was divided by 0.05
# and multiplied by it: measured 6e-6, relative to the norm.
TOLERANCE = 5e-5
SHAPES = {"wide": (12, 30), "tall": (30, 12), "gain": (7,)}
PARAMS = {name: jnp.asarray(gaussian(shape, seed=1)) for name, shape in SHAPES.items()}


def both(**options):
    """The same optimizer of the two libraries, each behind a clip."""
    same = {"weight_decay": 0.1, "adam_weight_decay": 0.1, "adam_b2": 0.99, **options}
    ours = muon(RATE, consistent_rms=None, ns_dtype="float32", **same)
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, optax.contrib.muon(RATE, **same)), optax.chain(clip, ours)


def run(tx, steps, state=None, start=0):
    """Some steps on gradients that hang on the step alone: all updates, and the state."""
    update, state, updates = jax.jit(tx.update), tx.init(PARAMS) if state is None else state, []
    for step in range(start, start + steps):
        gradients = jax.tree.map(lambda p, k=step: jnp.sin((k + 1) * p), PARAMS)
        new, state = update(gradients, state, PARAMS)
        updates.append(new)
    return updates, state


# With Nesterov bias correction has to have died out: 0.5^30 is 1e-9.
@pytest.mark.parametrize(
    ("nesterov", "beta", "steps", "leaves"),
    [(False, 0.95, 3, ("wide", "tall", "gain")), (True, 0.5, 30, ("wide", "tall"))],
)
def test_training_goes_on(nesterov, beta, steps, leaves):
    theirs, ours = both(nesterov=nesterov, beta=beta)
    _, their_state = run(theirs, steps)
    _, our_state = run(ours, steps)
    converted = state_from_optax(their_state, ours, PARAMS, beta=beta)
    back = state_to_optax(our_state, theirs, PARAMS, beta=beta)
    # What ours would hold after the same gradients, and theirs: their structures, counts and all.
    # But for the counts these are moments, of entries that may be 0.
    for found, expected in ((converted, our_state), (back, their_state)):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(lambda f, e: assert_close(f, e, TOLERANCE), found, expected)
    expected, _ = run(theirs, 2, their_state, steps)
    by_ours, _ = run(ours, 2, converted, steps)
    by_theirs, _ = run(theirs, 2, back, steps)
    for found in (by_ours, by_theirs):
        for one, other in zip(found, expected, strict=True):
            for leaf in leaves:  # Optax gives its AdamW Nesterov too
                assert_close(one[leaf], other[leaf], TOLERANCE)


def test_there_and_back_changes_nothing():
    theirs, ours = both(beta=0.5)  # a factor of 2
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), theirs.init(PARAMS))
    there = state_from_optax(state, ours, PARAMS, beta=0.5)
    back = state_to_optax(there, theirs, PARAMS, beta=0.5)
    # Coefficients are a setting, and come from the optimizer that goes on.
    moments = lambda tree: [x for x in jax.tree.leaves(tree) if x.shape != (3,)]  # noqa: E731
    assert_trees_equal(moments(back), moments(state))


def test_a_mesh_and_a_wrapper():
    """A state of one device continues on two, in its ZeRO-1 layout."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(1e-3))
    tx = optax.chain(optax.clip_by_global_norm(1.0), muon(1e-3, mesh=mesh, mu_dtype="bfloat16"))
    state = jax.tree.map(jnp.ones_like, theirs.init(PARAMS))
    found = state_from_optax(state, tx, params, beta=0.5)
    shardings = opt_state_shardings(tx, params)
    placed = jax.tree.map(lambda x, sharding: x.sharding == sharding, found, shardings)
    assert all(jax.tree.leaves(placed))
    momentum = found[1].inner_states["muon"].inner_state[0].mu["wide"]
    assert momentum.dtype == jnp.bfloat16 and (momentum == 2).all()


def test_scale_by_muon_alone():
    params = {"wide": PARAMS["wide"]}
    theirs = scale_by_muon(weight_dimension_numbers={"wide": MuonDimensionNumbers()})
    state = theirs.init(params)._replace(count=jnp.int32(4), mu=params)
    there = state_from_optax(state, muon_jax.scale_by_muon(), params, beta=0.5)
    assert there.count == 4 and (there.mu["wide"] == 2 * params["wide"]).all()
    with pytest.raises(ValueError, match="a MuonState where tx has a MultiStepsState"):
        steps = optax.MultiSteps(muon_jax.scale_by_muon(), 2)
        state_from_optax(state, steps.gradient_transformation(), params)


def test_what_has_no_counterpart_is_refused():
    theirs, ours = both()
    state = theirs.init(PARAMS)
    with pytest.raises(ValueError, match=r"state holds no state of optax\.contrib\.muon"):
        state_from_optax(ours.init(PARAMS), ours, PARAMS)
    with pytest.raises(ValueError, match=r"tx\.init\(params\) holds no state of muon_jax\.muon"):
        state_from_optax(state, theirs, PARAMS)
    with pytest.raises(TypeError, match="tx must be the optimizer to go on with"):
        state_from_optax(state, state, PARAMS)
    with pytest.raises(ValueError, match="beta"):
        state_from_optax(state, ours, PARAMS, beta=1.0)
    embedding = {"embed": jnp.ones((12, 4)), "up": jnp.ones((4, 8))}  # Optax's Muon takes both
    with pytest.raises(ValueError, match=r"embed \(12, 4\): Muon updated it, and AdamW would now"):
        state_from_optax(theirs.init(embedding), ours, embedding)
    with pytest.raises(ValueError, match="nothing for more, shape"):
        state_from_optax(state, ours, PARAMS | {"more": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"tall has shape \(4, 12\), but its moment"):
        state_from_optax(state, ours, PARAMS | {"tall": jnp.ones((4, 12))})
    with pytest.raises(ValueError, match="wrap both optimizers alike"):
        state_from_optax(state, muon(1e-3), PARAMS)
