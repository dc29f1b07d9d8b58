"""Finished runs survive whatever kills the process that writes the next one."""

import json
import math
from pathlib import Path

import pytest

from examples.scaling_law.protocol import Run, to_json
from examples.scaling_law.store import RUNS, Store, read_runs

RUN = Run(part="study", layers=2, tokens=5_000, batch=4, learning_rate=4e-3, optimizer="muon")


def record(seed: int, *, corpus: str = "c0", val_loss: float | None = 2.5, **more) -> dict:
    run = RUN.replace(seed=seed)
    return {"key": run.key(corpus), "corpus": corpus, "run": to_json(run), "val_loss": val_loss} | (
        more
    )


def fill(folder: Path, *records: dict) -> Store:
    store = Store(folder)
    for each in records:
        store.append(each)
    return store


# --- what is written is found again ---------------------------------------------------------------


def test_a_new_store_is_empty_and_makes_its_folder_when_it_writes(tmp_path):
    store = Store(tmp_path / "a" / "b")
    assert store.records == {} and RUN.key("c0") not in store
    assert not (tmp_path / "a").exists()
    store.append(record(0))
    assert store.path == tmp_path / "a" / "b" / RUNS and store.path.exists()


def test_appended_records_are_there_at_once_and_when_reopened(tmp_path):
    records = [record(seed, curve=[3.0, 2.75], note="一") for seed in range(3)]
    store = fill(tmp_path, *records)
    for found in (store, Store(tmp_path)):
        assert list(found.records.values()) == records
        for each in records:
            assert each["key"] in found and found[each["key"]] == each
    assert "nothing" not in store


def test_a_reopened_store_appends_behind_what_is_there(tmp_path):
    fill(tmp_path, record(0))
    before = (tmp_path / RUNS).read_bytes()
    fill(tmp_path, record(1))
    after = (tmp_path / RUNS).read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 2
    assert list(Store(tmp_path).records) == [record(0)["key"], record(1)["key"]]


def test_every_record_is_on_one_line(tmp_path):
    fill(tmp_path, *(record(seed, note="two\nlines\u2028three") for seed in range(3)))
    lines = (tmp_path / RUNS).read_text().splitlines()
    assert [json.loads(line)["run"]["seed"] for line in lines] == [0, 1, 2]


def test_what_json_cannot_hold_is_not_written(tmp_path):
    store = fill(tmp_path, record(0))
    before = store.path.read_bytes()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.append(record(1, val_loss=value))
    assert store.path.read_bytes() == before
    assert record(1)["key"] not in store


# --- what a killed process leaves -----------------------------------------------------------------


def test_half_a_line_is_taken_off_wherever_it_ends(tmp_path):
    store = fill(tmp_path, record(0), record(1))
    whole = store.path.read_bytes()
    kept = whole[: whole.index(b"\n") + 1]
    for end in range(len(kept), len(whole)):
        store.path.write_bytes(whole[:end])
        reopened = Store(tmp_path)
        assert list(reopened.records) == [record(0)["key"]]
        assert len(read_runs(store.path)) == 1
        assert store.path.read_bytes() == whole[:end]
        reopened.append(record(2))
        assert store.path.read_bytes().startswith(kept)
        assert list(Store(tmp_path).records) == [record(0)["key"], record(2)["key"]]


def test_half_of_the_only_line_is_taken_off(tmp_path):
    store = fill(tmp_path, record(0))
    store.path.write_bytes(store.path.read_bytes()[:40])
    reopened = Store(tmp_path)
    assert reopened.records == {}
    reopened.append(record(1))
    assert list(read_runs(store.path)) == [RUN.replace(seed=1)]


def test_two_studies_may_write_into_one_folder(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    for seed, store in enumerate((first, second, first, second)):
        store.append(record(seed))
    assert len(read_runs(first.path)) == 4


def test_the_run_that_was_torn_can_be_repeated(tmp_path):
    store = fill(tmp_path, record(0), record(1))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-10])
    fill(tmp_path, record(1))
    assert store.path.read_bytes() == whole
    assert len(read_runs(store.path)) == 2


def test_a_whole_file_is_left_as_it_is(tmp_path):
    store = fill(tmp_path, record(0), record(1))
    before = store.path.read_bytes()
    Store(tmp_path)
    assert store.path.read_bytes() == before


# --- what is not a record -------------------------------------------------------------------------


def broken(**change) -> str:
    return json.dumps({**record(1), **change})


def without(name: str) -> str:
    return json.dumps({key: value for key, value in record(1).items() if key != name})


@pytest.mark.parametrize(
    "line, message",
    [
        (broken()[:50], r"line 2: not the record of a run"),
        ("", r"line 2: not the record of a run"),
        ("3", r"line 2: not the record of a run"),
        ("[]", r"line 2: not the record of a run"),
        (broken(run=None), r"line 2: not the record of a run"),
        (broken(run={}), r"line 2: not the record of a run .*missing"),
        (broken(run={**to_json(RUN), "layers": 0}), r"line 2: not .*layers must be at least 1"),
        (broken(run={**to_json(RUN), "depth": 2}), r"line 2: not .*'depth'"),
        (without("run"), r"line 2: not the record of a run \('run'\)"),
        (without("key"), r"line 2: no key"),
        (without("val_loss"), r"line 2: no val_loss"),
        (without("corpus"), r"line 2: no corpus"),
    ],
)
def test_a_broken_line_between_others_raises_and_is_kept(tmp_path, line, message):
    path = tmp_path / RUNS
    path.write_text(f"{json.dumps(record(0))}\n{line}\n{json.dumps(record(2))}\n")
    before = path.read_bytes()
    for read in (lambda: Store(tmp_path), lambda: read_runs(path)):
        with pytest.raises(ValueError, match=rf"{RUNS}, {message}"):
            read()
    assert path.read_bytes() == before


# --- by what was run ------------------------------------------------------------------------------


def test_runs_are_found_by_what_was_run(tmp_path):
    store = fill(tmp_path, record(0, val_loss=2.0), record(1, val_loss=None))
    found = read_runs(store.path)
    assert found == {RUN: record(0, val_loss=2.0), RUN.replace(seed=1): record(1, val_loss=None)}


def test_runs_of_several_corpora_are_told_apart(tmp_path):
    store = fill(tmp_path, record(0, corpus="c0"), record(0, corpus="c1", val_loss=2.0))
    with pytest.raises(ValueError, match="runs on the corpora c0, c1: report one of them"):
        read_runs(store.path)
    assert read_runs(store.path, "c1") == {RUN: record(0, corpus="c1", val_loss=2.0)}


def test_runs_of_another_version_are_left_out(tmp_path):
    old = record(0) | {"key": "0123456789abcdef"}
    assert read_runs(fill(tmp_path, old, record(1)).path) == {RUN.replace(seed=1): record(1)}


def test_a_file_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_runs(tmp_path / RUNS)
