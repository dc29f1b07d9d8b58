"""Newton-Schulz itself: exact, against the twin, against the polar factor, and by property."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import muon_jax
from muon_jax._orthogonalize import Iteration
from muon_jax._polynomials import resolve_schedule
from tests import reference
from tests.checkers import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    STACK,
    assert_close,
    check_batch_is_per_matrix,
    check_scale_invariance,
    check_singular_basis,
    check_transposition,
    check_zeros,
    gaussian,
    hadamard_rows,
    with_singular_values,
)

PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")
NS_DTYPES = ("float32", "bfloat16")
DTYPES = ("float32", "bfloat16", "float16", "complex64")

# Largest singular value that any schedule leaves: 1.202 (quintic, see facts in _polynomials),
# and rounding to bfloat16.
LARGEST_SINGULAR_VALUE = 1.23
# Complex64 against the complex128 twin; measured 6e-7.
COMPLEX_TOLERANCE = 1e-5


def orthogonalize(x, *args, **kwargs):
    return muon_jax.orthogonalize(jnp.asarray(x), *args, **kwargs)


in_float32 = functools.partial(orthogonalize, ns_dtype="float32")


# --- Exact ---------------------------------------------------------------------------------------


@pytest.mark.bits
@pytest.mark.parametrize("ns_dtype", NS_DTYPES)
@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_exact_laws(preconditioning, ns_dtype):
    fn = functools.partial(orthogonalize, preconditioning=preconditioning, ns_dtype=ns_dtype)
    check_batch_is_per_matrix(fn)
    check_transposition(fn)
    check_scale_invariance(fn)
    check_zeros(fn)


@pytest.mark.bits
def test_compiled_into_a_larger_program_it_gives_the_same_bits():
    stack = jnp.asarray(hadamard_rows(STACK))
    compiled = jax.jit(muon_jax.orthogonalize)(stack)
    np.testing.assert_array_equal(np.asarray(compiled), np.asarray(orthogonalize(stack)))


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_give_exact_zeros_in_every_dtype(dtype, preconditioning):
    result = orthogonalize(jnp.zeros(STACK, dtype), preconditioning=preconditioning)
    assert result.dtype == dtype
    np.testing.assert_array_equal(np.asarray(result), np.zeros(STACK, dtype))


@pytest.mark.parametrize("shape", [(16, 16), (64, 4), (1, 16)])
@pytest.mark.parametrize("name", ["standard", "deepseek_v4"])
def test_orthogonal_rows_keep_their_signs_and_one_magnitude(name, shape):
    """Every bfloat16 sum is exact here, so that all entries of the result have the same bits."""
    x = hadamard_rows(shape)
    result = np.asarray(orthogonalize(x, name))
    np.testing.assert_array_equal(np.sign(result), np.sign(x))
    assert np.unique(np.abs(result)).size == 1
    value = reference.polynomial(1 / np.sqrt(min(shape)), resolve_schedule(name))
    limit = 0.1  # measured 7.7%: the quintic amplifies each rounding of its one value
    assert_close(np.abs(result[0, 0]), value / np.sqrt(max(shape)), limit)


def test_empty_batches_and_empty_matrices():
    for shape in [(0, 3, 4), (2, 0, 3, 4), (0, 4), (3, 0)]:
        assert orthogonalize(jnp.zeros(shape)).shape == shape


def test_the_polynomial_is_rounded_before_it_is_multiplied():
    """Gram 1/4 I, polynomial ``1/4 (1 + 2^-9) I``: rounded, it cancels ``-1/4 X`` exactly."""
    x = hadamard_rows((4, 4))
    schedule = [(-0.25, 1 + 2.0**-9, 0.0)]
    np.testing.assert_array_equal(orthogonalize(x, schedule), np.zeros((4, 4)))
    assert np.abs(in_float32(x, schedule)).max() > 0


def test_the_gram_matrix_is_rounded_before_it_is_multiplied():
    """One row's is near 1, and rounds to 1: then ``g - g^2`` is 0."""
    x, schedule = gaussian((1, 200)), [(0.0, 1.0, -1.0)]
    np.testing.assert_array_equal(orthogonalize(x, schedule), np.zeros((1, 200)))
    assert np.abs(in_float32(x * 1.0, [(0.0, 1.0, -0.5)])).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_the_largest_float32_is_cast_to_the_largest_bfloat16(dtype):
    """It rounds to infinity otherwise; infinity itself stays what it is."""
    largest = np.finfo(np.float32).max
    x = jnp.asarray([largest, -largest, np.inf, -np.inf, np.nan, 1.0], dtype)
    iteration = Iteration(resolve_schedule("standard"), "frobenius", "bfloat16")
    cast = np.asarray(iteration.cast(x).real.astype(jnp.float32))
    limit = float(jnp.finfo(jnp.bfloat16).max) if dtype == "float32" else largest
    np.testing.assert_array_equal(cast, [limit, -limit, np.inf, -np.inf, np.nan, 1.0])
    assert np.isfinite(orthogonalize(np.full((3, 5), largest, dtype))).all()


@pytest.mark.parametrize(
    ("ns_dtype", "low", "high"), [("bfloat16", 0.05, 0.5), ("float32", 0, 1e-3)]
)
def test_null_directions_of_a_rank_deficient_matrix(ns_dtype, low, high):
    """Rounding to bfloat16 fills them with noise, which five steps amplify; float32 leaves 0."""
    _, _, x = with_singular_values(np.linspace(0.5, 1, 32), (64, 128))
    values = np.linalg.svd(np.asarray(orthogonalize(x, ns_dtype=ns_dtype)), compute_uv=False)
    print(f"{ns_dtype}: null directions {values[32:].min():.3g} to {values[32:].max():.3g}")
    assert values[:32].min() > 0.6
    assert low <= values[32:].max() <= high


# --- Against the float64 twin --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12), (1, 9), (9, 1)])
@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_float32_equals_the_twin(name, shape):
    x = gaussian(shape)
    expected = reference.newton_schulz(x, resolve_schedule(name))
    assert_close(in_float32(x, name), expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
@pytest.mark.parametrize("name", muon_jax.SCHEDULES)
def test_bfloat16_is_near_the_twin(name, shape):
    x = gaussian(shape)
    expected = reference.newton_schulz(x, resolve_schedule(name))
    assert_close(orthogonalize(x, name), expected, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("shape", [(48, 200), (96, 96)])
def test_bfloat16_rounds_once_per_product(shape):
    """Rounding every sum instead costs 4-7% on these shapes; torch is 1.2-1.5% away."""
    x = gaussian(shape)
    limit = 0.02  # measured 1.2-1.4%
    assert_close(orthogonalize(x), reference.newton_schulz(x), limit)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("ns_dtype", NS_DTYPES)
def test_complex_equals_the_twin(shape, ns_dtype):
    x = gaussian(shape, dtype=np.complex64)
    result = orthogonalize(x, ns_dtype=ns_dtype)
    assert result.dtype == jnp.complex64
    assert_close(result, reference.newton_schulz(x), COMPLEX_TOLERANCE)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_complex_converges_to_the_polar_factor(preconditioning):
    x = gaussian((12, 30), dtype=np.complex64)
    result = orthogonalize(x, "deepseek_v4", preconditioning=preconditioning)
    limit = 0.002  # the schedule's band is 1.000 to 1.001; AOL moves the factor, see below
    if preconditioning == "aol":
        limit = 0.3
    assert_close(result, reference.polar_factor(x), limit)


# --- The polar factor ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "band"),
    [
        ("standard", (0.68, 1.14)),
        ("dion", (0.977, 1.033)),
        ("polar_express", (0.87, 1.124)),
        ("deepseek_v4", (0.999, 1.002)),
    ],
)
@pytest.mark.parametrize(
    ("ns_dtype", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)]
)
def test_singular_basis(name, band, ns_dtype, tolerance):
    fn = functools.partial(orthogonalize, ns_coeffs=name, ns_dtype=ns_dtype)
    check_singular_basis(fn, resolve_schedule(name), tolerance, band)


@pytest.mark.parametrize("preconditioning", ["spectral", "schatten"])
def test_preconditioning_divides_by_the_norm_it_names(preconditioning):
    singular = np.linspace(0.3, 1.0, 12)
    norm = {"spectral": 1.0, "schatten": np.sum(singular**4) ** 0.25}[preconditioning]
    for shape in [(12, 30), (30, 12)]:
        u, v, x = with_singular_values(singular, shape)
        result = in_float32(x, preconditioning=preconditioning)
        expected = reference.polynomial(singular / norm, (reference.QUINTIC,) * 5)
        assert_close(result, (u * expected) @ v.T, FLOAT32_TOLERANCE)


def test_aol_divides_each_row_by_the_root_of_its_row_sum():
    x = gaussian((12, 30)).astype(np.float64)
    rows = x / np.sqrt(np.sum(np.abs(x @ x.T), axis=1, keepdims=True))
    singular = np.linalg.svd(rows, compute_uv=False)
    assert singular.max() <= 1
    u, _, vh = np.linalg.svd(rows, full_matrices=False)
    expected = (u * reference.polynomial(singular, (reference.QUINTIC,) * 5)) @ vh
    result = in_float32(x.astype(np.float32), preconditioning="aol")
    assert_close(result, expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12), (3, 4, 64)])
def test_lemma_1(shape):
    """A full-rank orthogonal [A, B] matrix has RMS 1/sqrt(max(A, B))."""
    result = np.asarray(in_float32(gaussian(shape), "deepseek_v4"), np.float64)
    rms = np.sqrt(np.mean(result**2, axis=(-2, -1)))
    band = 0.001  # the schedule's own: singular values 1.000 to 1.001
    np.testing.assert_allclose(rms * np.sqrt(max(shape[-2:])), 1, atol=band)


# --- By property ---------------------------------------------------------------------------------

SHAPES = st.tuples(
    st.sampled_from([(), (0,), (1,), (3,), (2, 2)]),
    st.sampled_from([(1, 7), (7, 1), (1, 1), (4, 4), (3, 8), (8, 3)]),
).map(lambda pair: pair[0] + pair[1])

# Few examples: each new shape and dtype is a new program.
by_property = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@by_property
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    ns_dtype=st.sampled_from(NS_DTYPES),
    preconditioning=st.sampled_from(PRECONDITIONINGS),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 99),
)
def test_any_scale_keeps_shape_dtype_and_band(
    shape, dtype, ns_dtype, preconditioning, exponent, seed
):
    kind = np.complex64 if dtype == "complex64" else np.float32
    base = jnp.asarray(gaussian(shape, seed, kind))
    tiny, huge = (float(v) for v in (jnp.finfo(dtype).tiny, jnp.finfo(dtype).max / 16))
    x = (base * float(np.clip(10.0**exponent, 1e3 * tiny, huge))).astype(dtype)
    fn = functools.partial(orthogonalize, preconditioning=preconditioning, ns_dtype=ns_dtype)
    result = fn(x)
    assert result.shape == shape and result.dtype == dtype
    result = np.asarray(result).astype(np.complex128)
    assert np.isfinite(result).all()
    if not x.size:
        return
    assert np.linalg.svd(result, compute_uv=False).max() < LARGEST_SINGULAR_VALUE
    if preconditioning != "aol":  # AOL rescales rows, so its polar factor is another matrix's
        inner = np.sum(result * reference.polar_factor(np.asarray(x).astype(np.complex128)).conj())
        assert inner.real > 0


@by_property
@given(
    shape=st.sampled_from([(12, 12), (12, 30), (30, 12)]),
    exponent=st.floats(-30, 30),
    ns_dtype=st.sampled_from(NS_DTYPES),
)
def test_any_factor_from_1e_minus_30_to_1e30(shape, exponent, ns_dtype):
    """Other factors than powers of two round the input, and nothing else."""
    x = gaussian(shape)
    tolerance = FLOAT32_TOLERANCE if ns_dtype == "float32" else BFLOAT16_TOLERANCE
    fn = functools.partial(orthogonalize, ns_dtype=ns_dtype)
    assert_close(fn(x * np.float32(10.0**exponent)), fn(x), tolerance)


@by_property
@given(
    dtype=st.sampled_from(DTYPES),
    preconditioning=st.sampled_from(PRECONDITIONINGS),
    ns_dtype=st.sampled_from(NS_DTYPES),
    end=st.sampled_from(["max", "tiny", "smallest_subnormal"]),
    fill=st.sampled_from(["all", "one", "mixed"]),
)
def test_the_ends_of_a_dtype_never_give_nan(dtype, preconditioning, ns_dtype, end, fill):
    extreme = getattr(jnp.finfo(dtype), end)
    x = np.full((3, 5), extreme, jnp.dtype(dtype))
    if fill != "all":
        x = np.asarray(jnp.asarray(gaussian((3, 5)) if fill == "mixed" else np.zeros((3, 5))))
        x = x.astype(jnp.dtype(dtype))
        x[1, 2] = extreme
    result = orthogonalize(x, preconditioning=preconditioning, ns_dtype=ns_dtype)
    assert result.dtype == dtype
    assert np.isfinite(np.asarray(result).astype(np.complex64)).all()
    if end == "max":  # a matrix of rank one has one singular value, and it must be near 1
        top = np.linalg.svd(np.asarray(result).astype(np.complex128), compute_uv=False).max()
        assert 0.6 < top < LARGEST_SINGULAR_VALUE


@pytest.mark.parametrize("ns_dtype", NS_DTYPES)
def test_non_finite_input_is_not_hidden(ns_dtype):
    """A diverged gradient must reach `optax.apply_if_finite`, not become a plausible update."""
    for bad in (np.nan, np.inf):
        x = gaussian((2, 4, 6))
        x[0, 1, 1] = bad
        result = np.asarray(orthogonalize(x, ns_dtype=ns_dtype))
        assert not np.isfinite(result[0]).all()
        assert np.isfinite(result[1]).all()


# --- Known-wrong variants must be rejected -------------------------------------------------------


def iterate(
    x,
    steps=5,
    coefficients=reference.QUINTIC,
    axes=(-2, -1),
    always_transpose=False,
    guard=True,
):
    """A plain Newton-Schulz, right by default, with places to go wrong."""
    x = np.asarray(x, np.float64)
    flip = always_transpose or x.shape[-2] > x.shape[-1]
    x = np.ascontiguousarray(x.swapaxes(-1, -2)) if flip else x
    norm = np.sqrt(np.sum(x**2, axis=axes, keepdims=True))
    x = x / (np.where(norm == 0, 1, norm) if guard else norm)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.swapaxes(-1, -2) if flip and not always_transpose else x


def forgets_to_transpose_back(x):
    return iterate(x, always_transpose=np.shape(x)[-2] >= np.shape(x)[-1]).reshape(np.shape(x))


def optax_norm(x):
    """Divides by norm + 1e-8 in float32: no scale invariance."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = x / (np.sqrt(np.sum(np.float32(x) ** 2, axis=(-2, -1), keepdims=True)) + 1e-8)
    for _ in range(5):
        gram = x @ x.swapaxes(-1, -2)
        a, b, c = reference.QUINTIC
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


CHECKS = {
    "basis": check_singular_basis,
    "batch": check_batch_is_per_matrix,
    "transposition": check_transposition,
    "scale": check_scale_invariance,
    "zeros": check_zeros,
}

WRONG = {
    "sign flipped": (lambda x: -iterate(x), "basis"),
    "no transpose back": (forgets_to_transpose_back, "basis"),
    "no transpose back, tall": (forgets_to_transpose_back, "transposition"),
    "four steps": (lambda x: iterate(x, steps=4), "basis"),
    "six steps": (lambda x: iterate(x, steps=6), "basis"),
    "one digit of c": (lambda x: iterate(x, coefficients=(3.4445, -4.7750, 2.0351)), "basis"),
    "cubic": (lambda x: iterate(x, coefficients=(1.5, -0.5, 0.0)), "basis"),
    "norm of the stack": (lambda x: iterate(x, axes=None), "batch"),
    "norm of a row": (lambda x: iterate(x, axes=-1), "basis"),
    "Q of QR": (lambda x: np.linalg.qr(x)[0] if np.shape(x)[-2] >= np.shape(x)[-1] else x, "basis"),
    "sign of each entry": (np.sign, "basis"),
    "not scale-invariant": (optax_norm, "scale"),
    "zero divided by zero": (lambda x: iterate(x, guard=False), "zeros"),
    "zeros moved": (lambda x: iterate(np.asarray(x) + 1e-9), "zeros"),
}


@pytest.mark.parametrize("check", [c for c in CHECKS if c != "scale"])
def test_the_checkers_accept_a_plain_iteration(check):
    CHECKS[check](iterate)


@pytest.mark.parametrize("name", WRONG)
def test_the_checkers_reject(name):
    fn, check = WRONG[name]
    with np.errstate(invalid="ignore", divide="ignore"), pytest.raises(AssertionError):
        CHECKS[check](fn)
