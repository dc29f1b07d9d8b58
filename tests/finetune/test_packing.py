"""Rows of samples: nothing is lost, nothing crosses, and every epoch reads every row once."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.finetune.data import packing
from examples.finetune.data.batches import steps_per_epoch, train_batches, validation_batches
from examples.finetune.data.packing import Rows, pack
from examples.finetune.data.template import Sample

SAMPLES = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=14).map(
        lambda pairs: Sample([token for token, _ in pairs], [counts for _, counts in pairs])
    ),
    min_size=1,
    max_size=30,
)


def pieces(rows: Rows) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The samples in rows, as their segments show them: tokens, and whether each one counts."""
    found = []
    for tokens, targets, weight, segment, position in zip(*rows, strict=True):
        # Segments are 1, 2, ... and then padding, without holes.
        numbers = segment[segment > 0]
        assert (np.diff(numbers) >= 0).all() and (np.diff(numbers) <= 1).all()
        assert segment[: len(numbers)].all() and numbers[:1].tolist() == [1]
        for array in (tokens, targets, weight, position):
            assert not array[len(numbers) :].any()
        for number in np.unique(numbers):
            (where,) = np.nonzero(segment == number)
            np.testing.assert_array_equal(position[where], np.arange(len(where)))
            np.testing.assert_array_equal(targets[where][:-1], tokens[where][1:])
            assert targets[where][-1] == weight[where][-1] == 0
            counts = (False, *(weight[where][:-1] == 1).tolist())
            found.append((tuple(tokens[where].tolist()), counts))
    return found


def expected(samples, length: int, truncation: str) -> Counter:
    kept = Counter()
    for tokens, counts in samples:
        if len(tokens) > length:
            if truncation == "delete":
                continue
            cut = slice(-length, None) if truncation == "left" else slice(length)
            tokens, counts = tokens[cut], counts[cut]
        if any(counts[1:]):
            kept[tuple(tokens), (False, *counts[1:])] += 1
    return kept


@settings(deadline=None, max_examples=150)
@given(
    SAMPLES,
    st.integers(2, 16),
    st.booleans(),
    st.sampled_from(["delete", "left", "right"]),
    st.integers(1, 8),
)
def test_every_sample_is_in_one_row_whole_and_alone(samples, length, packed, truncation, window):
    whole = expected(samples, length, truncation)
    settings = {"max_length": length, "packing": packed, "truncation": truncation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        if not whole:
            with pytest.raises(ValueError, match=r"none of \d+ samples is left: \d+ are longer"):
                pack(samples, **settings)
            return
        rows, report = pack(samples, **settings)
        assert pack(samples, **settings).report == report
    assert Counter(pieces(rows)) == whole
    assert [array.dtype for array in rows] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    used = sum(whole.values())
    assert report.samples == len(samples)
    assert report.used == used
    assert report.too_long == sum(len(sample.tokens) > length for sample in samples)
    assert report.tokens == sum(len(key[0]) * n for key, n in whole.items())
    assert report.counted == sum(sum(key[1]) * n for key, n in whole.items())
    assert (report.rows, report.length) == rows.tokens_bt.shape
    dropped = report.too_long if truncation == "delete" else 0
    assert report.uncounted == report.samples - used - dropped
    if not packed:
        assert report.rows == used


def sample(length: int, token: int = 1, counts: bool = True) -> Sample:
    return Sample([token] * length, [False] + [counts] * (length - 1))


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    samples = [sample(int(n)) for n in rng.integers(5, 60, 2000)]
    report = pack(samples, max_length=128, packing=True).report
    assert report.fill > 0.99
    single = pack(samples, max_length=128, packing=False).report
    assert single.rows == 2000
    # Of 59 tokens at most: the rows are no longer than the next step of 64.
    assert single.length == 64


def test_rows_are_as_long_as_the_longest_needs():
    lengths = [pack([sample(n)], max_length=100, packing=True).report.length for n in (2, 64, 65)]
    assert lengths == [64, 64, 100]


def test_the_report_says_what_was_left_out():
    samples = [sample(5), sample(9), sample(3, counts=False)]
    said = pack(samples, max_length=6, packing=True).report.lines()
    assert said == [
        "1 of 3 samples, 5 tokens, of which 4 count for the loss",
        "1 rows of 6 tokens, 83.3% filled",
        "1 samples are longer than --max_length: dropped",
        "1 samples without a target that counts: dropped",
    ]
    said = pack(samples, max_length=6, packing=True, truncation="left").report.lines()
    assert said[2] == "1 samples are longer than --max_length: cut at the left"


def test_the_digest_is_of_the_rows():
    digests = {
        pack([sample(5, token)], max_length=length, packing=True).report.digest
        for token, length in ((1, 64), (2, 64), (1, 32))
    }
    assert len(digests) == 3


def test_wrong_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"truncation: expected one of delete, left, right, got 'x"
    ):
        pack([sample(5)], max_length=6, packing=True, truncation="x")  # pyright: ignore
    with pytest.raises(ValueError, match=r"max_length: a token and a target need .* got 1"):
        pack([sample(5)], max_length=1, packing=True)


# --- batches --------------------------------------------------------------------------------------


def rows_of(count: int) -> Rows:
    return pack([sample(3, i + 1) for i in range(count)], max_length=3, packing=False).rows


def batches(count: int = 10, seed: int = 0, micro: int = 2, size: int = 2):
    return train_batches(rows_of(count), micro_batches=micro, batch_size=size, seed=seed)


def first_tokens(batch: Rows) -> list[int]:
    return batch.tokens_bt[..., 0].ravel().tolist()


def test_an_epoch_reads_every_row_once_and_fills_up_with_padding():
    iterator = batches()
    assert steps_per_epoch(rows_of(10), micro_batches=2, batch_size=2) == 3
    epochs = [[next(iterator) for _ in range(3)] for _ in range(3)]
    for epoch in epochs:
        for batch in epoch:
            assert {array.shape for array in batch} == {(2, 2, 3)}
        read = [token for batch in epoch for token in first_tokens(batch)]
        assert sorted(read[:10]) == list(range(1, 11))
        assert read[10:] == [0, 0]
        for array in epoch[-1]:
            assert not array[1].any()
    assert len({tuple(map(tuple, map(first_tokens, epoch))) for epoch in epochs}) == 3
    assert first_tokens(next(batches(seed=1))) != first_tokens(epochs[0][0])


def test_rows_keep_together_what_belongs_together():
    rows = rows_of(7)
    for batch in (next(batches(7)), next(validation_batches(rows, batch_size=3))):
        for arrays in zip(*(array.reshape(-1, 3) for array in batch), strict=True):
            place = arrays[0][0] - 1
            for array, whole in zip(arrays, rows, strict=True):
                np.testing.assert_array_equal(array, whole[place])


@pytest.mark.parametrize("stop", range(8))
def test_a_run_goes_on_with_the_next_batch(stop):
    """At any step, in the middle of an epoch or between two."""
    iterator = batches()
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    following = [first_tokens(next(iterator)) for _ in range(7)]
    resumed = batches()
    next(resumed)
    resumed.set_state(state)
    assert [first_tokens(next(resumed)) for _ in range(7)] == following


def test_the_split_into_micro_batches_changes_no_step():
    whole, split = batches(micro=1, size=4), batches(micro=4, size=1)
    for _ in range(4):
        assert first_tokens(next(whole)) == first_tokens(next(split))


def test_validation_reads_every_row_once_in_order():
    read = list(validation_batches(rows_of(5), batch_size=2))
    assert [first_tokens(batch) for batch in read] == [[1, 2], [3, 4], [5, 0]]
    assert not read[-1].weight_bt[1].any()
