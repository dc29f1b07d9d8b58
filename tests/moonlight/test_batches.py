"""Windows and their order, and the mix of sources: every position follows from one integer."""

import json
from pathlib import Path

import grain
import numpy as np
import pytest

from examples.moonlight.data import batches
from examples.moonlight.data.batches import Span
from examples.moonlight.schedule.stages import make_plan
from examples.moonlight.training.args import Args, resolve

GENERAL, QUALITY = np.arange(4 * 12 + 1), np.arange(1000, 1000 + 4 * 7 + 1)


def windows_of(tokens: np.ndarray, **changes) -> grain.DatasetIterator:
    settings = {"sequence_length": 4, "batch_size": 3, "seed": 0}
    return batches.train_batches({"": tokens}, (), **(settings | changes))


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own():
    iterator = windows_of(GENERAL)
    epochs = [np.concatenate([next(iterator) for _ in range(4)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.dtype == np.int32
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 48, 4))
        np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(5)[None])
    assert (epochs[0] != epochs[1]).any()
    assert (next(windows_of(GENERAL, seed=1)) != epochs[0][:3]).any()


def test_batches_of_one_have_the_same_windows_in_the_same_order():
    ones, threes = windows_of(GENERAL, batch_size=1), windows_of(GENERAL)
    for _ in range(5):
        three = np.concatenate([next(ones) for _ in range(3)])
        np.testing.assert_array_equal(three, next(threes))


@pytest.mark.parametrize("rows", [[0], [0, 2], [1, 2], [0, 1, 2]])
def test_rows_of_every_batch_are_those_of_the_whole_and_so_is_the_position(rows: list[int]):
    whole, part = windows_of(GENERAL), windows_of(GENERAL, rows=rows)
    for _ in range(6):  # an epoch has four
        np.testing.assert_array_equal(next(part), next(whole)[rows])
    # A run may go on with other processes, whose rows are others.
    other = windows_of(GENERAL, rows=[2])
    other.set_state(part.get_state())
    assert part.get_state() == whole.get_state()
    np.testing.assert_array_equal(next(other), next(whole)[[2]])


def mixed(seed: int = 0) -> grain.DatasetIterator:
    """12 windows of one source, 12 of both at 3:1, then of the second alone."""
    spans = [
        Span(12, {"general": 1}),
        Span(12, {"general": 3, "quality": 1}),
        Span(1, {"quality": 0.5, "general": 0}),
    ]
    return batches.train_batches(
        {"general": GENERAL, "quality": QUALITY},
        spans,
        sequence_length=4,
        batch_size=3,
        seed=seed,
    )


def test_every_source_goes_on_through_the_stages_where_it_stopped():
    iterator = mixed()
    read = np.concatenate([next(iterator) for _ in range(16)])
    from_quality = read[:, 0] >= 1000
    assert from_quality[:24].tolist() == 12 * [False] + 3 * [*3 * [False], True]
    assert from_quality[24:].all()
    # Each source on its own reads the same windows in the same order.
    for tokens, rows, seed in ((GENERAL, ~from_quality, 0), (QUALITY, from_quality, 1)):
        alone = windows_of(tokens, seed=seed)
        expected = np.concatenate([next(alone) for _ in range(10)])
        np.testing.assert_array_equal(read[rows], expected[: rows.sum()])
    assert (next(mixed(seed=1)) != read[:3]).any()


def test_a_plans_mixes_go_on_where_only_the_batch_changes():
    recipe = resolve(Args(output_dir=Path(), schedule="moonlight"))
    mixes = [{"b": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}]
    plan = make_plan(recipe, bias_rate=1e-3, mixes=mixes)
    first, second = batches.plan_spans(plan, {"a": 7, "b": 9})
    assert first == (plan.sequences(plan.stage_ends()["decay"]), {"a": 0, "b": 1.0})
    assert second.weights == {"a": 0.5, "b": 0.5}
    assert first.windows + second.windows == plan.sequences(plan.steps)
    read = batches.windows_read([first, second], first.windows + 10)
    assert read == {"a": 5, "b": first.windows + 5}
    by_size = make_plan(recipe, bias_rate=1e-3)
    assert [span.weights for span in batches.plan_spans(by_size, {"a": 7, "b": 9})] == [
        {"a": 7, "b": 9}
    ]


@pytest.mark.parametrize("start", [lambda: windows_of(GENERAL), mixed])
def test_the_position_survives_json_and_continues_exactly(start):
    iterator = start()
    for _ in range(7):
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))
    assert position == {"next_index": 7}
    expected = [next(iterator) for _ in range(9)]
    again = start()
    again.set_state(position)
    np.testing.assert_array_equal([next(again) for _ in range(9)], expected)


def test_a_mix_keeps_its_shares_however_long_it_runs():
    weights = {"a": 5.7, "b": 0.0, "c": 1e-9, "d": 4.3}
    chosen = batches.StagedMix([Span(10**15, weights), Span(1, {"b": 1})], [*weights])
    first = [chosen[n] for n in range(1000)]
    for source in range(4):
        keys = [key for which, key in first if which == source]
        assert keys == list(range(len(keys)))
    assert [sum(which == i for which, _ in first) for i in range(4)] == pytest.approx(
        [570, 0, 0, 430], abs=1
    )
    # A weight that rounds to nothing is read all the same; and far away, the shares hold.
    late = [chosen[10**15 - n] for n in range(1000, 0, -1)]
    assert sum(which == 0 for which, _ in late) == pytest.approx(570, abs=1)
    assert max(key for which, key in late if which == 0) == pytest.approx(5.7e14, rel=1e-5)
    assert chosen[10**15] == (1, 0)
    assert chosen[10**16] == (1, 9 * 10**15)


@pytest.mark.parametrize("weights", [{"web": 1}, {"a": -1, "b": 2}, {"a": 0}, {"a": float("nan")}])
def test_a_mix_of_nothing_is_refused(weights: dict):
    with pytest.raises(ValueError, match="cannot mix the sources a, b by"):
        batches.StagedMix([Span(1, weights)], ["a", "b"])


def test_validation_windows_are_fixed_spread_and_within_the_text():
    def windows(**sources: np.ndarray) -> dict[str, np.ndarray]:
        return batches.validation_windows(sources, sequence_length=9, batch_size=4, count=22)

    long = windows(a=np.arange(1000))["a"]
    assert long.shape == (5, 4, 10)
    assert long[0, 0, 0] == 0
    assert long[-1, -1, -1] == 999
    # One program validates all sources: the smallest decides the batch.
    both = windows(a=np.arange(1000), b=np.arange(28))
    assert {name: array.shape for name, array in both.items()} == {
        "a": (7, 3, 10),
        "b": (1, 3, 10),
    }


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"^4 tokens are fewer than one window of 4"):
        windows_of(np.arange(4))
    with pytest.raises(ValueError, match="4 held-out tokens of the source 'b' are fewer than one"):
        batches.validation_windows(
            {"a": GENERAL, "b": np.arange(4)}, sequence_length=4, batch_size=1, count=1
        )
