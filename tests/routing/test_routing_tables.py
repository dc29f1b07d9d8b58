"""Which assumed matrices are taken for tables, and where the warning of them points."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

import muon_jax
from muon_jax import muon, routing_report


def reasons(**shapes):
    params = {
        path.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in shapes.items()
    }
    return {row.path: row.reason for row in routing_report(params).rows}


def is_marked(**shapes):
    first = next(iter(shapes)).replace("__", "/")
    return "maybe a table" in reasons(**shapes)[first]


@pytest.mark.parametrize(
    "leaf",
    [{"words__lookup_var": (50304, 2048)}, {"lookup__w": (32000, 4096)}, {"wcls": (2048, 50304)}],
)
def test_a_vocabulary_of_a_wide_model_is_marked(leaf):
    (shape,) = leaf.values()
    assert is_marked(**leaf, mlp__w1=(min(shape), 11008), mlp__w2=(11008, min(shape)))


def test_a_width_of_several_layers_is_no_vocabulary():
    layers = {f"{i}__mixer": (1024, 8192) for i in range(3)}
    assert not is_marked(**layers)
    assert not is_marked(a__mixer=(1024, 8192), b__other=(1024, 4096))
    assert not is_marked(a__mixer=(512, 2048))


@pytest.mark.parametrize(
    "leaf",
    [
        {"a__lora_a": (4096, 8)},
        {"moe__gate": (2048, 64)},
        {"attn__k_pe": (2048, 64)},
        {"att__time_decay_w1": (2048, 64)},
        {"linear_0__w": (2, 64)},
        {"mixer__dt_proj__weight": (8192, 256)},
    ],
)
def test_narrow_maps_known_by_name_are_not_marked(leaf):
    assert not is_marked(**leaf)


def test_the_code_of_the_warning_can_be_pasted():
    params = {'x"y': {"rows": jnp.ones((900, 8))}, "rows": jnp.ones((8, 8))}
    with pytest.warns(UserWarning, match="look like tables") as caught:
        muon(1e-3).init(params)
    code = str(caught[0].message).split("muon_weight_dimension_numbers=")[1].split(", or,")[0]
    rules = eval(code, {"muon_jax": muon_jax})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        muon(1e-3, muon_weight_dimension_numbers=rules).init(params)


def test_the_warning_points_at_the_caller():
    """In a process of its own: the tests' checks of types stand between caller and library."""
    code = (
        "import jax.numpy as jnp, muon_jax\n"
        "muon_jax.muon(1e-3).init({'rows': jnp.ones((900, 8))})  # here\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert "<string>:2: UserWarning: 1 parameter(s)" in done.stderr
