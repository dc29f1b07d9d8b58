"""Shapes of real models, errors that know a wrong result, and a run at toy size."""

import collections
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness, model_shapes, peaks
from benchmarks.model_shapes import MatrixShape, matrices_of
from benchmarks.orthogonalize import __main__ as orthogonalize_main
from benchmarks.orthogonalize import measure, sides
from benchmarks.orthogonalize.accuracy import Spectrum
from muon_jax import orthogonalize
from muon_jax._polynomials import resolve_schedule
from tests.zoo.checker import params_of
from tests.zoo.entries import family

PEAKS = {"float32": 1e11, "bfloat16": 2e11}


def counts(model):
    return {(shape.rows, shape.cols): shape.count for shape in matrices_of(model)}


def test_moonlight_has_its_5207_matrices():
    found = counts("moonlight-16b-a3b")
    assert sum(found.values()) == 5207
    assert found[1408, 2048] == 26 * 64 * 3 and found[64, 2048] == 26
    assert found[2048, 3072] == found[576, 2048] == found[512, 4096] == found[2048, 2048] == 27


def test_qwen_has_the_parameters_of_its_model_card():
    found = counts("qwen2.5-7b")
    qwen = model_shapes.QWEN
    inside = sum(rows * cols * count for (rows, cols), count in found.items())
    assert sum(found.values()) == 28 * 7
    # 6.53B without embedding and head, 7.61B with them; biases and norms are less than 0.01B.
    assert inside / 1e9 == pytest.approx(6.53, abs=0.01)
    with_tables = inside + 2 * qwen.vocab_size * qwen.hidden_size
    assert with_tables / 1e9 == pytest.approx(7.61, abs=0.01)


def test_gpt2_is_the_zoo_s():
    leaves = params_of(family("gpt2"))
    kernels = [tuple(sorted(x.shape)) for path, x in leaves.items() if path.endswith("kernel")]
    assert counts("gpt2-small") == collections.Counter(kernels)


@pytest.fixture(scope="module", name="gaussian")
def _gaussian():
    return np.random.default_rng(0).standard_normal((24, 60), np.float32)


def test_five_exact_steps_are_those_of_float64(gaussian):
    x = gaussian.astype(np.float64)
    x /= np.linalg.norm(x)
    for a, b, c in resolve_schedule("standard"):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    spectrum = Spectrum(gaussian)
    assert spectrum.rounding_error(x) < 1e-12
    values = np.linalg.svd(x, compute_uv=False)
    rms = np.sqrt(np.mean((values - 1) ** 2))
    assert spectrum.polar_error(x) == pytest.approx(rms) == spectrum.exact_polar_error


@pytest.mark.parametrize(
    "wrong", [np.negative, lambda x: x[::-1], lambda x: 0.9 * x], ids=["sign", "rows", "scale"]
)
def test_wrong_results_have_large_errors(gaussian, wrong):
    spectrum = Spectrum(gaussian)
    right = np.asarray(orthogonalize(jnp.asarray(gaussian), ns_dtype="float32"))
    assert spectrum.rounding_error(right) < 1e-5
    assert spectrum.rounding_error(wrong(right)) > 0.05


def test_a_row_takes_what_its_time_allows():
    shape = MatrixShape("qwen2.5-7b", 1000, 1000, 50)
    estimate = 5 * 6e9 / (measure.SLOWEST * PEAKS["bfloat16"])  # seconds of one matrix, 1
    peers = 3

    def planned(seconds, **limits):
        return measure.plan(
            shape, measure.Limits(seconds, repeats=4, **limits), PEAKS["bfloat16"], peers
        )

    assert planned(peers * 5 * estimate * 7.5).matrices == 7
    assert planned(1e6).matrices == 50
    assert planned(1e6, stack_bytes=10 * 4_000_000).matrices == 10
    assert planned(1e6).repeats == 4
    less = planned(peers * estimate * 3.5)  # three calls, one of which warms up
    assert (less.matrices, less.repeats) == (1, 2)
    assert planned(peers * estimate * 1.5).matrices == 0
    assert planned(peers * estimate * 35, passes=7) == planned(peers * estimate * 5)


def test_what_does_not_fit_says_so():
    shape = MatrixShape("qwen2.5-7b", 1000, 1000, 50)
    row = measure.measure(shape, measure.Limits(0.1), PEAKS["bfloat16"])
    assert row["measured"] == 0 and "about 6 s, where a row may take 0" in row["left_out"]


def test_one_that_fails_leaves_the_others(monkeypatch):
    def build(peer, x, passes):
        if peer == "optax":
            raise MemoryError("too large")
        return real(peer, x, passes)

    real = sides.build
    monkeypatch.setattr(measure, "build", build)
    shape = MatrixShape("gpt2-small", 8, 16, 3)
    peers: tuple[sides.Peer, ...] = ("muon_jax", "optax")
    row = measure.measure(shape, measure.Limits(repeats=2), 2e11, peers, sizes=(64,))
    assert row["peers"]["optax"] == {"error": "MemoryError: too large"}
    assert row["peers"]["muon_jax"]["matrix_s"] > 0 and row["measured"] == 3


@pytest.mark.parametrize("peer", ["muon_jax", "optax"])
def test_passes_in_one_dispatch_repeat_the_work(peer, gaussian):
    stack = gaussian[None]
    once, thrice = (sides.build(peer, stack, passes) for passes in (1, 3))
    expected = stack
    for _ in range(3):
        expected = np.asarray(sides.build(peer, expected, 1).run())
    np.testing.assert_allclose(np.asarray(thrice.run()), expected, atol=1e-5)
    np.testing.assert_array_equal(once.first(), np.asarray(once.run())[0])
    np.testing.assert_allclose(thrice.first(), once.first(), atol=1e-6)


@pytest.mark.one_stack
def test_the_benchmark_measures_every_shape_and_peer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sides, "available_cores", lambda: 1)
    monkeypatch.setattr(peaks, "CPU_SIZES", (256,))
    args = orthogonalize_main.Args(
        models=("moonlight-tiny",), repeats=2, scale=8, output=tmp_path / "shapes.json"
    )
    record = orthogonalize_main.main(args)
    assert json.loads(args.output.read_text()) == record
    counted = [row["count"] for row in record["rows"]]
    assert counted == [shape.count for shape in matrices_of("moonlight-tiny")]
    for row in record["rows"]:
        assert set(row["peers"]) == {"muon_jax", "optax", "torch"}
        for peer, found in row["peers"].items():
            assert len(found["matrix_s_all"]) == 2 and found["matrix_s"] > 0
            exact = row["exact_polar_error"]
            assert abs(found["polar_error"] - exact) < (1e-5 if peer == "optax" else 0.03)
    assert "Moonlight" in capsys.readouterr().out


def test_shares_are_of_the_fastest_peak_of_all_rows():
    def row(seconds, peak):
        peaks = {"float32": peak / 2, "bfloat16": peak}
        peers = {"muon_jax": {"matrix_s": seconds, "flops": 12.0}, "torch": {"error": "no"}}
        return {"measured": 1, "matmul_peak_flops": peaks, "peers": peers}

    rows = [row(4.0, 10.0), row(1.0, 5.0), {"measured": 0}]
    peaks = measure.add_shares(rows, {"float32": 6.0, "bfloat16": 6.0})
    assert peaks == {"float32": 6.0, "bfloat16": 10.0}
    shares = [r["peers"]["muon_jax"]["share_of_peak"] for r in rows[:2]]
    assert shares == [{"float32": 0.5, "bfloat16": 0.3}, {"float32": None, "bfloat16": None}]


def test_an_error_is_described_in_a_line():
    assert harness.describe(ValueError("first\nsecond")) == "ValueError: first"
    assert harness.describe(KeyError()) == "KeyError: nothing"


def test_tables_are_wide_enough_where_there_is_no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert harness.make_console().width == harness.ELSEWHERE
    monkeypatch.setenv("COLUMNS", "70")
    assert harness.make_console().width == 70
