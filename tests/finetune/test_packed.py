"""Samples in one row: none reads another, rope begins anew, and sums of losses add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.moonlight.model import attention
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, ModelSharding, make_mesh
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.packed import Packed
from tests.finetune import lora_toy

# Logits reach 24; measured 1.0e-5.
LOGITS_TOLERANCE = 5e-5
# Sums in another order, over the largest; measured 1.9e-6.
SUM_TOLERANCE = 1e-5

TOKENS, PACKED = lora_toy.packed_rows(8, 24)
TARGETS = np.roll(TOKENS, -1, axis=1)
WEIGHTS = ((PACKED.segment_bt > 0) * np.linspace(0.5, 2, 24)[None]).astype(np.float32)


@pytest.mark.parametrize(("family", "block"), [("dense", None), ("moonlight", 5)])
def test_a_packed_sample_computes_what_it_does_alone(
    family: str, block: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "HOT_LOGIT", 0.5)
    execution = Execution(attention_block=block, monitor=True)
    model = lora_toy.make(lora_toy.FAMILIES[family], execution)
    graphdef, state = nnx.split(model)
    run = jax.jit(
        lambda *args: nnx.merge(graphdef, state)(*args), compiler_options=lora_toy.OPTIONS
    )
    logits, stats = run(TOKENS[:2], jax.tree.map(lambda x: x[:2], PACKED))
    maxima, hots, read = [], [], []
    for row, columns in lora_toy.samples(PACKED):
        if row < 2:
            alone, measured = run(TOKENS[row : row + 1, columns])
            np.testing.assert_allclose(
                logits[row, columns], alone[0], rtol=0, atol=LOGITS_TOLERANCE
            )
            maxima.append(measured.max_logit_lh)
            length = columns.stop - columns.start
            read.append(length * (length + 1) / 2)
            hots.append(measured.hot_share_lh * read[-1])
    # Padding is in no statistic.
    assert 0.1 < stats.hot_share_lh.min() < stats.hot_share_lh.max() < 0.9
    np.testing.assert_allclose(stats.max_logit_lh, np.max(maxima, axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.hot_share_lh, np.sum(hots, axis=0) / sum(read), rtol=1e-5)


@pytest.mark.parametrize("family", lora_toy.FAMILIES)
def test_rope_turns_by_the_positions_that_are_given(family: str):
    """Where samples begin shows in no logit: rope is relative. Positions twice as far apart do."""
    model = lora_toy.make(lora_toy.FAMILIES[family])
    packed = Packed(*(x[:1] for x in PACKED))
    logits, moved, stretched = (
        np.asarray(model(TOKENS[:1], packed._replace(position_bt=position_bt))[0])
        for position_bt in (packed.position_bt, packed.position_bt + 5, 2 * packed.position_bt)
    )
    np.testing.assert_allclose(moved, logits, rtol=0, atol=LOGITS_TOLERANCE)
    assert np.abs(stretched - logits).max() > 0.1


@pytest.mark.parametrize("family", lora_toy.FAMILIES)
def test_another_sample_changes_no_bit(family: str):
    model = lora_toy.make(lora_toy.FAMILIES[family])
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda *args: nnx.merge(graphdef, state)(*args)[0])
    packed = jax.tree.map(lambda x: x[:1], PACKED)
    first, second = [columns for _, columns in lora_toy.samples(packed)][:2]
    other = TOKENS[:1].copy()
    other[:, first] = (other[:, first] + 1) % 62
    before, after = run(TOKENS[:1], packed), run(other, packed)
    np.testing.assert_array_equal(before[:, second], after[:, second])
    assert (np.asarray(before[:, first]) != np.asarray(after[:, first])).all(axis=-1).all()


def sums(family: str, execution: Execution, tokens, targets, weights, packed):
    """The three results of `weighted_loss`, and the gradients of the sum."""
    where = execution.sharding
    model = lora_toy.make(lora_toy.FAMILIES[family], execution)
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)

    def loss_fn(params, *rows):
        total, weight, stats = nnx.merge(graphdef, params, bias).weighted_loss(*rows)
        return total, (weight, stats.hits)

    rows = jax.device_put((tokens, targets, weights, packed), where.place(BATCH_AXES))
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=lora_toy.OPTIONS)
    return run(params, *rows)


def assert_same(found, expected) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(np.abs(theirs).max())
        assert largest > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=SUM_TOLERANCE * largest)


def test_weighted_losses_are_summed_and_hits_counted():
    (total, (weight, hits)), _ = sums("dense", Execution(), TOKENS, TARGETS, WEIGHTS, PACKED)
    model = lora_toy.make(lora_toy.DENSE)
    logits = np.asarray(model(jnp.asarray(TOKENS), PACKED)[0], np.float64)
    log_prob = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_prob, TARGETS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(total, (losses * WEIGHTS).sum(), rtol=1e-6)
    np.testing.assert_allclose(weight, WEIGHTS.sum(), rtol=1e-6)
    right = logits.argmax(axis=-1) == TARGETS
    assert right.any()
    np.testing.assert_allclose(hits, (right * WEIGHTS).sum(), rtol=1e-6)


def test_what_has_no_weight_has_no_gradient():
    weights = WEIGHTS * (np.arange(8) < 4)[:, None]
    targets = np.where(weights > 0, TARGETS, 0)
    half = [x[:4] for x in (TOKENS, TARGETS, WEIGHTS)]
    expected = sums("dense", Execution(), *half, Packed(*(x[:4] for x in PACKED)))
    assert_same(sums("dense", Execution(), TOKENS, targets, weights, PACKED), expected)


@pytest.mark.parametrize(
    ("family", "mesh"),
    [("dense", "data=2,fsdp=2,tensor=2"), ("moonlight", "fsdp=2,expert=2,tensor=2")],
)
def test_sums_and_their_gradients_are_the_same_in_parts_and_on_a_mesh(family: str, mesh: str):
    whole = sums(family, Execution(), TOKENS, TARGETS, WEIGHTS, PACKED)
    run = Execution(loss_block=7, attention_block=9, remat=True)
    rows = (TOKENS, TARGETS, WEIGHTS, PACKED)
    parts = [
        sums(family, run, *jax.tree.map(lambda x, part=part: x[part], rows))
        for part in (slice(0, 3), slice(3, 8))
    ]
    assert_same(jax.tree.map(jnp.add, *parts), whole)
    where = ModelSharding(make_mesh(mesh))
    there = sums(family, Execution(sharding=where, loss_block=7), TOKENS, TARGETS, WEIGHTS, PACKED)
    assert_same(there, whole)


def test_rows_of_other_shapes_are_refused():
    model = lora_toy.make(lora_toy.DENSE)
    with pytest.raises(ValueError, match=r"segment_bt must be an integer array \[8, 24\] like"):
        model(jnp.asarray(TOKENS), Packed(PACKED.segment_bt[:, :-1], PACKED.position_bt))
    with pytest.raises(ValueError, match=r"position_bt must be .* got float32\[8, 24\]"):
        model(jnp.asarray(TOKENS), PACKED._replace(position_bt=WEIGHTS))
    with pytest.raises(ValueError, match=r"weight_bt must have the tokens' shape \[8, 24\], got"):
        model.weighted_loss(jnp.asarray(TOKENS), TARGETS, WEIGHTS[:, 1:])
