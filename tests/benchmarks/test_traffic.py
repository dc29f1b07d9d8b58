"""Bytes read and written, counted by hand and in compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.hlo.traffic import traffic
from benchmarks.traffic import steps
from benchmarks.traffic.__main__ import Args, main

MiB = 2**20


def total(function, *args):
    return sum(traffic(jax.jit(function).lower(*args).compile().as_text() or "").values())


def test_an_elementwise_program_reads_and_writes_once():
    x = jnp.zeros(MiB)
    assert total(lambda x, y: 2 * x + y, x, x) == 3 * 4 * MiB


def test_a_loop_counts_as_often_as_it_runs():
    x = jnp.zeros((MiB,))

    def looped(x, times):
        body = lambda i, x: lax.optimization_barrier(jnp.sin(x))  # noqa: E731
        return lax.fori_loop(0, times, body, x)

    once = total(lambda x: looped(x, 3), x)
    twice = total(lambda x: looped(x, 6), x)
    assert twice - once == pytest.approx(3 * 2 * 4 * MiB, rel=0.01)


def test_an_update_in_place_touches_its_part():
    x, part = jnp.zeros((64, 1024)), jnp.ones((1, 1024))
    update = lambda x, part: lax.dynamic_update_slice(x, part, (3, 0))  # noqa: E731
    program = jax.jit(update, donate_argnums=0).lower(x, part).compile().as_text()
    # Beside the part, some compilers read its two indices.
    assert 2 * part.nbytes <= sum(traffic(program or "").values()) <= 2 * part.nbytes + 8


def test_what_lies_beside_the_main_memory_costs_its_way_there():
    text = """HloModule m
ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)
  %t = f32[8,128]{1,0:T(8,128)S(1)} add(%d, %d)
  ROOT %r = f32[8,128]{1,0:T(8,128)} negate(%t)
}
"""
    assert sum(traffic(text).values()) == 2 * 8 * 128 * 4


def test_adamw_moves_what_it_must():
    """Of each element 4 bytes of gradient, 8 of both moments and the parameter; CPUs read twice."""
    found = steps.count("adamw", {"kernel": (256, 1024)}, jax.devices()[0])
    assert 28 <= found["around"] <= 40.1
    assert found["within"] == 0


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(steps.CASES, "toy", {"experts/up_proj": (4, 64, 96)})
    device = jax.devices()[0]
    count = lambda name, cases: [  # noqa: E731
        {"target": name, "case": "toy", "optimizer": o} | steps.count(o, steps.CASES["toy"], device)
        for o in steps.OPTIMIZERS
    ]
    monkeypatch.setattr("benchmarks.traffic.__main__.measure", count)
    record = main(Args(("cpu-8",), ("toy",), tmp_path / "traffic.json"))
    ours = record["rows"][0]
    assert ours["around"] >= 20
    assert ours["within"] > 5 * 3 * 2
    assert "muon_jax" in capsys.readouterr().out
    with pytest.raises(ValueError, match="known: experts"):
        main(Args(cases=("none",), output=tmp_path / "none.json"))
