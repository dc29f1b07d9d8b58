"""Products and errors of Newton-Schulz: what the benchmark counts, derives, searches and draws."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.polar_error import __main__ as polar_error
from benchmarks.polar_error import derive, gram_search
from benchmarks.polar_error.gram import ARITHMETICS, gram_newton_schulz, products
from benchmarks.polar_error.gram_search import Variant
from benchmarks.polar_error.spectra import SEARCHED, problem
from muon_jax import _polynomials, orthogonalize
from muon_jax._newton_schulz import step, two_steps
from muon_jax._polynomials import resolve_schedule
from muon_jax._preconditioning import precondition
from muon_jax._products import of_iteration, one_by_one

pytestmark = pytest.mark.one_stack

QUINTIC = resolve_schedule("standard")
EVERY = (1, 2, 3, 4)


def stacked(rows, cols, dtype="bfloat16"):
    problems = [problem(spectrum, rows, cols, dtype) for spectrum in SEARCHED]
    return problems, jnp.stack([each.x for each in problems]).astype(jnp.float32)


# --- Counts ---------------------------------------------------------------------------------------


def test_products_of_the_plain_iteration():
    assert one_by_one(QUINTIC) == (10, 5)
    assert one_by_one(resolve_schedule("cubic5")) == (10, 0)
    # 4 m^2 n + 2 m^3 for each step.
    assert one_by_one(QUINTIC).flops(4, 8) == 5 * (4 * 16 * 8 + 2 * 64)


def test_products_of_the_gram_form_are_those_that_it_takes():
    for after in gram_search.restarts(len(QUINTIC)):
        for schedule in (QUINTIC, resolve_schedule("cubic5")):
            taken = []

            def product(x, y, taken=taken):
                taken.append(x.shape[-1])
                return jnp.matmul(x, y.mT)

            counted = ARITHMETICS["float32"]._replace(product=product)
            gram_newton_schulz(jnp.ones((4, 8)) / 8, schedule, after, counted)
            # X X^T has the 8 columns of X in its sum, Q X those of Q: one of each in a segment.
            long = 2 * taken.count(8)
            assert products(schedule, after) == (long, len(taken) - long)
    # What the library takes of wide matrices is one of them.
    assert products(QUINTIC, (2, 4)) == of_iteration(QUINTIC, 64, 128)


def test_the_gram_form_is_cheaper_from_an_aspect_ratio_of_three_halves():
    for after in gram_search.restarts(len(QUINTIC)):
        if after != EVERY:
            gram, plain = products(QUINTIC, after), one_by_one(QUINTIC)
            assert gram.flops(64, 96) == plain.flops(64, 96)
            assert gram.flops(64, 128) < plain.flops(64, 128)


# --- Derivation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("low", [1e-3, 0.1, 0.9])
def test_each_step_is_the_closest_to_1(degree, low):
    abc = derive.CLOSEST[degree](low, 1.0)
    assert derive.equioscillates(abc, low, 1.0)
    # Any other polynomial's error does not alternate so.
    for term, change in itertools.product(range((degree + 1) // 2), (0.999, 1.001)):
        other = [value * (change if index == term else 1) for index, value in enumerate(abc)]
        assert not derive.equioscillates(tuple(other), low, 1.0)


def test_no_composition_near_by_is_closer_to_1():
    low, generator = 0.01, np.random.default_rng(0)
    steps, error = derive.compose((3, 5), low)
    grid = np.geomspace(low, 1, 20_001)

    def largest(steps):
        values = grid
        for abc in steps:
            values = derive.value(abc, values)
        # Any multiple of a composition is one too: the best is what counts.
        return (values.max() - values.min()) / (values.max() + values.min())

    assert largest(steps) == pytest.approx(error, rel=1e-6)
    for _ in range(200):
        other = [tuple(value * (1 + generator.normal() * 1e-2) for value in abc) for abc in steps]
        assert largest(other) > error


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_the_library_holds_what_is_derived(steps):
    """Quintics alone are best where the products are a multiple of three."""
    degrees, _ = derive.best(3 * steps, derive.bound(3 * steps))
    assert degrees == (5,) * steps
    derived, _ = derive.compose(degrees, derive.bound(3 * steps))
    # The last digits depend on the library that solves the equations.
    np.testing.assert_allclose(derived, _polynomials.MINIMAX[steps], rtol=1e-9)
    schedule = derive.schedule(3 * steps)
    np.testing.assert_allclose(schedule, resolve_schedule("minimax", steps), rtol=1e-9)


def test_cubics_are_worth_the_remainder_and_come_first():
    found = derive.main(derive.Args(products=(10, 11, 12)))
    assert found == {10: (3, 3, 5, 5), 11: (3, 5, 5, 5), 12: (5, 5, 5, 5)}


# --- Gram form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [(2,), (1, 3), EVERY])
@pytest.mark.parametrize("apart", ["nothing", "a", "mean"])
def test_the_gram_form_is_the_same_iteration(after, apart):
    _, x = stacked(16, 48, "float32")
    expected = orthogonalize(x, ns_dtype="float32")
    arithmetic = ARITHMETICS["float32"]
    start, _ = precondition(x, "frobenius", arithmetic)
    result = gram_newton_schulz(start, QUINTIC, after, arithmetic, None, apart)
    np.testing.assert_allclose(result[:2], expected[:2], atol=2e-4)


def test_the_library_takes_what_the_search_finds_by_twos():
    _, x = stacked(32, 80)
    arithmetic = ARITHMETICS["bfloat16"]
    start, _ = precondition(x, "frobenius", arithmetic)
    searched = gram_newton_schulz(start, QUINTIC, (2, 4), arithmetic)
    first, second, last = QUINTIC[:2], QUINTIC[2:4], QUINTIC[4]
    x = two_steps(two_steps(start, *first, arithmetic), *second, arithmetic)
    np.testing.assert_array_equal(step(x, last, arithmetic), searched)


def test_by_twos_with_the_mean_apart_rounding_is_no_worse_and_otherwise_it_is():
    problems, _ = stacked(64, 256)

    def measured(after, apart):
        variant = Variant("bfloat16", "bfloat16", apart)
        return gram_search.measure(problems, QUINTIC, after, variant)

    plain = measured(EVERY, "a")
    assert gram_search.passes(measured((2, 4), "mean"), plain)
    assert gram_search.furthest(measured((2, 4), "a"), plain) > 1.5
    # Three at once are undone by one large singular value, five at once by anything.
    assert gram_search.furthest(measured((3,), "mean"), plain) > 2
    assert gram_search.furthest(measured((), "mean"), plain) > 10


# --- Programs -------------------------------------------------------------------------------------


def test_a_right_answer_has_no_error_and_wrong_ones_have():
    made = problem("gaussian", 8, 24, "float32")
    polar = made.left @ made.right.T
    assert made.error(polar)["error"] < 1e-12
    assert made.error(1.1 * polar)["error"] == pytest.approx(0.1)
    # A flipped sign has the right singular values, and is nowhere near.
    flipped = made.error(-polar)
    assert flipped["error"] < 1e-12 and flipped["distance"] == pytest.approx(2)
    assert made.error(polar * np.nan)["error"] == np.inf
    low_rank = problem("low-rank", 8, 24, "float32")
    assert low_rank.left.shape == (8, 2)


def test_the_table_is_of_the_librarys_results(tmp_path):
    problems = [problem("gaussian", 16, 32, "bfloat16")]
    method = polar_error.Method("minimax", resolve_schedule("minimax"), "aol")
    expected = problems[0].error(orthogonalize(problems[0].x, "minimax", preconditioning="aol"))
    found = method.errors(problems, "bfloat16")[0]
    # Sums in another order: equal to a rounding of bfloat16 in some entries.
    assert found["error"] == pytest.approx(expected["error"], abs=2e-3)


def test_all_methods_are_measured_and_the_front_is_a_front(tmp_path):
    path, picture = tmp_path / "error.json", tmp_path / "error.png"
    polar_error.main(
        polar_error.Args(
            scale=0.05, aspects=(1, 4), dtypes=("float32",), output=path, figure=picture
        )
    )
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == 2 * len(polar_error.methods())
    for aspect in (1, 4):
        here = [row for row in rows if row["aspect"] == aspect]
        front = [row for row in here if row["front"]]
        for row in here:
            beaten = [f for f in front if f["flops"] <= row["flops"] and f["error"] <= row["error"]]
            assert beaten, row
    standard = next(row for row in rows if row["method"] == "standard")
    assert standard["work"] == 1 and standard["products"] == 15
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_search_writes_what_passes(tmp_path):
    args = gram_search.Args(
        rows=16, aspects=(4,), schedules=("standard",), output=tmp_path / "search.json"
    )
    gram_search.main(args)
    rows = json.loads((tmp_path / "search.json").read_text())["rows"]
    assert len(rows) == 15 * len(gram_search.VARIANTS)
    by = {(tuple(row["restarts"]), row["variant"]): row for row in rows}
    assert by[(2, 4), "bfloat16, mean apart"]["work"] == pytest.approx(7 / 9)
    assert by[(2, 4), "bfloat16, mean apart"]["passes"]
