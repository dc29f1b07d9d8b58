"""Which steps are taken two at once, and what they cost."""

import jax
import pytest

from benchmarks import hlo
from muon_jax import SCHEDULES
from muon_jax._newton_schulz import newton_schulz
from muon_jax._polynomials import resolve_schedule
from muon_jax._products import at_once, of_iteration, one_by_one

QUINTIC, CUBIC = resolve_schedule("standard"), resolve_schedule("cubic5")


def test_steps_are_taken_two_at_once_where_that_is_fewer_flops():
    assert [*map(len, at_once(QUINTIC, 64, 97))] == [2, 2, 1]
    assert [*map(len, at_once(QUINTIC, 97, 64))] == [2, 2, 1]
    for long in range(64, 97):
        assert [*map(len, at_once(QUINTIC, 64, long))] == [1] * 5
    for long in (96, 97, 128, 512):
        saved = one_by_one(QUINTIC).flops(64, long) - of_iteration(QUINTIC, 64, long).flops(
            64, long
        )
        assert (saved > 0) == (long > 96)
    assert sum(at_once(CUBIC, 8, 80), ()) == CUBIC


@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512)])
def test_the_example_in_the_docstring(shape):
    assert of_iteration(QUINTIC, *shape) == (6, 11)
    assert one_by_one(QUINTIC) == (10, 5)
    assert round(of_iteration(QUINTIC, *shape).flops(*shape) / 1e9, 1) == 9.4
    assert round(one_by_one(QUINTIC).flops(*shape) / 1e9, 1) == 12.1


def test_steep_steps_are_taken_one_by_one():
    taken = {name: [*map(len, at_once(resolve_schedule(name), 8, 80))] for name in SCHEDULES}
    assert taken == {
        "standard": [2, 2, 1],
        "polar_express": [1, 1, 1, 2],
        "minimax": [1, 1, 2, 1],
        "dion": [1, 1, 2, 1],
        "deepseek_v4": [2] * 5,
        "cubic5": [2, 2, 1],
    }


@pytest.mark.parametrize("schedule", [QUINTIC[:2], QUINTIC[:1], QUINTIC[:3], CUBIC[:2], CUBIC[:3]])
@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64)])
def test_flops_are_those_of_the_program(schedule, shape):
    x = jax.ShapeDtypeStruct((1, *shape), "float32")
    text = newton_schulz.lower(x, schedule).compile().as_text()
    assert hlo.flops(text) == of_iteration(schedule, *shape).flops(*shape)
