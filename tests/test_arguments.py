"""Bad arguments raise where they are given, with the remedy; docstrings agree with signatures."""

import doctest
import importlib
import inspect
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


@pytest.mark.parametrize("name", ["ns_steps", "max_group_bytes", "ns_coeffs"])
def test_traced_shape_arguments_raise_with_the_remedy(untyped, name):
    def build(value):
        muon(1e-3, **{name: value})
        return value

    with pytest.raises(TypeError, match="static_args"):
        jax.jit(build)(jnp.ones(3) if name == "ns_coeffs" else 5)


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


def test_orthogonalize_refuses_vectors_and_integers(untyped):
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        orthogonalize(jnp.ones(3))
    with pytest.raises(TypeError, match="got dtype int32"):
        orthogonalize(jnp.ones((3, 3), jnp.int32))


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


MODULES = sorted(f"muon_jax.{module.name}" for module in pkgutil.iter_modules(muon_jax.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {name: getattr(muon_jax, name) for name in muon_jax.__all__}
    result = doctest.testmod(module, extraglobs={**names, "jax": jax, "jnp": jnp, "optax": optax})
    assert result.failed == 0


def test_every_public_name_is_documented():
    for name in muon_jax.__all__:
        value = getattr(muon_jax, name)
        assert not callable(value) or inspect.getdoc(value), name
