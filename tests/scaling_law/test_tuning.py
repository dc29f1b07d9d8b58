"""Bottoms of made-up grids, of which the true bottom is known, and laws through them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from examples.scaling_law.tuning import Bowl, TunedLaw, find_bottom, fit_law

pytestmark = pytest.mark.one_stack

# A quadratic is recovered to rounding: measured 3.4e-13; a law, 1.3e-14.
BOWL_TOLERANCE, LAW_TOLERANCE = 1e-10, 1e-11

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
BATCHES = (2, 4, 8, 16)


def grid(loss, rates=RATES, batches=BATCHES) -> dict[tuple[float, int], float]:
    """`loss(u, v)` in doublings from a rate of 4e-3 and from a batch of 8."""
    return {
        (rate, batch): loss(math.log2(rate / 4e-3), math.log2(batch / 8))
        for rate in rates
        for batch in batches
    }


def bowl(u: float, v: float) -> float:
    """Lowest, 2.0, at 0.3 and -0.4; tilted."""
    x, y = u - 0.3, v + 0.4
    return 2.0 + 0.02 * x**2 + 0.015 * x * y + 0.01 * y**2


def assert_bottom(found: Bowl, rate: float, batch: float, loss: float) -> None:
    assert found.fitted
    expected = (rate, batch, loss)
    assert found[:3] == pytest.approx(expected, rel=BOWL_TOLERANCE)


# --- the bottom of a grid -------------------------------------------------------------------------


def test_the_bottom_of_a_quadratic_is_found():
    found = find_bottom(grid(bowl))
    assert_bottom(found, 4e-3 * 2**0.3, 8 * 2**-0.4, 2.0)
    assert not found.at_edge


def test_cells_far_above_the_best_one_do_not_matter():
    def walled(u: float, v: float) -> float:
        loss = bowl(u, v)
        return loss if loss < 2.08 else loss + 5 * u**4

    walls = sum(walled(u, v) > 2.09 for u in range(-2, 3) for v in range(-2, 2))
    assert 0 < walls <= 20 - 7
    assert_bottom(find_bottom(grid(walled)), 4e-3 * 2**0.3, 8 * 2**-0.4, 2.0)


def test_diverged_cells_are_left_out():
    losses = grid(bowl)
    losses |= {cell: math.inf for cell in losses if cell[0] == RATES[-1]}
    losses[RATES[0], BATCHES[0]] = math.nan
    assert_bottom(find_bottom(losses), 4e-3 * 2**0.3, 8 * 2**-0.4, 2.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda u, v: 2 + 0.01 * u**2 - 0.005 * v**2,  # a saddle
        lambda u, v: 2 - 0.005 * u**2 - 0.005 * v**2,  # a hill
        lambda u, v: 2 + 0.001 * (u - 9) ** 2 + 0.01 * v**2,  # its bottom is at a higher rate
        lambda u, v: 2 + 0.01 * u**2 + 0.001 * (v + 9) ** 2,  # and at a smaller batch
        lambda u, v: 2 + (u - 0.3) ** 2 + (v + 0.4) ** 2,  # too few cells are near the best one
        lambda u, v: 2 + 0.01 * (u - 0.3) ** 2 + (v + 0.4) ** 2,  # those that are lie on a line
    ],
    ids=["saddle", "hill", "high rate", "small batch", "steep", "line"],
)
def test_the_best_cell_stands_where_no_bottom_is_inside(loss):
    losses = grid(loss)
    best = min(losses, key=losses.__getitem__)
    found = find_bottom(losses)
    assert not found.fitted
    assert found[:3] == (*best, losses[best])


def test_a_single_cell_is_its_own_bottom():
    assert find_bottom({(1e-3, 4): 2.5}) == Bowl(1e-3, 4.0, 2.5, fitted=False, at_edge=True)


@pytest.mark.parametrize(
    "best, at_edge",
    [
        ((RATES[0], 4), True),
        ((RATES[-1], 8), True),
        ((RATES[2], BATCHES[0]), True),
        ((RATES[2], BATCHES[-1]), True),
        ((RATES[1], BATCHES[1]), False),
        ((RATES[3], BATCHES[2]), False),
    ],
)
def test_the_edge_of_the_grid_is_told(best, at_edge):
    assert find_bottom(grid(lambda u, v: 3.0) | {best: 2.0}).at_edge == at_edge


def test_next_to_a_diverged_rate_is_not_the_edge():
    losses = grid(lambda u, v: 3.0 - u)
    losses |= {cell: math.inf for cell in losses if cell[0] == RATES[-1]}
    losses[RATES[-2], 8] -= 1
    assert not find_bottom(losses).at_edge


def test_a_grid_of_diverged_runs_raises():
    with pytest.raises(ValueError, match="every run of the grid diverged: the rates are too high"):
        find_bottom(grid(lambda u, v: math.inf))


# --- a law for all sizes --------------------------------------------------------------------------


def bottom(rate: float, batch: float) -> Bowl:
    return Bowl(rate, batch, 2.0, fitted=True, at_edge=False)


def test_power_laws_are_recovered():
    law = TunedLaw(2.0, -0.25, 1e-3, 0.375)
    bowls = {c: bottom(2.0 * c**-0.25, 1e-3 * c**0.375) for c in (1e11, 7e11, 3e12)}
    found = fit_law(bowls)
    assert found == pytest.approx(law, rel=LAW_TOLERANCE)


def test_between_scattered_bottoms_the_law_is_scipys_regression():
    compute = np.array([1e11, 5e11, 2e12, 9e12])
    rates, batches = np.array([6e-3, 7e-3, 3e-3, 2.5e-3]), np.array([3.0, 4.0, 11.0, 9.0])
    found = fit_law({c: bottom(r, b) for c, r, b in zip(compute, rates, batches, strict=True)})
    for values, line in ((rates, found[:2]), (batches, found[2:])):
        expected = stats.linregress(np.log(compute), np.log(values))
        assert line == pytest.approx(
            (math.exp(expected.intercept), expected.slope), rel=LAW_TOLERANCE
        )


def test_one_size_gives_constants():
    law = fit_law({1e12: bottom(4e-3, 6.2)})
    assert {law.learning_rate(c) for c in (1e10, 1e12, 1e15)} == {4e-3}
    assert {law.batch(c) for c in (1e10, 1e12, 1e15)} == {6}


@settings(deadline=None, derandomize=True, database=None)
@given(st.floats(1e-5, 1.0), st.floats(0.01, 5000.0))
def test_rates_have_two_digits_and_batches_are_even(rate, batch):
    law = TunedLaw(rate, 0.0, batch, 0.0)
    found = law.learning_rate(1e12)
    assert found == float(f"{found:.1e}")
    assert found == pytest.approx(rate, rel=0.05)  # half a unit of the second digit of 1.0
    sequences = law.batch(1e12)
    assert isinstance(sequences, int) and sequences >= 2 and sequences % 2 == 0
    assert abs(sequences - max(batch, 2.0)) <= 1 + 1e-9


def test_rates_and_batches_follow_the_compute():
    law = TunedLaw(1.0, -0.2, 1e-4, 0.4)
    # 1e10^-0.2 = 0.01 and 1e-4 * 1e10^0.4 = 1; 1e12^-0.2 = 0.00398 and 1e-4 * 1e12^0.4 = 6.31.
    assert [law.learning_rate(c) for c in (1e10, 1e12)] == [0.01, 0.004]
    assert [law.batch(c) for c in (1e10, 1e12)] == [2, 6]
