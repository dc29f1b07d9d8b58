"""Bad arguments raise where they are given, with the remedy; docstrings agree with signatures."""

import doctest
import functools
import importlib
import inspect
import math
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Dims

import muon_jax
from muon_jax import (
    AdjustedLR,
    FixedScale,
    FusedBlocks,
    UpdateNorm,
    muon,
    orthogonalize,
    scale_by_muon,
)


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        (
            {"learning_rate": -1e-3},
            ValueError,
            "at least 0, finite; got -0.001",
        ),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be .*got nan"),
        ({"learning_rate": jnp.inf}, ValueError, "learning_rate must be .*got inf"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number or a schedule"),
        ({"learning_rate": None}, TypeError, "learning_rate must be a number or a schedule"),
        ({"adam_learning_rate": -1.0}, ValueError, "adam_learning_rate"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"weight_decay": [0.1, 0.2]}, TypeError, "weight_decay must be a number"),
        ({"adam_weight_decay": -0.1}, ValueError, "adam_weight_decay"),
        ({"beta": 1.0}, ValueError, "beta must be at least 0 and below 1; got 1.0"),
        ({"beta": -0.5}, ValueError, "beta must be"),
        ({"beta": True}, TypeError, "beta must be a number"),
        ({"adam_b1": 1.5}, ValueError, "adam_b1"),
        ({"adam_b2": 1.0}, ValueError, "adam_b2"),
        ({"eps": -1e-8}, ValueError, "eps"),
        ({"adam_eps_root": -1.0}, ValueError, "adam_eps_root"),
        ({"consistent_rms": -0.2}, ValueError, "consistent_rms must be at least 0"),
        ({"ns_steps": 0}, ValueError, "whole number of at least 1"),
        ({"ns_steps": 2.5}, ValueError, "whole number of at least 1"),
        ({"ns_steps": True}, ValueError, "whole number of at least 1"),
        ({"ns_coeffs": "cubic"}, ValueError, "Unknown Newton-Schulz schedule 'cubic'; known are"),
        ({"ns_coeffs": "dion", "ns_steps": 4}, ValueError, "ns_steps=4 contradicts .* 5 steps"),
        ({"ns_coeffs": "deepseek_v4", "ns_steps": 5}, ValueError, "has 10 steps"),
        ({"ns_coeffs": [(1, 2, 3)], "ns_steps": 2}, ValueError, "has 1 steps"),
        ({"ns_coeffs": (1.0, 2.0)}, ValueError, r"values of shape \(2,\)"),
        ({"ns_coeffs": []}, ValueError, "one .a, b, c. per step"),
        ({"ns_coeffs": [(1, 2), (1, 2, 3)]}, ValueError, "one .a, b, c. per step; got"),
        ({"ns_coeffs": (1.0, np.nan, 0.0)}, ValueError, "must be finite"),
        (
            {"preconditioning": "l2"},
            ValueError,
            "'l2'; known are frobenius, spectral",
        ),
        ({"ns_dtype": "float16"}, ValueError, "float16 is not offered"),
        ({"ns_dtype": "int8"}, ValueError, "ns_dtype must be one of"),
        ({"ns_dtype": "float64"}, ValueError, "jax_enable_x64"),
        ({"ns_dtype": "half-ish"}, TypeError, "ns_dtype must be a dtype"),
        ({"mu_dtype": jnp.int32}, ValueError, "mu_dtype must be a floating-point dtype"),
        ({"max_group_bytes": 0}, ValueError, "positive whole number of bytes"),
        ({"ns_steps": float("nan")}, ValueError, "whole number of at least 1"),
        ({"max_group_bytes": "1GB"}, ValueError, "positive whole number of bytes"),
        ({"update_scale": AdjustedLR(-0.2)}, ValueError, "rms of AdjustedLR must be"),
        ({"update_scale": UpdateNorm(-1.0)}, ValueError, "rms of UpdateNorm must be"),
        ({"update_scale": FixedScale(np.nan)}, ValueError, "value of FixedScale must be"),
        ({"update_scale": AdjustedLR}, TypeError, "update_scale must be AdjustedLR"),
        ({"heads": "both"}, ValueError, "got 'both'"),
        ({"max_group_bytes": 1.5}, ValueError, "positive whole number of bytes"),
        ({"nesterov": "no"}, TypeError, "nesterov must be True or False; got 'no'"),
        ({"nesterov": None}, TypeError, "nesterov must be True or False; got None"),
        ({"nesterov": 0}, TypeError, "nesterov must be True or False; got 0"),
        ({"adaptive": "false"}, TypeError, "adaptive must be True or False; got 'false'"),
        ({"adaptive": 1.0}, TypeError, "adaptive must be True or False; got 1.0"),
        ({"adaptive": np.ones(2, bool)}, TypeError, "adaptive must be True or False"),
        ({"learning_rate": np.ones(1)}, TypeError, r"learning_rate must be .* shape \(1,\)"),
        ({"weight_decay": jnp.ones(2)}, TypeError, r"weight_decay must be .* shape \(2,\)"),
        ({"beta": np.complex64(0.9)}, TypeError, "beta must be a number.* complex64"),
        ({"eps": np.bool_(True)}, TypeError, "eps must be a number.* bool"),
        ({"learning_rate": jax.random.key(0)}, TypeError, "learning_rate must be .*key<fry>"),
        ({"learning_rate": lambda: 1.0}, TypeError, "learning_rate must take the count of steps"),
        (
            {"weight_decay": lambda a, b: 1.0},
            TypeError,
            "weight_decay must take the count of steps",
        ),
        ({"update_scale": lambda: 1.0}, TypeError, r"must take \(fan_in, fan_out\); .*takes \(\)"),
        ({"update_scale": lambda shape: 1.0}, TypeError, r"update_scale must .*takes \(shape\)"),
        ({"update_scale": AdjustedLR(np.ones(1))}, TypeError, "rms of AdjustedLR must be a number"),
    ],
)
def test_bad_options_raise_when_given(untyped, options, error, why):
    with pytest.raises(error, match=why):
        muon(**{"learning_rate": 1e-3, **options})


def test_good_edges_are_accepted():
    muon(0.0, weight_decay=0, beta=0.0, eps=0.0, ns_steps=3, consistent_rms=jnp.float32(1))
    scheduled = muon(optax.constant_schedule(1e-3), weight_decay=optax.constant_schedule(0.1))
    assert scheduled.init(jnp.ones((2, 2))) is not None
    muon(np.float64(1e-3), ns_coeffs=np.ones((2, 3)), ns_steps=2)
    muon(jnp.asarray(1e-3), ns_coeffs=jnp.ones(3), ns_steps=7)


def test_booleans_of_numpy_and_of_jax_are_accepted(untyped):
    muon(1e-3, nesterov=np.bool_(False), adaptive=jnp.asarray(True), update_scale=math.hypot)
    params = jnp.asarray([[1.0, 2.0], [3.0, 5.0]])

    def update(**options):
        injected = optax.inject_hyperparams(muon)(1e-3, **options)
        return jax.jit(injected.update)(params, injected.init(params), params)[0]

    taken = update(nesterov=np.bool_(False), adaptive=True)
    assert jnp.array_equal(taken, update(nesterov=False, adaptive=True))
    assert not jnp.array_equal(taken, update(nesterov=True, adaptive=True))


@pytest.mark.parametrize("name", ["ns_steps", "max_group_bytes", "ns_coeffs"])
def test_traced_shape_arguments_raise_with_the_remedy(untyped, name):
    def build(value):
        muon(1e-3, **{name: value})
        return value

    with pytest.raises(TypeError, match="static_args"):
        jax.jit(build)(jnp.ones(3) if name == "ns_coeffs" else 5)


@pytest.mark.parametrize("name", ["nesterov", "adaptive"])
def test_a_traced_boolean_raises_with_the_remedy(untyped, name):
    with pytest.raises(TypeError, match=f'{name} shapes the compiled.*static_args=."{name}",'):
        jax.jit(lambda value: muon(1e-3, **{name: value}) and value)(True)


@pytest.mark.parametrize(
    ("factor", "why"),
    [
        ("big", "must be a number; got 'big'"),
        (None, "must be a number; got None"),
        ((0.1, 0.2), "must be a number; got"),
        (jnp.ones(4), r"must be a number; got an array of shape \(4,\)"),
        (1j, "must be a number; got 1j"),
    ],
)
def test_a_scale_that_is_no_number_raises_in_init(untyped, factor, why):
    params = {"layer": {"kernel": jnp.ones((4, 6))}}
    why = rf"update_scale\(4, 6\), the factor of layer/kernel, {why}"
    for make in (muon, scale_by_muon):
        rate = {"learning_rate": 1e-3} if make is muon else {}
        with pytest.raises(TypeError, match=why):
            make(**rate, update_scale=lambda fan_in, fan_out: factor).init(params)


def test_a_scale_out_of_range_raises_in_init_and_in_the_report():
    for value in (-1.0, np.nan, np.inf):

        def scale(fan_in, fan_out, value=value):
            return value

        with pytest.raises(ValueError, match=r"update_scale\(4, 6\).*at least 0, finite; got"):
            muon(1e-3, update_scale=scale).init(jnp.ones((4, 6)))
        with pytest.raises(ValueError, match=r"update_scale\(4, 6\).*at least 0, finite; got"):
            muon_jax.routing_report(jnp.ones((4, 6)), update_scale=scale)


@pytest.mark.parametrize(
    "name", ["learning_rate", "adam_learning_rate", "weight_decay", "adam_weight_decay"]
)
def test_a_schedule_that_returns_no_number_raises(untyped, name):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    for wrong in ("fast", None, jnp.ones(3), True, 1j):
        tx = muon(**{"learning_rate": 1e-3, name: lambda count, wrong=wrong: wrong})
        with pytest.raises(TypeError, match=f"{name}, a schedule, must return a number; it retur"):
            jax.jit(tx.update)(params, tx.init(params), params)


def test_states_of_other_transformations_raise():
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match="muon was given a state of type tuple; expected the one"):
        muon(1e-3).update(params, optax.adam(1e-3).init(params), params)
    with pytest.raises(TypeError, match="scale_by_muon was given a state of type EmptyState"):
        scale_by_muon().update(params, optax.EmptyState())
    with pytest.raises(TypeError, match="opt_state_shardings takes an optimizer, not its state"):
        muon_jax.opt_state_shardings(muon(1e-3).init(params), params)


# --- masks ----------------------------------------------------------------------------------

PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(3)}


@pytest.mark.parametrize(
    ("mask", "error", "why"),
    [
        ("no", TypeError, r"mask has 'no' at \(the whole tree\); expected True .decays. or"),
        (0.0, TypeError, r"mask has 0.0 at \(the whole tree\)"),
        ({"dense": "yes", "scale": "no"}, TypeError, "mask has 'yes' at dense; expected True"),
        ({"dense": True, "scale": 0.0}, TypeError, "mask has 0.0 at scale; expected True"),
        (
            {"dense": True, "scale": jnp.asarray(False)},
            TypeError,
            "mask has .*False.* at scale; expected True .*from names and shapes, not from values",
        ),
        ({"dense": True}, ValueError, "mask says nothing of scale. It is a tree like"),
        ({"dense": True, "scale": None}, ValueError, "mask has None at scale. It is a tree like"),
        (
            {"dense": True, "scale": True, "head": False},
            ValueError,
            "mask speaks of head, which is no parameter; the parameters are dense/bias, dense/ker",
        ),
        ({"dense": [True, False], "scale": True}, ValueError, "mask says nothing of dense/bias"),
    ],
)
@pytest.mark.parametrize("as_function", [False, True], ids=["a tree", "a function"])
def test_masks_of_anything_but_booleans_raise(mask, error, why, as_function):
    tx = muon(1e-3, weight_decay_mask=(lambda params: mask) if as_function else mask)
    with pytest.raises(error, match=f"weight_decay_{why}"):
        tx.init(PARAMS)
    with pytest.raises(error, match=f"weight_decay_{why}"):
        jax.jit(tx.update)(PARAMS, muon(1e-3, weight_decay_mask=True).init(PARAMS), PARAMS)


@pytest.mark.parametrize("make", [muon, scale_by_muon])
def test_inject_hyperparams_does_not_take_every_function_for_a_schedule(make):
    """It would call them with the count of steps, and a mask would then be False for all leaves."""
    rate = {"learning_rate": 1.0, "weight_decay": 0.5} if make is muon else {}
    params = {"w": jnp.ones((2, 3)), **({"v": jnp.ones(3)} if make is muon else {})}
    numbers = "muon_weight_dimension_numbers" if make is muon else "weight_dimension_numbers"
    options = {
        "update_scale": lambda fan_in, fan_out: fan_in / fan_out,
        numbers: lambda p: jax.tree.map(lambda x: Dims(1, 0) if x.ndim > 1 else None, p),
    }
    if make is muon:
        options["weight_decay_mask"] = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    plain, injected = make(**rate, **options), optax.inject_hyperparams(make)(**rate, **options)
    expected, _ = jax.jit(plain.update)(params, plain.init(params), params)
    updates, _ = jax.jit(injected.update)(params, injected.init(params), params)
    jax.tree.map(np.testing.assert_allclose, updates, expected)
    if make is muon:
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = injected.update(zeros, injected.init(params), params)
        assert jax.tree.map(lambda x: bool(x.any()), updates) == {"w": True, "v": False}


def decayed(mask, params):
    """Which leaves decay, where gradients are zero."""
    tx = muon(1.0, weight_decay=0.5, weight_decay_mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    return jax.tree.map(lambda x: bool(x.any()), updates)


def test_masks_are_trees_prefixes_functions_and_numpy_booleans():
    expected = {"dense": {"kernel": True, "bias": True}, "scale": False}
    for mask in (
        expected,
        {"dense": True, "scale": np.bool_(False)},
        lambda params: {"dense": np.bool_(True), "scale": False},
    ):
        assert decayed(mask, PARAMS) == expected
    assert decayed([True, False], [jnp.ones((2, 3)), jnp.ones(3)]) == [True, False]
    assert decayed(False, jnp.ones((2, 3))) is False
    holes = {"w": jnp.ones((2, 3)), "none": None}
    assert decayed({"w": True, "none": False}, holes) == {"w": True, "none": None}
    assert decayed({"w": True, "none": None}, holes) == {"w": True, "none": None}


def test_a_mask_of_the_whole_model_serves_a_part_of_it():
    mask = {"dense": {"kernel": True, "bias": False}, "scale": True}
    tx = optax.partition(
        {"muon": muon(1.0, weight_decay_mask=mask), "frozen": optax.set_to_zero()},
        {"dense": "muon", "scale": "frozen"},
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(PARAMS), PARAMS)
    assert jax.tree.map(lambda x: bool(x.any()), updates) == {
        "dense": {"kernel": True, "bias": False},
        "scale": False,
    }


def test_a_mask_of_a_tree_serves_flax_in_init_and_update():
    """NNX wraps the same leaves differently in the two."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = muon(1.0, weight_decay=0.5, weight_decay_mask={"kernel": False, "bias": True})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    model.bias[...] = jnp.ones(2)
    kernel = jnp.copy(model.kernel[...])
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(model.kernel[...], kernel)
    np.testing.assert_array_equal(model.bias[...], 0.5 * jnp.ones(2))


# --- specs of parameters ----------------------------------------------------------------------


def make_mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ({"dense": P(), "scale": P(), "head": P("data")}, "head"),
        (
            {"dense": {"kernel": P(), "bias": P(), "kernal": P("data")}, "scale": P()},
            "dense/kernal",
        ),
    ],
)
def test_specs_of_parameters_that_are_not_there_raise(specs, named):
    mesh = make_mesh()
    tx = muon(1e-3, mesh=mesh, param_specs=specs)
    state = muon(1e-3, mesh=mesh, param_specs=P()).init(PARAMS)
    for call in (
        lambda: tx.init(PARAMS),
        lambda: jax.jit(tx.update)(PARAMS, state, PARAMS),
        lambda: muon_jax.sharding_report(PARAMS, mesh=mesh, param_specs=specs),
    ):
        with pytest.raises(ValueError, match=f"speaks of {named}, which is no .* are dense/bias"):
            call()


def test_specs_of_anything_but_names_raise():
    with pytest.raises(
        TypeError, match=r"scale, shape .*param_specs is .* names of mesh .*not 1.5"
    ):
        muon(1e-3, mesh=make_mesh(), param_specs={"dense": P(), "scale": P(1.5)}).init(PARAMS)


def test_specs_of_the_whole_model_serve_a_part_of_it():
    mesh = make_mesh()
    specs = {"dense": {"kernel": P(), "bias": P()}, "scale": P(), "none": P()}
    tx = optax.partition(
        {"muon": muon(1e-3, mesh=mesh, param_specs=specs), "frozen": optax.set_to_zero()},
        {"dense": "muon", "scale": "frozen", "none": "muon"},
    )
    params = PARAMS | {"none": None}
    jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.leaves(muon_jax.opt_state_shardings(tx, params))


def test_trees_of_specs_and_masks_do_not_mind_the_placeholder_of_tree_map_params():
    specs, mask = {"dense": P(), "scale": P()}, {"dense": True, "scale": False}
    tx = muon(1e-3, mesh=make_mesh(), param_specs=specs, weight_decay_mask=mask)
    state = tx.init(PARAMS)
    assert jax.tree.structure(optax.tree_map_params(tx, lambda x: x, state)) == jax.tree.structure(
        state
    )


# --- states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: muon(lambda step: 1e-3), scale_by_muon])
def test_no_state_is_weakly_typed(make):
    state = make().init({"w": jnp.ones((2, 3)) * 2.0, "list": [jnp.ones((3, 2))]})
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    full = {"w": jnp.full((2, 3), 1.0), "half": jnp.full((2, 3), 1.0, jnp.bfloat16)}  # weak
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(make().init(full)))


@pytest.mark.parametrize("name", ["ns_dtype", "mu_dtype"])
def test_a_dtype_called_as_a_schedule_raises_with_the_remedy(untyped, name):
    tx = optax.inject_hyperparams(muon)(1e-3, **{name: jnp.bfloat16})
    with pytest.raises(TypeError, match=f'{name}="bfloat16"'):
        tx.init(jnp.ones((2, 2)))
    named = optax.inject_hyperparams(muon)(1e-3, **{name: "bfloat16"})
    assert "learning_rate" in named.init(jnp.ones((2, 2))).hyperparams


def test_update_without_params_raises():
    tx = muon(1e-3)
    state = tx.init(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(jnp.ones((2, 2)), state)


def test_scale_by_muon_refuses_what_belongs_to_adamw():
    with pytest.raises(ValueError, match=r"given bias, shape \(3,\) \(bias\).*optax.partition"):
        scale_by_muon().init({"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)})


def test_gradients_of_another_shape_or_structure_raise():
    tx = scale_by_muon()
    state = tx.init({"kernel": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"kernel: its gradient has shape \(4, 3\)"):
        tx.update({"kernel": jnp.ones((4, 3))}, state)
    with pytest.raises(ValueError, match="tree differs from that of the parameters"):
        tx.update({"other": jnp.ones((3, 4))}, state)


@pytest.mark.parametrize(
    ("path", "gradient", "error", "why"),
    [
        ("kernel", jnp.ones((4, 3)), ValueError, r"kernel: its gradient has shape \(4, 3\)"),
        ("bias", jnp.ones((1,)), ValueError, r"bias: its gradient has shape \(1,\)"),
        ("kernel", jnp.ones((3, 4), jnp.int32), TypeError, "kernel: its gradient has dtype int32"),
        ("bias", jnp.ones(4, jnp.complex64), TypeError, "bias: its gradient has dtype complex64"),
        (
            "bias",
            jnp.ones(4, jnp.float8_e5m2),
            TypeError,
            "bias: its gradient has dtype float8_e5m2",
        ),
        ("kernel", jax.random.split(jax.random.key(0), (3, 4)), TypeError, "kernel: .*key<fry>"),
    ],
)
def test_gradients_that_do_not_fit_raise_in_both_groups(path, gradient, error, why):
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    tx = muon(1e-3)
    with pytest.raises(error, match=why):
        tx.update({**params, path: gradient}, tx.init(params), params)
    with pytest.raises(ValueError, match="tree differs from that of the parameters"):
        tx.update({path: gradient}, tx.init(params), params)


def test_fused_sizes_are_a_list(untyped):
    assert FusedBlocks([1, 2]) == FusedBlocks((1, 2))
    with pytest.raises(TypeError, match="lists the length of each block; got 4"):
        FusedBlocks(4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sizes": (4.0, 4.0)}, r"sizes must be whole numbers; got \(4.0, 4.0\)"),
        ({"sizes": "44"}, "sizes must be whole numbers; got '44'"),
        ({"sizes": (True, 4)}, "sizes must be whole numbers"),
        ({"sizes": (4, 4), "axis": "1"}, "axis must be one axis, an integer; got '1'"),
        ({"sizes": (4, 4), "axis": 1.0}, "axis must be one axis, an integer; got 1.0"),
        ({"sizes": (4, 4), "dimension_numbers": (0, 1)}, r"MuonDimensionNumbers .*got \(0, 1\)"),
    ],
)
def test_fused_blocks_of_anything_but_integers_raise(untyped, options, why):
    with pytest.raises(TypeError, match=f"FusedBlocks.*{why}"):
        FusedBlocks(**options)


def test_orthogonalize_refuses_vectors_and_integers(untyped):
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        orthogonalize(jnp.ones(3))
    with pytest.raises(TypeError, match="got dtype int32"):
        orthogonalize(jnp.ones((3, 3), jnp.int32))
    for wrong in ({"w": jnp.ones((3, 3))}, None, "w"):
        for function in (orthogonalize, muon_jax.svd_entropy, muon_jax.orthogonality_error):
            with pytest.raises(TypeError, match=f"{function.__name__} takes one array; got"):
                function(wrong)


def test_diagnostics_of_trees_that_do_not_fit_raise(untyped):
    params = {"w": jnp.ones((2, 3))}
    measure = functools.partial(muon_jax.map_matrices, muon_jax.svd_entropy)
    for function in (measure, muon_jax.rms_by_optimizer):
        with pytest.raises(ValueError, match="The tree differs from that of params"):
            function({"v": jnp.ones((2, 3))}, params)
        with pytest.raises(ValueError, match=r"w has shape \(6,\) in the tree, and \(2, 3\)"):
            function({"w": jnp.ones(6)}, params)
    with pytest.raises(TypeError, match=r"takes a function of matrices first; got \{"):
        muon_jax.map_matrices(params, muon_jax.svd_entropy, params)
    with pytest.raises(TypeError, match="update_rms, at w, takes one array; got 'x'"):
        muon_jax.update_rms({"w": "x"})
    assert muon_jax.update_rms({"w": 2.0, "none": None}) == {"w": 2.0, "none": None}


# --- documentation that cannot drift --------------------------------------------------------

FUNCTIONS = [
    getattr(muon_jax, name)
    for name in muon_jax.__all__
    if inspect.isfunction(getattr(muon_jax, name))
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_documented_arguments_are_those_of_the_signature(function):
    section = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(function), re.DOTALL)
    documented = re.findall(r"^  \**(\w+):", section.group(1), re.MULTILINE)
    assert documented == list(inspect.signature(function).parameters)


MODULES = sorted(found.name for found in pkgutil.walk_packages(muon_jax.__path__, "muon_jax."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {name: getattr(muon_jax, name) for name in muon_jax.__all__}
    result = doctest.testmod(module, extraglobs={**names, "jax": jax, "jnp": jnp, "optax": optax})
    assert result.failed == 0


def test_every_public_name_is_documented_with_an_example():
    # A tuple, and Optax's own: docs/api has theirs.
    for name in {*muon_jax.__all__} - {"SCHEDULES", "MuonDimensionNumbers"}:
        text = inspect.getdoc(getattr(muon_jax, name)) or ""
        assert re.search(r"^Examples:\n(.*\n)*?  >>> ", text, re.M), name
