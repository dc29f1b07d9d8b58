"""Beside `optax.contrib.muon`: every keyword, the same updates, and the documented differences."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from optax.contrib._muon import orthogonalize_via_newton_schulz

import muon_jax
from muon_jax import muon, orthogonalize
from muon_jax._polynomials import resolve_schedule
from tests.checkers import assert_close, assert_trees_equal, gaussian, relative_error

LR, BETA = 0.02, 0.95

# Two float32 programs with their sums in another order, and Optax's 1e-8 in the norm: measured
# 4e-6, with spectral preconditioning of polar_express 1.5e-5.
TOLERANCE = 5e-5
# What a documented difference must exceed to be one.
VISIBLE = 1e-2

# Optax's own defaults, under our names.
OPTAX_VALUES = {
    "weight_decay": 0.0,
    "adam_weight_decay": 0.0,
    "adam_b2": 0.999,
    "consistent_rms": None,
    "ns_dtype": "float32",
}


def tree(seed=0):
    shapes = {"wide": (12, 30), "tall": (30, 12), "bias": (7,)}
    return {k: jnp.asarray(gaussian(s, seed + i)) for i, (k, s) in enumerate(shapes.items())}


def both(steps=1, params=None, at_step=0, momentum_scale=None, ours=(), theirs=(), **options):
    """The updates of `muon` and `optax.contrib.muon` after `steps`, given the same options.

    With `momentum_scale`, Optax's average is set to `(1 - beta)` times our sum before each step,
    late enough (`at_step`) for its bias correction to have vanished: the same momentum.
    """
    params = tree() if params is None else params
    mine = muon(LR, **{**OPTAX_VALUES, **options, **dict(ours)})
    his = optax.contrib.muon(LR, **{**options, **dict(theirs)})
    my_state, his_state = mine.init(params), his.init(params)
    if momentum_scale is not None:
        momentum = jax.tree.map(lambda p: jnp.cos(3 * p), params)
        my_state = with_momentum(my_state, momentum, 1.0, at_step)
        his_state = with_momentum(his_state, momentum, momentum_scale, at_step)
    my_step, his_step = jax.jit(mine.update), jax.jit(his.update)
    for step in range(steps):
        gradients = jax.tree.map(lambda p, k=step: jnp.sin((k + 1) * p) * 2.0 ** (k % 3), params)
        my_updates, my_state = my_step(gradients, my_state, params)
        his_updates, his_state = his_step(gradients, his_state, params)
    return my_updates, his_updates


def with_momentum(state, momentum, scale, count):
    muon_state, *rest = state.inner_states["muon"].inner_state
    mu = {**muon_state.mu, **{k: scale * momentum[k] for k in ("wide", "tall")}}
    muon_state = muon_state._replace(mu=mu, count=jnp.asarray(count, jnp.int32))
    masked = state.inner_states["muon"]._replace(inner_state=(muon_state, *rest))
    return state._replace(inner_states={**state.inner_states, "muon": masked})


def assert_same(mine, his, tolerance=TOLERANCE):
    for name in mine:
        assert_close(mine[name], his[name], tolerance, name)


# --- The signature -------------------------------------------------------------------------------


def test_every_keyword_is_accepted():
    theirs = inspect.signature(optax.contrib.muon).parameters
    ours = inspect.signature(muon).parameters
    assert not theirs.keys() - ours.keys()
    values = {k: p.default for k, p in theirs.items() if p.default is not p.empty}
    muon(LR, **values).init(tree())


def test_every_keyword_of_scale_by_muon_but_eps_is_accepted():
    theirs = inspect.signature(optax.contrib.scale_by_muon).parameters
    assert theirs.keys() - inspect.signature(muon_jax.scale_by_muon).parameters.keys() == {"eps"}


# --- The iteration -------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_orthogonalization(name, preconditioning):
    coefficients = jnp.asarray(resolve_schedule(name))
    for shape in [(12, 30), (30, 12)]:
        x = jnp.asarray(gaussian(shape))
        theirs = orthogonalize_via_newton_schulz(x, coefficients, preconditioning=preconditioning)
        ours = orthogonalize(x, name, preconditioning=preconditioning, ns_dtype="float32")
        assert_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol"])
def test_complex_orthogonalization(preconditioning):
    x = jnp.asarray(gaussian((12, 30), dtype=np.complex64))
    coefficients = jnp.asarray(resolve_schedule("standard"))
    theirs = orthogonalize_via_newton_schulz(x, coefficients, preconditioning=preconditioning)
    assert_close(orthogonalize(x, preconditioning=preconditioning), theirs, TOLERANCE)


# --- The same momentum, the same update ----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"consistent_rms": 0.2},
        {"weight_decay": 0.1, "adam_weight_decay": 0.05},
        {"ns_coeffs": "dion"},
        {"ns_steps": 3, "beta": 0.8, "adam_b1": 0.8, "adam_eps_root": 1e-6},
        {"adam_learning_rate": 0.3},
    ],
    ids=str,
)
def test_without_nesterov_six_steps_are_equal(options):
    """Then Optax's average is our sum times a factor, at every step."""
    assert_same(*both(steps=6, nesterov=False, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"consistent_rms": 0.2},
        {"preconditioning": "aol"},
        {"preconditioning": "schatten", "ns_coeffs": ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))},
        {"adaptive": True},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_with_nesterov_from_the_same_momentum(options):
    mine, his = both(momentum_scale=1 - BETA, at_step=10_000, **options)
    assert_same({k: mine[k] for k in ("wide", "tall")}, {k: his[k] for k in ("wide", "tall")})


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_dimension_numbers_mean_the_same(consistent_rms):
    """Batch axes, joined axes and a swapped fan-in and fan-out, in Optax's own type."""
    params = {"q": jnp.asarray(gaussian((8, 2, 4))), "stack": jnp.asarray(gaussian((3, 5, 6)))}
    numbers = {"q": MuonDimensionNumbers(0, (1, 2)), "stack": MuonDimensionNumbers(2, 1)}
    mine, his = both(
        params=params,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=numbers,
    )
    assert_same(mine, his)


# --- The documented differences, both sides of each ----------------------------------------------


def test_difference_1_momentum_is_a_heavy_ball():
    """The sum against the bias-corrected average: the second step differs, the state by far."""
    mine, his = both(steps=2)
    assert relative_error(mine["wide"], his["wide"]) > VISIBLE
    params = tree()
    ours, theirs = muon(LR), optax.contrib.muon(LR)
    _, my_state = jax.jit(ours.update)(params, ours.init(params), params)
    _, his_state = jax.jit(theirs.update)(params, theirs.init(params), params)
    my_mu = my_state.inner_states["muon"].inner_state[0].mu["wide"]
    his_mu = his_state.inner_states["muon"].inner_state[0].mu["wide"]
    assert_trees_equal(my_mu, params["wide"])
    assert_close(his_mu, (1 - BETA) * params["wide"], 1e-6)


def test_difference_1_adaptive_matrix_by_matrix():
    """Ours scales each matrix of a stack by its own dual norm, Optax's by that of the stack."""
    stack = gaussian((2, 6, 9)) * np.float32([[[1]], [[100]]])
    params = {"experts": jnp.asarray(stack)}
    numbers = {"experts": MuonDimensionNumbers(1, 2)}
    options = {"adaptive": True, "muon_weight_dimension_numbers": numbers, "beta": 0.0}
    mine, his = both(params=params, **options)
    alone = {"experts": params["experts"][:1]}
    my_first, his_first = both(params=alone, **options)
    assert_close(mine["experts"][:1], my_first["experts"], TOLERANCE)
    assert relative_error(his["experts"][:1], his_first["experts"]) > VISIBLE
    assert_same(my_first, his_first)


def test_difference_2_eps_is_adams_only():
    mine, his = both(nesterov=False)
    my_eps, his_eps = both(nesterov=False, eps=10.0)
    assert_trees_equal(my_eps["wide"], mine["wide"])
    assert relative_error(his_eps["wide"], his["wide"]) > VISIBLE
    assert relative_error(my_eps["bias"], mine["bias"]) > VISIBLE
    assert_close(my_eps["bias"], his_eps["bias"], TOLERANCE)


def test_difference_3_nesterov_is_muons_only():
    params = {"bias": tree()["bias"]}
    mine, his = both(steps=3, params=params)

    def adam(nesterov):
        tx = optax.adamw(LR, weight_decay=0.0, nesterov=nesterov)
        state = tx.init(params)
        for k in range(3):
            gradients = jax.tree.map(lambda p, k=k: jnp.sin((k + 1) * p) * 2.0**k, params)
            updates, state = jax.jit(tx.update)(gradients, state, params)
        return updates["bias"]

    assert_close(mine["bias"], adam(nesterov=False), 1e-6)
    assert_close(his["bias"], adam(nesterov=True), 1e-6)
    assert relative_error(mine["bias"], his["bias"]) > VISIBLE


def zero_gradient_updates(tx, params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.jit(tx.update)(zeros, tx.init(params), params)[0]


def test_difference_4_the_mask_covers_both_groups():
    params = tree()
    options = {"weight_decay": 0.1, "adam_weight_decay": 0.1}
    options["weight_decay_mask"] = {"wide": False, "tall": True, "bias": False}
    mine = zero_gradient_updates(muon(LR, **options), params)
    # Optax's Adam group gets no mask; its Muon group wants one without the leaves of the other.
    options["weight_decay_mask"] = lambda p: {
        k: v if k != "bias" else optax.MaskedNode() for k, v in dict.fromkeys(p, False).items()
    }
    his = zero_gradient_updates(optax.contrib.muon(LR, **options), params)
    assert not jnp.any(mine["bias"]) and not jnp.any(mine["wide"]) and jnp.all(mine["tall"])
    assert jnp.all(his["bias"]) and not jnp.any(his["wide"])


@pytest.mark.parametrize("kind", ["function", "prefix"])
def test_difference_4_mask_as_a_function_or_a_prefix(kind):
    params = {"kept": tree(), "decayed": tree(1)}
    mask = {"kept": False, "decayed": True}
    given = mask if kind == "prefix" else lambda p: jax.tree.map(lambda _: True, p) | mask
    updates = zero_gradient_updates(muon(LR, weight_decay_mask=given), params)
    assert not any(jnp.any(u) for u in updates["kept"].values())
    assert all(jnp.all(u) for u in updates["decayed"].values())


def test_difference_4_adam_follows_the_weight_decay():
    params = tree()
    mine = zero_gradient_updates(muon(LR, weight_decay=0.1), params)
    his = zero_gradient_updates(optax.contrib.muon(LR, weight_decay=0.1), params)
    np.testing.assert_allclose(mine["bias"], -LR * 0.1 * params["bias"], rtol=1e-6)
    assert not jnp.any(his["bias"])
    separate = zero_gradient_updates(muon(LR, weight_decay=0.1, adam_weight_decay=0.0), params)
    assert not jnp.any(separate["bias"]) and jnp.all(separate["wide"])


def test_difference_5_leaves_are_routed_by_role():
    """Optax orthogonalizes embeddings and biases of heads, not attention, by ``ndim == 2``."""
    params = {
        "embed": {"embedding": jnp.asarray(gaussian((12, 8)))},
        "query": {"kernel": jnp.asarray(gaussian((8, 2, 4))), "bias": jnp.zeros((2, 4))},
    }

    def muon_leaves(tx):
        state = tx.init(params).inner_states["muon"].inner_state[0]
        return [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(state.mu)]

    assert muon_leaves(muon(LR)) == ["['query']['kernel']"]
    assert muon_leaves(optax.contrib.muon(LR)) == ["['embed']['embedding']", "['query']['bias']"]


# --- What Optax cannot do, and we say we can -----------------------------------------------------


@pytest.mark.parametrize("exponent", [-50, 100])
def test_tiny_and_huge_gradients(exponent):
    """Optax's 1e-8 in the norm shrinks tiny updates, and its norm overflows."""
    x = jnp.asarray(gaussian((12, 30)))
    scaled = x * 2.0**exponent
    ours = orthogonalize(scaled, ns_dtype="float32")
    assert_trees_equal(ours, orthogonalize(x, ns_dtype="float32"))
    coefficients = jnp.asarray(resolve_schedule("standard"))
    theirs = orthogonalize_via_newton_schulz(scaled, coefficients)
    assert relative_error(theirs, ours) > 0.9


def test_defaults_are_moonlights():
    defaults = {k: p.default for k, p in inspect.signature(muon).parameters.items()}
    expected = {
        "weight_decay": 0.1,
        "consistent_rms": 0.2,
        "beta": 0.95,
        "nesterov": True,
        "adam_b1": 0.9,
        "adam_b2": 0.95,
        "adam_weight_decay": None,
        "adam_learning_rate": None,
        "ns_coeffs": "standard",
        "ns_steps": None,
        "ns_dtype": "bfloat16",
    }
    assert {k: defaults[k] for k in expected} == expected
    assert math.isclose(defaults["eps"], 1e-8)
