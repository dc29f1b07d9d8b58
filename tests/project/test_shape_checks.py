"""Tests check the shape annotations of the library: see `tests/conftest.py`."""

import importlib
import pkgutil

import jax.numpy as jnp
import jaxtyping
import pytest

import muon_jax
from muon_jax._newton_schulz import newton_schulz


def test_a_wrong_shape_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="batch rows cols"):
        newton_schulz(jnp.ones((2, 2)), ((1.0, 0.0, 0.0),))


def test_every_module_that_annotates_shapes_is_checked():
    checked = 0
    for found in pkgutil.walk_packages(muon_jax.__path__, "muon_jax."):
        if found.name == "muon_jax.__main__":
            continue
        module = importlib.import_module(found.name)
        annotates = any(getattr(x, "__module__", "") == "jaxtyping" for x in vars(module).values())
        wrapped = "Jaxtyping" in type(module.__loader__).__name__
        assert annotates == wrapped, found.name
        checked += wrapped
    assert checked > 20
