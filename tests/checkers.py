"""Checks that right code passes and wrong code must not: known-wrong variants go through them too.

A checker takes an orthogonalizer, ``[*batch, m, n] -> [*batch, m, n]``, or an
`optax.GradientTransformation`, and raises AssertionError with what it found.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests import reference

Orthogonalizer = Callable[[Any], Any]

# Measured on the shapes below: 3e-6 in float32 (polar_express on one row: 1.1e-5), 0.6-2.7% in
# bfloat16 (polar_express on two rows: 5.5%).
FLOAT32_TOLERANCE = 3e-5
BFLOAT16_TOLERANCE = 0.07


def relative_error(actual: Any, expected: Any) -> float:
    """``||actual - expected||_F / ||expected||_F``, in float64."""
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    actual, expected = np.asarray(actual).astype(wide), np.asarray(expected).astype(wide)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Raise where the relative error exceeds `tolerance`, or is NaN."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Raise where structure, dtype, shape or any bit differs."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def abstract(tree: Any) -> Any:
    """Structure, shapes, dtypes and weak types: what a compiled program depends on."""
    return jax.tree.map(
        lambda leaf: (leaf.shape, str(leaf.dtype), bool(getattr(leaf, "weak_type", False))), tree
    )


def jitted(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation with a compiled update, taking NumPy's arrays."""
    on_device = lambda params: jax.tree.map(jnp.asarray, params)  # noqa: E731
    return optax.GradientTransformation(lambda p: tx.init(on_device(p)), jax.jit(tx.update))


# --- Matrices ------------------------------------------------------------------------------------


def gaussian(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normal entries, complex where `dtype` is."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(dtype)


def hadamard_rows(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Rows and columns of Hadamard matrices, permuted, with random signs.

    Every sum in Newton-Schulz is then of terms of one magnitude; in bfloat16, with float32
    accumulation, it is exact, so that any order of summation gives the same bits, if dimensions are
    powers of two. Of others, sums of entries are exact still.
    """
    *batch, rows, cols = shape
    rng = np.random.default_rng(seed)
    size = max(rows, cols)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    size = len(matrix)
    out = []
    for _ in range(int(np.prod(batch, dtype=int))):
        signs = rng.choice([-1, 1], (2, size))
        one = (signs[0][:, None] * matrix * signs[1])[rng.permutation(size)]
        one = one[:, rng.permutation(size)]
        out.append(one[:rows, :cols])
    return np.stack(out).reshape(shape).astype(np.float32)


def with_singular_values(values: np.ndarray, shape: tuple[int, int], seed: int = 0):
    """``U diag(values) V^T`` with random U and V: returns the three and the matrix."""
    rank = len(values)
    u, _ = np.linalg.qr(gaussian((shape[0], rank), seed, np.float64))
    v, _ = np.linalg.qr(gaussian((shape[1], rank), seed + 1, np.float64))
    return u, v, ((u * values) @ v.T).astype(np.float32)


# --- Orthogonalizers -----------------------------------------------------------------------------

# Few shapes: each is a program to compile.
SHAPES = ((12, 12), (12, 30), (30, 12), (2, 40))
STACK = (6, 4, 16)


def check_singular_basis(
    fn: Orthogonalizer,
    schedule=(reference.QUINTIC,) * 5,
    tolerance: float = FLOAT32_TOLERANCE,
    band: tuple[float, float] = (0.68, 1.14),
) -> None:
    """In the basis of the input's singular vectors the result is diagonal, positive and near 1.

    ``U^T O V`` sees a flipped sign and a missing transposition, which ``O O^T = I`` does not.
    Each diagonal entry must be what the schedule's polynomial makes of its singular value.
    """
    for shape in SHAPES:
        singular = np.linspace(0.4, 1.0, min(shape))
        u, v, matrix = with_singular_values(singular, shape)
        result = np.asarray(fn(matrix), np.float64)
        assert result.shape == shape, f"shape {result.shape}, expected {shape}"
        seen = u.T @ result @ v
        diagonal = np.diag(seen)
        low, high = band
        assert low - tolerance <= diagonal.min() and diagonal.max() <= high + tolerance, (
            f"{shape}: singular values {diagonal.min():.3f} to {diagonal.max():.3f}, "
            f"expected {low} to {high}"
        )
        expected = reference.polynomial(singular / np.linalg.norm(singular), schedule)
        assert_close(seen, np.diag(expected), tolerance, f"{shape} in the singular basis")
        inside = u @ seen @ v.T
        assert_close(result, inside, tolerance, f"{shape} outside the singular subspaces")


def check_batch_is_per_matrix(fn: Orthogonalizer) -> None:
    """Each matrix of a stack is orthogonalized by itself, whatever its neighbours' size."""
    stack = hadamard_rows((2, *STACK[1:]))[:, None] * np.float32([[[1.0]], [[0.125]], [[64.0]]])
    result = np.asarray(fn(stack))
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(result[index], np.asarray(fn(stack[index])))


def check_transposition(fn: Orthogonalizer) -> None:
    """A tall matrix gives the transposed result of the wide one, bit for bit."""
    wide = gaussian(STACK)
    tall = np.ascontiguousarray(wide.swapaxes(-1, -2))
    result = np.asarray(fn(tall))
    assert result.shape == tall.shape, f"shape {result.shape}, expected {tall.shape}"
    np.testing.assert_array_equal(result, np.asarray(fn(wide)).swapaxes(-1, -2))


def check_scale_invariance(fn: Orthogonalizer) -> None:
    """Powers of two leave every bit; the ends of float32's range change nothing."""
    matrix = gaussian(STACK).clip(-3, 3)
    expected = np.asarray(fn(matrix))
    assert np.isfinite(expected).all()
    for exponent in (-110, -60, -1, 1, 60, 125):
        scaled = np.asarray(fn(np.ldexp(matrix, exponent)))
        assert np.array_equal(scaled, expected), f"2^{exponent} changes the result"


def check_zeros(fn: Orthogonalizer) -> None:
    """Zeros in, exact zeros out, also next to a matrix that is not zero."""
    stack = gaussian(STACK)
    stack[0] = 0
    result = np.asarray(fn(stack))
    np.testing.assert_array_equal(result[0], np.zeros(STACK[1:], result.dtype))
    assert np.abs(result[1]).max() > 0


# --- Optimizers ----------------------------------------------------------------------------------

MakeOptimizer = Callable[..., optax.GradientTransformation]
"""Takes learning_rate and weight_decay."""

LEARNING_RATE = 0.02
WEIGHT_DECAY = 0.1


def small_tree(seed: int = 0) -> dict[str, Any]:
    """Wide, tall and square matrices, a stack of them, and a bias for AdamW."""
    shapes = {
        "wide": {"kernel": (12, 30)},
        "tall": {"kernel": (30, 12)},
        "square": {"kernel": (10, 10)},
        "experts": {"kernel": (5, 8, 12)},
        "bias": (7,),
    }
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    leaves, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    return structure.unflatten([gaussian(s, seed + i) for i, s in enumerate(leaves)])


def check_ten_steps(
    make: MakeOptimizer, tolerance: float = FLOAT32_TOLERANCE, nesterov: bool = True
) -> None:
    """Ten steps of both groups agree with the float64 twin, update by update and in total.

    `tolerance` is that of the matrices; AdamW is float32 whatever Newton-Schulz multiplies in.

    The gradients' size changes from step to step, as it does in training: with equal sizes an
    average and a heavy ball could not be told apart.
    """
    start = params = small_tree()
    tx = make(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    state = tx.init(params)

    def twins(leaf: np.ndarray) -> list[Any]:
        if leaf.ndim == 1:
            return [reference.AdamW(leaf, LEARNING_RATE, WEIGHT_DECAY)]
        matrices = leaf.reshape(-1, *leaf.shape[-2:])
        return [reference.Muon(m, LEARNING_RATE, WEIGHT_DECAY, nesterov=nesterov) for m in matrices]

    leaves, structure = jax.tree.flatten(start)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(start)]
    twin_lists = [twins(leaf) for leaf in leaves]
    for step in range(10):
        gradients = jax.tree.map(lambda g, step=step: g * 2.0 ** (step % 3), small_tree(step + 50))
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, twin, gradient, update in zip(
            names,
            twin_lists,
            jax.tree.leaves(gradients),
            structure.flatten_up_to(updates),
            strict=True,
        ):
            parts = gradient.reshape(len(twin), *twin[0].weights.shape)
            expected = np.stack([t.step(part) for t, part in zip(twin, parts, strict=True)])
            limit = FLOAT32_TOLERANCE if gradient.ndim == 1 else tolerance
            assert_close(update, expected.reshape(update.shape), limit, f"step {step}, {name}")
    for name, twin, before, after in zip(
        names, twin_lists, leaves, jax.tree.leaves(params), strict=True
    ):
        expected = np.stack([t.weights for t in twin]).reshape(before.shape)
        assert_close(after - before, expected - before, tolerance, f"after ten steps, {name}")


def check_zero_gradients(make: MakeOptimizer) -> None:
    """With zero gradients the update is exactly ``-lr * wd * W``, in both groups."""
    learning_rate, weight_decay = 2.0**-6, 2.0**-3  # exact in any order of multiplication
    params = small_tree()
    tx = make(learning_rate=learning_rate, weight_decay=weight_decay)
    state = tx.init(params)
    zeros = jax.tree.map(np.zeros_like, params)
    for _ in range(2):
        updates, state = tx.update(zeros, state, params)
        expected = jax.tree.map(lambda p: -learning_rate * weight_decay * p, params)
        assert_trees_equal(jax.tree.map(np.asarray, updates), jax.tree.map(np.float32, expected))


def check_update_rms(make: MakeOptimizer) -> None:
    """Without decay each matrix's update has RMS 0.2 lr, whatever its shape or its stack.

    The gradients are orthogonal, so all singular values are equal and the quintic's value at
    them is known: RMS = 0.2 lr p(1 / sqrt(min(m, n))).
    """
    shapes = {"square": (4, 4), "wide": (4, 16), "tall": (64, 4), "experts": (3, 4, 8)}
    gradients = {name: {"kernel": hadamard_rows(shape)} for name, shape in shapes.items()}
    tx = make(learning_rate=LEARNING_RATE, weight_decay=0.0)
    updates, _ = tx.update(gradients, tx.init(gradients), gradients)
    nominal = 0.2 * LEARNING_RATE * reference.polynomial(0.5, (reference.QUINTIC,) * 5)
    for name, leaf in updates.items():
        update = np.asarray(leaf["kernel"], np.float64)
        rms = np.sqrt(np.mean(update**2, axis=(-2, -1)))
        np.testing.assert_allclose(rms, nominal, rtol=FLOAT32_TOLERANCE, err_msg=name)


def check_state_is_a_fixed_point(tx: optax.GradientTransformation, params: Any) -> None:
    """Structure, shapes and dtypes of state and updates hold from `init` on."""
    state = tx.init(params)
    gradients = jax.tree.map(lambda p: (p * 0 + 1).astype(p.dtype), params)
    updates, after = tx.update(gradients, state, params)
    assert abstract(updates) == abstract(gradients)
    assert abstract(after) == abstract(state)
