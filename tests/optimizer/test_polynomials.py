"""Coefficient schedules: length, band, published digits, and the update RMS they realise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import _muon as optax_muon

import muon_jax
from muon_jax import _polynomials
from muon_jax._polynomials import resolve_schedule
from tests import reference
from tests.checkers import gaussian

# Where singular values from `low` to 1 end, to the digits shown: measured on the grid below.
BANDS = {
    "standard": (0.01, 0.6818, 1.1344),
    "dion": (0.01, 0.9777, 1.0318),
    "polar_express": (0.01, 0.8702, 1.1236),
    "deepseek_v4": (0.001, 1.0000, 1.0006),
    "minimax": (10**-2.5, 0.9909, 1.0039),
    "cubic5": (0.01, 0.7740, 1.3000),
}
LENGTHS = {
    "standard": 5,
    "dion": 5,
    "polar_express": 5,
    "deepseek_v4": 10,
    "minimax": 5,
    "cubic5": 5,
}

# Range of the singular values, mean |s - 1| and RMS * sqrt(max(m, n)) of a Gaussian matrix. The
# first three are published with three digits, and the smallest singular value of a square
# Gaussian depends on the draw.
GAUSSIAN_TABLE = {
    ("standard", (512, 512)): (0.013, 1.202, 0.152, 0.939),
    ("standard", (512, 2048)): (0.745, 1.134, 0.126, 0.955),
    ("dion", (512, 512)): (0.013, 1.145, 0.036, 0.996),
    ("dion", (512, 2048)): (0.978, 1.032, 0.015, 1.000),
    ("polar_express", (512, 512)): (0.027, 1.124, 0.086, 0.998),
    ("polar_express", (512, 2048)): (0.870, 1.124, 0.079, 1.013),
    ("deepseek_v4", (512, 512)): (1.000, 1.001, 0.000, 1.000),
    ("deepseek_v4", (512, 2048)): (1.000, 1.001, 0.000, 1.000),
    ("minimax", (512, 512)): (0.014, 1.004, 0.019, 0.988),
    ("minimax", (512, 2048)): (0.995, 1.004, 0.003, 1.000),
    ("cubic5", (512, 512)): (0.003, 1.300, 0.215, 1.035),
    ("cubic5", (512, 2048)): (0.774, 1.300, 0.151, 0.992),
}
TABLE_DIGITS = 0.0011

# RMS of the update over its nominal 0.2, for Gaussians of 64 to 256 rows and aspect ratios 1 to
# 16. What counts is where s/||M||_F falls, so that for the quintic the size matters too.
REALISED_RMS = {
    "standard": (0.75, 1.01),
    "dion": (0.99, 1.01),
    "polar_express": (0.96, 1.04),
    "deepseek_v4": (0.998, 1.001),
    "minimax": (0.99, 1.001),
    "cubic5": (0.94, 1.21),
}
ASPECT_RATIOS = (1, 2, 4, 8, 16)
RMS_TOLERANCE = 2e-5  # float32 against the singular values in float64; measured 1e-6


def test_every_schedule_is_covered():
    assert set(muon_jax.SCHEDULES) == set(BANDS) == set(LENGTHS) == set(REALISED_RMS)


@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_length_and_shape(name):
    schedule = resolve_schedule(name)
    assert len(schedule) == LENGTHS[name]
    assert np.asarray(schedule).shape == (LENGTHS[name], 3)
    assert resolve_schedule(name, LENGTHS[name]) == schedule


@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_band(name):
    """Singular values in [low, 1] end in the stated band, and fill it."""
    low, bottom, top = BANDS[name]
    values = reference.polynomial(np.geomspace(low, 1, 100_001), resolve_schedule(name))
    digits = 1e-4
    assert bottom - digits < values.min() < bottom + digits
    assert top - digits < values.max() < top + digits


@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_small_singular_values_grow_and_never_change_sign(name):
    grid = np.linspace(0, 1, 10_001)
    values = reference.polynomial(grid, resolve_schedule(name))
    assert values[0] == 0
    assert (values[1:] > 0).all()
    assert (values[grid <= 0.5] >= grid[grid <= 0.5]).all()


def test_standard_is_the_papers_quintic():
    assert resolve_schedule("standard") == (reference.QUINTIC,) * 5
    assert resolve_schedule("standard", 3) == (reference.QUINTIC,) * 3


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("standard", (optax_muon._DEFAULT_NS_COEFFS,) * 5),
        ("dion", tuple(optax_muon._DION_NS_COEFFS)),
    ],
)
def test_presets_have_optax_digits(name, preset):
    assert resolve_schedule(name) == preset


def test_polar_express_is_minimax_after_every_step():
    """Each polynomial spreads its error evenly: smallest and largest value sum to 2.

    That is what makes a composition of odd polynomials optimal on [1e-3, 1] (arXiv 2505.16932,
    Theorem 3.1); a wrong digit anywhere breaks it.
    """
    values = np.geomspace(1e-3, 1, 400_001)
    evenness = 1e-9  # measured 5e-12, the grid's resolution
    for step in _polynomials.POLAR_EXPRESS:
        values = reference.polynomial(values, [step])
        assert abs(values.min() + values.max() - 2) < evenness


def test_polar_express_divides_by_the_safety_factor():
    (a, b, c), *_ = _polynomials.POLAR_EXPRESS
    grid = np.linspace(0, 1, 101)
    safe = reference.polynomial(grid, resolve_schedule("polar_express", 1))
    np.testing.assert_allclose(safe, reference.polynomial(grid / 1.01, [(a, b, c)]), rtol=1e-12)


def test_polar_express_of_any_length_is_a_prefix():
    longest = resolve_schedule("polar_express", 12)
    for steps in range(1, 12):
        assert resolve_schedule("polar_express", steps) == longest[:steps]
    assert set(longest[7:]) == {(1.875, -1.25, 0.375)}


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_minimax_is_closest_to_1_from_its_own_bound(steps):
    """Two extremes inside alternate with both ends: Chebyshev's condition, after every step."""
    values = np.geomspace(10 ** (-steps / 2), 1, 400_001)
    for abc in _polynomials.MINIMAX[steps]:
        low, high = values.min(), values.max()
        grid = np.linspace(low, high, 400_001)
        error = reference.polynomial(grid, [abc]) - 1
        inside = error[1:-1][np.diff(np.sign(np.diff(error))) != 0]
        largest = np.abs(error).max()
        extremes = [error[0], *inside, error[-1]]
        # Measured 1e-10: what the grid leaves out.
        np.testing.assert_allclose(extremes, np.multiply(largest, [-1, 1, -1, 1]), rtol=1e-8)
        values = reference.polynomial(values, [abc])


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_minimax_is_safe_but_in_its_last_step(steps):
    schedule = resolve_schedule("minimax", steps)
    grid = np.linspace(0, 1, 101)
    for used, derived in zip(schedule[:-1], _polynomials.MINIMAX[steps][:-1], strict=True):
        expected = reference.polynomial(grid / 1.01, [derived])
        np.testing.assert_allclose(reference.polynomial(grid, [used]), expected, rtol=1e-12)
    assert schedule[-1] == _polynomials.MINIMAX[steps][-1]


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_minimax_beats_polar_express_with_as_many_products(steps):
    """The largest error on the singular values that so few steps can lift."""
    grid = np.geomspace(10 ** (-steps / 2), 1, 10_001)
    ours, theirs = (
        np.abs(reference.polynomial(grid, resolve_schedule(name, steps)) - 1).max()
        for name in ("minimax", "polar_express")
    )
    assert ours < theirs / 10


@pytest.mark.parametrize("steps", [2, 7])
def test_minimax_names_the_lengths_that_it_has(steps):
    with pytest.raises(ValueError, match=f"has 3 to 6 steps; got ns_steps={steps}"):
        resolve_schedule("minimax", steps)


def test_cubic5_leaves_out_the_square():
    assert all(c == 0 for _, _, c in resolve_schedule("cubic5"))


@pytest.mark.parametrize(
    "last",
    [
        resolve_schedule("polar_express", 8)[-1],
        resolve_schedule("deepseek_v4")[-1],
        resolve_schedule("deepseek_v4")[-2],
    ],
)
def test_last_steps_hold_1_fixed(last):
    """``p(1) = 1`` and ``p'(1) = 0``: what is near 1 comes nearer, quadratically."""
    a, b, c = last
    assert a + b + c == 1
    assert a + 3 * b + 5 * c == 0


def test_more_polar_express_steps_converge():
    grid = np.geomspace(1e-3, 1, 10_001)
    errors = [
        np.abs(reference.polynomial(grid, resolve_schedule("polar_express", n)) - 1).max()
        for n in (5, 6, 7, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("convert", [list, np.asarray, jnp.asarray, tuple])
def test_any_schedule_as_data(convert):
    """One (a, b, c) is repeated; a list of them is taken as it is, float32 digits and all."""
    table = [[1.5, -0.5, 0.0], [1.875, -1.25, 0.375]]
    assert resolve_schedule(convert(table)) == tuple(tuple(row) for row in table)
    assert resolve_schedule(convert(table[0])) == ((1.5, -0.5, 0.0),) * 5
    assert resolve_schedule(convert(table[0]), 2) == ((1.5, -0.5, 0.0),) * 2


@pytest.mark.parametrize(
    ("coeffs", "steps"),
    [("dion", 4), ("dion", 6), ("deepseek_v4", 5), ([(1.5, -0.5, 0.0)] * 3, 4)],
)
def test_steps_and_length_cannot_disagree_silently(coeffs, steps):
    with pytest.raises(ValueError, match=f"ns_steps={steps} contradicts ns_coeffs"):
        resolve_schedule(coeffs, steps)


def test_the_schedule_reaches_the_iteration():
    """A user's schedule, run on a matrix, does to its singular values what its polynomial does."""
    schedule = [(1.7, -0.9, 0.2), (1.4, -0.6, 0.15), (2.0, -1.5, 0.5)]
    x = gaussian((12, 30))
    u, singular, vh = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    expected = reference.polynomial(singular / np.linalg.norm(singular), schedule)
    result = muon_jax.orthogonalize(jnp.asarray(x), schedule, ns_dtype="float32")
    seen = u.T @ np.asarray(result, np.float64) @ vh.T
    np.testing.assert_allclose(seen, np.diag(expected), atol=1e-6)


# --- What the documentation promises -------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), GAUSSIAN_TABLE)
def test_the_table_of_gaussian_matrices(name, shape):
    low, high, mean, rms = GAUSSIAN_TABLE[name, shape]
    x = jax.random.normal(jax.random.key(0), shape)
    result = np.asarray(muon_jax.orthogonalize(x, name, ns_dtype="float32"))
    # The singular values' squares, from the Gram matrix: a third of the time of an SVD.
    values = np.sqrt(np.linalg.eigvalsh(result.astype(np.float64) @ result.T).clip(0))
    seen = (values.min(), values.max(), np.abs(values - 1).mean())
    np.testing.assert_allclose(seen, (low, high, mean), atol=TABLE_DIGITS)
    realised = np.sqrt(np.mean(result.astype(np.float64) ** 2)) * np.sqrt(max(shape))
    np.testing.assert_allclose(realised, rms, atol=TABLE_DIGITS)


@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_realised_update_rms_for_every_aspect_ratio(name):
    """RMS = 0.2 sqrt(mean p(s)^2), tall as wide, and inside the schedule's range."""
    gradients = {}
    for ratio in ASPECT_RATIOS:
        wide = jnp.asarray(gaussian((64, 64 * ratio), seed=ratio))
        gradients |= {f"wide_{ratio}": wide, f"tall_{ratio}": wide.T}
    tx = muon_jax.scale_by_muon(name, ns_dtype="float32")
    updates, _ = jax.jit(tx.update)(gradients, tx.init(gradients))
    low, high = REALISED_RMS[name]
    for leaf, rms in muon_jax.update_rms(updates).items():
        singular = np.linalg.svd(np.asarray(gradients[leaf], np.float64), compute_uv=False)
        values = reference.polynomial(singular / np.linalg.norm(singular), resolve_schedule(name))
        expected = np.sqrt(np.mean(values**2))
        assert low < expected < high
        np.testing.assert_allclose(rms / 0.2, expected, rtol=RMS_TOLERANCE)


@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_range_of_the_realised_rms_for_larger_matrices(name, rows):
    for ratio in ASPECT_RATIOS:
        x = gaussian((rows, rows * ratio), seed=1, dtype=np.float64)
        singular = np.sqrt(np.linalg.eigvalsh(x @ x.T).clip(0))
        values = reference.polynomial(singular / np.linalg.norm(singular), resolve_schedule(name))
        low, high = REALISED_RMS[name]
        assert low < np.sqrt(np.mean(values**2)) < high
