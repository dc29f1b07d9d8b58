"""What "to rounding" means on a mesh: with Newton-Schulz in float32 it is float32's own."""

import dataclasses

import pytest

from benchmarks import rounding
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

CONFIG = dataclasses.replace(toy.CONFIG, vocab_size=256)
MESH = "data=2,expert=2,tensor=2"

# In the loss over ten steps; measured 1e-6, two units in the last place. With bfloat16 in
# Newton-Schulz it is 1.1e-4.
FLOAT32_TOLERANCE = 4e-6


def test_in_float32_ten_steps_on_a_mesh_are_those_of_one_device():
    batches = [rounding.text_batches(10, 8, 16, seed) for seed in range(2)]
    losses = rounding.measure(CONFIG, "muon float32", [MESH], batches, 1e-2)
    assert rounding.differences(losses)[MESH]["largest"] <= FLOAT32_TOLERANCE
    assert all(seed[0] - seed[-1] > 0.1 for seed in losses["one device"])
