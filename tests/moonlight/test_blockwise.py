"""Attention in blocks: JAX's attention to rounding, half of the products, one block's memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hlo import multiplied
from examples.moonlight.model import attention
from examples.moonlight.model.attention import causal_attention
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.packed import Packed

# Over the largest entry; measured 8.7e-7.
TOLERANCE = 2e-6
ROWS = Packed(
    np.array([[1] * 5 + [2] * 9 + [0] * 3, [1] * 16 + [0]]),
    np.array([[*range(5), *range(9), *range(3)], [*range(16), 0]]),
)


def heads(time: int, *, of_keys: int = 2) -> list[jax.Array]:
    """Queries of four heads, keys of half as many, and values of another width."""
    shapes = (2, time, 4, 6), (2, time, of_keys, 6), (2, time, of_keys, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    return [3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    ("time", "block", "packed"),
    [(16, 4, None), (17, 5, None), (16, 15, None), (17, 1, ROWS), (17, 4, ROWS)],
    ids=["whole blocks", "a last block of 2", "a last block of 1", "single queries", "samples"],
)
def test_blocks_are_jax_s_own_attention_to_rounding(
    time: int, block: int, packed: Packed | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "HOT_LOGIT", 2.0)
    mask_btt = np.tril(np.ones((1, time, time), bool))
    counted_bt = np.ones((2, time), bool)
    if packed is not None:
        mask_btt = mask_btt & (packed.segment_bt[:, :, None] == packed.segment_bt[:, None])
        counted_bt = packed.segment_bt > 0

    def reference(q_bthp: jax.Array, k_bshp: jax.Array, v_bshw: jax.Array) -> jax.Array:
        # It wants values as wide as keys.
        wide = jnp.pad(v_bshw, ((0, 0), (0, 0), (0, 0), (0, 2)))
        mask = mask_btt[:, None]
        return jax.nn.dot_product_attention(q_bthp, k_bshp, wide, mask=mask)[..., :4]

    def ours(q_bthp: jax.Array, k_bshp: jax.Array, v_bshw: jax.Array):
        execution = Execution(attention_block=block, monitor=True)
        return causal_attention(q_bthp, k_bshp, v_bshw, execution, packed)

    args = heads(time)
    weight_bthw = np.random.default_rng(0).normal(size=(2, time, 4, 4)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_grads(which: str, *args: jax.Array) -> Any:
        run = reference if which == "reference" else lambda *a: ours(*a)[0]
        out, vjp = jax.vjp(run, *args)
        return out, vjp(weight_bthw)

    expected, got = (value_and_grads(which, *args) for which in ("reference", "ours"))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=TOLERANCE * float(jnp.abs(a).max()))

    stats = ours(*args)[1]
    q_bthp, k_bshp = args[0], jnp.repeat(args[1], 2, axis=2)
    logit_bhts = np.asarray(jnp.einsum("bthp,bshp->bhts", q_bthp, k_bshp) * 6**-0.5)
    there_bhts = np.broadcast_to((mask_btt & counted_bt[:, :, None])[:, None], logit_bhts.shape)
    largest_h = np.where(there_bhts, logit_bhts, -np.inf).max(axis=(0, 2, 3))
    np.testing.assert_allclose(stats.max_logit_h, largest_h, rtol=1e-6)
    hot_h = (there_bhts & (logit_bhts > 2)).sum(axis=(0, 2, 3)) / there_bhts.sum(axis=(0, 2, 3))
    assert 0.05 < hot_h.min() < hot_h.max() < 0.5
    np.testing.assert_allclose(stats.hot_share_h, hot_h, rtol=1e-6)


def test_logits_far_beyond_the_range_of_powers_stay_numbers():
    q_bthp, k_bshp, v_bshw = heads(16)
    execution = Execution(attention_block=4)
    out, vjp = jax.vjp(
        lambda *args: causal_attention(*args, execution)[0], 1e4 * q_bthp, k_bshp, v_bshw
    )
    # One-hot rows: each output is some value, and no logit matters any more.
    v_bshw = jnp.repeat(v_bshw, 2, axis=2)
    nearest = jnp.abs(out[:, :, None] - v_bshw[:, None]).max(axis=-1).min(axis=2)
    assert float(nearest.max()) < 1e-5
    assert all(bool(jnp.isfinite(g).all()) for g in vjp(out))


def compiled_gradient(time: int, block: int | None, *, layers: int = 1) -> jax.stages.Compiled:
    """The program of a loss and its gradients, of layers in a loop that keep only their input."""
    execution = Execution(attention_block=block)

    def loss(q_bthp: jax.Array, k_bshp: jax.Array, v_bshw: jax.Array) -> jax.Array:
        def layer(q_bthp: jax.Array, _: None) -> tuple[jax.Array, None]:
            out_bthw, _ = causal_attention(q_bthp, k_bshp, v_bshw, execution)
            return q_bthp + jnp.pad(out_bthw, ((0, 0), (0, 0), (0, 0), (0, 2))), None

        if layers == 1:
            return layer(q_bthp, None)[0].sum()
        return jax.lax.scan(jax.checkpoint(layer), q_bthp, None, layers)[0].sum()

    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in heads(time, of_keys=4)]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()


@pytest.mark.parametrize(("layers", "most"), [(1, 8), (3, 20)])
def test_the_logits_of_one_block_exist_at_a_time_forward_and_backward(layers: int, most: int):
    """Of three layers no mask is kept, either; arrays `[b, t, h, .]` are as large as 15 blocks."""

    def temporary_bytes(block: int | None) -> int:
        memory = compiled_gradient(1024, block, layers=layers).memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    block = 2 * 4 * 64 * 64 * 4
    assert temporary_bytes(64) < most * block
    assert temporary_bytes(None) > 256 * block


def test_blocks_behind_the_diagonal_cost_nothing():
    def flops(block: int | None) -> float:
        return multiplied.flops(compiled_gradient(64, block).as_text() or "")

    # Of 8 x 8 blocks 36 are visited. Three products have the width of keys, 6, and three that of
    # values, 4; backward computes the logits again.
    assert flops(8) / flops(None) == pytest.approx(36 / 64 * (4 * 6 + 3 * 4) / (3 * 6 + 3 * 4))
