"""The benchmarks run at toy size, and count what they say they count."""

import json

import pytest

from benchmarks import hlo, peaks, step
from benchmarks.harness import environment
from muon_jax._newton_schulz import newton_schulz
from muon_jax._polynomials import resolve_schedule

pytestmark = pytest.mark.one_stack


def test_step_benchmark_measures_every_case_and_peer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peaks, "CPU_SIZES", (256,))
    output = tmp_path / "step.json"
    record = step.main(step.Args(scale=16, repeats=2, output=output))
    assert json.loads(output.read_text()) == record
    printed = capsys.readouterr().out
    for case in ("a", "b", "c"):
        assert f"({case})" in printed
        rows = record["cases"][case]["optimizers"]
        assert set(rows) == {"muon_jax", "optax", "torch", "adamw"}
        assert all(row["step_s"] > 0 and len(row["step_s_all"]) == 2 for row in rows.values())
        assert rows["optax"]["step_s_to_optax"] == 1
        assert rows["muon_jax"]["compile_s"] > 0
        assert rows["muon_jax"]["temporary_bytes"] > 0
        assert rows["adamw"]["share_of_peak"] is None
        assert rows["torch"]["share_of_peak"].keys() == record["matmul_peak_flops"].keys()
    assert record["environment"]["versions"]["jax"]


def test_a_package_that_is_not_there_is_said_to_be_missing():
    assert environment("numpy", "no_such_package")["versions"]["no_such_package"] == "not installed"


def test_newton_schulz_flops_are_those_of_the_compiled_products():
    import jax
    import jax.numpy as jnp

    shapes = {"x": (1, 256, 1024)}

    def products(x):
        for _ in range(step.NS_STEPS):
            gram = x @ x.mT
            x = (gram @ gram) @ x
        return x

    compiled = jax.jit(products).lower(jnp.ones(shapes["x"])).compile()
    counted = compiled.cost_analysis()["flops"]
    assert abs(counted / step.newton_schulz_flops(shapes) - 1) < 1e-3
    assert step.newton_schulz_flops({"x": (3, 1024, 256)}) == 3 * step.newton_schulz_flops(shapes)
    # 6 long products and 11 short ones, of 10 and 5: 35 of 45 such as the short.
    ours = step.newton_schulz_flops(shapes, "muon_jax")
    assert ours * 45 == step.newton_schulz_flops(shapes) * 35


@pytest.mark.parametrize("shape", [(2, 256, 1024), (1, 384, 1024), (1, 640, 640)])
def test_computed_flops_are_those_of_the_program_here(shape):
    """The last two are mirrored where the processor multiplies bfloat16."""
    import jax

    schedule = resolve_schedule("standard", step.NS_STEPS)
    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    counted = hlo.flops(newton_schulz.lower(x, schedule).compile().as_text())
    assert counted == step.computed_flops({"x": shape}, "muon_jax")
    assert step.computed_flops({"x": shape}, "torch") == step.newton_schulz_flops({"x": shape})
