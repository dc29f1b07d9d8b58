"""A preset's training, compiled and counted, on the device that every test has."""

import pytest

from benchmarks import preset
from examples.moonlight.model import config as moonlight_config
from muon_jax._polynomials import resolve_schedule
from muon_jax._products import of_iteration
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

# The toy's matrices, (rows, columns), with how many there are of each.
ATTENTION = {(16, 12): 2, (8, 32): 2, (16, 16): 2, (16, 24): 2}
EXPERTS = {(16, 8): 3 * 4}
OTHERS = {(16, 32): 3, (16, 4): 1, (16, 8): 3}
HEAD = 16 * 300


@pytest.fixture(scope="module", name="row")
def _row():
    """A toy in the place of the preset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moonlight_config.PRESETS, "tiny", toy.CONFIG)
        return preset.measure(ARGS)


ARGS = preset.Args(preset="tiny", target="cpu", experts="dense")


def test_the_models_flops_are_those_of_its_products(row):
    kinds = (ATTENTION, EXPERTS, OTHERS)
    weights = HEAD + sum(m * n * count for kind in kinds for (m, n), count in kind.items())
    layers, batch, heads, time, width = 2, 8, 2, 128, (8 + 4) + 8
    attention = layers * batch * heads * time * time * width
    # Two for each product, and a step has three: forward, and backward to both factors.
    assert row["flops"]["model"] == 3 * 2 * (batch * time * weights + attention)


def test_newton_schulzs_flops_are_those_of_five_steps(row):
    flops, schedule = 0, resolve_schedule("standard")
    for kind in (ATTENTION, EXPERTS, OTHERS):
        for shape, count in kind.items():
            flops += count * of_iteration(schedule, *shape).flops(*shape)
    assert row["flops"]["newton-schulz"] == flops


def test_memory_holds_the_state_and_the_tokens(row):
    tokens = 20 * 8 * (128 + 1)
    # Every weight has a momentum, and those of Adam's a second one.
    assert row["bytes"]["arguments"] > 4 * (2 * row["parameters"] + 2 * HEAD + tokens)
    assert 0 <= row["bytes"]["results beside"] < 100_000


def test_what_is_printed_follows_from_the_counts():
    row = {
        "parameters": 5_000_000,
        "active": 2_000_000,
        "steps": 1200,
        "tokens": 9_000_000,
        "bytes": {"arguments": preset.GIB, "temporary": preset.GIB // 2},
        "flops": {"model": 7.6e12, "newton-schulz": 0.5e12},
    }
    printed = "\n".join(preset.lines(preset.Args(minutes=20), row))
    assert "memory: 1.50 GiB" in printed and ": 9,720 TFLOPs" in printed
    assert "in 20 minutes: 8.10 TFLOP/s, 100% of 8.1" in printed
