"""Views of leaves as matrices, batching by shape, and update scales: exact where only moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers as Dims

from muon_jax import AdjustedLR, FixedScale, FusedBlocks, UpdateNorm, muon
from muon_jax._batching import map_by_shape
from muon_jax._matrices import leaf_views
from muon_jax._orthogonalize import Iteration
from muon_jax._scaling import (
    DEFAULT_RMS,
    describe_update_scale,
    resolve_update_scale,
    width_transfer,
)
from muon_jax._update_rule import UpdateRule

EXACT = settings(deadline=None, derandomize=True, max_examples=40)


def integers(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@st.composite
def shapes_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    axes = draw(st.permutations(range(len(shape))))
    first = draw(st.integers(1, len(shape) - 1))
    second = draw(st.integers(first + 1, len(shape)))
    return shape, Dims(tuple(axes[:first]), tuple(axes[first:second]))


@EXACT
@given(shapes_and_axes())
def test_put_inverts_take(case):
    shape, numbers = case
    views = leaf_views(shape, numbers, "leaf")
    leaf = integers(*shape)
    stacks = views.take(leaf)
    assert [stack.shape for stack in stacks] == [view.matrices for view in views]
    np.testing.assert_array_equal(views.put(stacks), leaf)


def test_take_has_the_elements_of_each_matrix():
    leaf = integers(2, 3, 4)
    (stack,) = leaf_views(leaf.shape, Dims(2, 0), "leaf").take(leaf)
    np.testing.assert_array_equal(stack, leaf.transpose(1, 2, 0))
    (joint,) = leaf_views(leaf.shape, Dims((0, 1), 2), "leaf").take(leaf)
    np.testing.assert_array_equal(joint, leaf.reshape(1, 6, 4))


def test_fused_blocks_take_and_put_each_block():
    leaf = integers(2, 4, 9)
    blocks = FusedBlocks((2, 3, 4), axis=2, dimension_numbers=Dims(1, 2))
    views = leaf_views(leaf.shape, blocks, "leaf")
    stacks = views.take(leaf)
    for stack, (start, stop) in zip(stacks, [(0, 2), (2, 5), (5, 9)], strict=True):
        np.testing.assert_array_equal(stack, leaf[:, :, start:stop])
    np.testing.assert_array_equal(views.put(stacks), leaf)


@settings(EXACT, max_examples=8)  # each is many small programs
@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=0, max_size=8),
    st.integers(1, 400),
)
def test_map_by_shape_moves_every_matrix_once_and_bounds_each_batch(shapes, limit):
    offset = np.cumsum([0, *[np.prod(shape) for shape in shapes]])
    stacks = [integers(*s) + float(o) for s, o in zip(shapes, offset[:-1], strict=True)]
    seen = []

    def negate(batch):
        assert batch.nbytes <= limit or batch.shape[0] == 1
        # Several batches of a length are one loop, which is traced once.
        jax.debug.callback(lambda batch: seen.append(np.asarray(batch)), batch)
        return -batch

    out = map_by_shape(negate, stacks, limit)
    jax.effects_barrier()
    for result, stack in zip(out, stacks, strict=True):
        np.testing.assert_array_equal(result, -stack)
    moved = np.sort(np.concatenate([np.zeros(0), *[np.ravel(batch) for batch in seen]]))
    np.testing.assert_array_equal(moved, np.arange(offset[-1]))


def test_map_by_shape_runs_one_batch_for_each_shape():
    stacks = [jnp.ones((n, 4, 8)) for n in (1, 2)] + [jnp.ones((3, 8, 4)), jnp.ones((1, 4, 4))]
    calls = []
    map_by_shape(lambda batch: calls.append(batch.shape) or batch, stacks)
    assert calls == [(3, 4, 8), (3, 8, 4), (1, 4, 4)]


def test_chunks_are_nearly_equal():
    calls = []
    map_by_shape(lambda b: calls.append(b.shape[0]) or b, [jnp.ones((7, 2, 2))], 3 * 16)
    assert calls == [3, 2]  # 3, 2 and 2: one loop for each length


# --- scales ---------------------------------------------------------------------------------


def apply_update_scale(stack, scale):
    """What `muon` does to the results of Newton-Schulz."""
    update = UpdateRule(Iteration((), "frobenius", "float32"), scale, False, 0.95, True)
    measured = update.measure(stack, stack) if update.is_measured else None
    return update.finish(stack, measured, stack.shape[1:])


@pytest.mark.parametrize(
    ("scale", "fan_in", "fan_out", "factor"),
    [
        (resolve_update_scale(DEFAULT_RMS, None), 512, 2048, 0.2 * 2048**0.5),  # Eq. 4
        (resolve_update_scale(0.3, None), 2048, 512, 0.3 * 2048**0.5),
        (resolve_update_scale(None, None), 4, 16, 2.0),  # Jordan
        (resolve_update_scale(None, None), 16, 4, 1.0),
        (resolve_update_scale(DEFAULT_RMS, FixedScale(0.2 * 768**0.5)), 4, 16, 0.2 * 768**0.5),
        (resolve_update_scale(DEFAULT_RMS, lambda i, o: i / o), 4, 16, 0.25),
        (resolve_update_scale(DEFAULT_RMS, AdjustedLR(0.4)), 4, 16, 1.6),
    ],
)
def test_scale_of_a_matrix_shape(scale, fan_in, fan_out, factor):
    ones = jnp.ones((2, fan_in, fan_out))
    np.testing.assert_allclose(apply_update_scale(ones, scale), factor * ones, rtol=1e-6)
    assert describe_update_scale(scale, fan_in, fan_out) == f"{factor:.4g}"


def test_width_transfer_is_of_fan_out_over_fan_in():
    assert width_transfer(fan_in=1, fan_out=9) == 3.0
    assert width_transfer(fan_in=9, fan_out=1) == 1.0


def test_update_norm_sets_the_rms_of_each_matrix():
    scale = UpdateNorm(0.3)
    stack = jnp.stack([integers(4, 6), 100 * integers(4, 6), jnp.zeros((4, 6))])
    out = apply_update_scale(stack, scale)
    rms = jnp.sqrt(jnp.mean(jnp.square(out), axis=(1, 2)))
    np.testing.assert_allclose(rms, [0.3, 0.3, 0.0], rtol=1e-6)
    assert describe_update_scale(scale, 4, 6) == "0.3/RMS(O)"


def test_a_bfloat16_update_is_scaled_in_float32():
    out = apply_update_scale(jnp.ones((1, 3, 5), jnp.bfloat16), AdjustedLR(0.2))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 0.2 * 5**0.5, rtol=1e-7)


@pytest.mark.parametrize(
    ("rms", "scale"), [(0.3, UpdateNorm()), (None, FixedScale(1.0)), (0.2, lambda i, o: 1.0)]
)
def test_two_scales_raise(rms, scale):
    with pytest.raises(ValueError, match="are two scales for one update"):
        muon(1e-3, consistent_rms=rms, update_scale=scale)


def test_no_scale_raises(untyped):
    with pytest.raises(TypeError, match="AdjustedLR, UpdateNorm, FixedScale or a function"):
        muon(1e-3, update_scale="adjusted")


def test_a_traced_scale_is_reported_as_such():
    def traced(rms):
        assert describe_update_scale(AdjustedLR(rms), 4, 4) == "traced"
        return rms

    jax.jit(traced)(0.2)


@pytest.mark.bits
def test_fused_and_stacked_leaves_scale_by_their_own_matrices():
    key = jax.random.key(0)
    whole = jax.random.normal(key, (8, 24))
    options = {"weight_decay": 0.0, "ns_dtype": "float32", "consistent_rms": 0.2}
    fused_tx = muon(1.0, muon_weight_dimension_numbers=FusedBlocks((8, 16)), **options)
    fused, _ = fused_tx.update(whole, fused_tx.init(whole), whole)
    parts = {"a": whole[:, :8], "b": whole[:, 8:]}
    parts_tx = muon(1.0, muon_weight_dimension_numbers=Dims(), **options)
    expected, _ = parts_tx.update(parts, parts_tx.init(parts), parts)
    np.testing.assert_array_equal(fused, jnp.concatenate([expected["a"], expected["b"]], axis=1))
