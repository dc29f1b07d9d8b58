"""Checkpoints: which are kept, what damage is noticed, and that nothing is lost for it."""

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from benchmarks.endurance.damage import DAMAGE
from examples.moonlight.common.program import ThreadsLeft
from examples.moonlight.run_folder import seal, storage
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.folder import checkpoints_of, claim_checkpoints
from examples.moonlight.run_folder.lock import MARK, FolderLost
from examples.moonlight.run_folder.reading import (
    check_checkpoint,
    copy_checkpoint,
    read_model,
    read_progress,
)
from examples.moonlight.run_folder.retention import EveryTokens, Retention
from examples.moonlight.run_folder.seal import Damaged
from examples.moonlight.run_folder.storage import folder_at, kept_steps


def test_checkpoints_are_kept_by_every_policy(tmp_path: Path):
    def save(step: int, loss: float) -> None:
        value = {"w": jnp.full(3, step, jnp.float32)}
        kept.save(step, model=value, optimizer=value, progress={"at": step}, val_loss=loss)

    retention = Retention(1, steps=[3], every_tokens=EveryTokens(100, lambda step: 12 * step))
    for losses in (
        {1: 3.0, 2: 1.0, 3: 2.5, 8: 2.4, 9: 2.3},
        # What a killed run left; and the losses of earlier checkpoints are remembered.
        {10: 2.0, 16: 2.1, 18: 2.2, 19: 2.2},
    ):
        kept = Checkpoints(tmp_path, retention)
        for step, loss in losses.items():
            save(step, loss)
        kept.close()
    # The latest, the best, what is asked for, and the first after 100 and 200 tokens.
    kept = Checkpoints(tmp_path, retention)
    assert kept.all_steps() == kept_steps(tmp_path) == [2, 3, 9, 18, 19]
    assert kept.delete_after(9) == [18, 19]
    assert kept_steps(tmp_path) == [2, 3, 9]
    template = {"w": jnp.zeros(3)}
    restored = kept.restore(model=template, optimizer=template)
    assert (restored.step, restored.progress) == (9, {"at": 9})
    np.testing.assert_array_equal(restored.model["w"], np.full(3, 9))
    save(10, 0.5)  # the best, now
    assert kept.all_steps() == [3, 9, 10]
    kept.close()


def test_checkpoints_refuse_what_they_cannot_do(tmp_path: Path):
    with pytest.raises(ValueError, match="--max-to-keep must be at least 1, got 0"):
        Checkpoints(tmp_path, Retention(0))
    checkpoints = Checkpoints(tmp_path, Retention(1))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.restore(model={}, optimizer={})
    checkpoints.close()


def tree(step: int) -> dict:
    return {"w": jnp.full((64, 3), step, jnp.float32), "b": jnp.arange(5.0)}


TEMPLATE = tree(0)


@contextlib.contextmanager
def opened(folder: Path, latest: int = 9) -> Iterator[tuple[Checkpoints, io.StringIO]]:
    """A run's checkpoints, and what they print."""
    said = io.StringIO()
    with contextlib.closing(
        Checkpoints(folder, Retention(latest), Console(file=said, width=1000))
    ) as checkpoints:
        yield checkpoints, said


def save(checkpoints: Checkpoints, step: int, val_loss: float | None = 1.0) -> None:
    value = tree(step)
    checkpoints.save(step, model=value, optimizer=value, progress={"at": step}, val_loss=val_loss)
    checkpoints.wait()


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of steps 10 and 20; to be copied."""
    run = tmp_path_factory.mktemp("whole")
    with opened(run / "checkpoints") as (checkpoints, _):
        for step in (10, 20):
            save(checkpoints, step, 3.0 - step / 10)
    return run


@pytest.fixture(name="run")
def _run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


# What is said of each kind of damage.
SAID = {
    "one bit of the weights": "does not hold the bytes that were saved",
    "one bit of the optimizer": "optimizer/_METADATA does not hold the bytes that were saved",
    "weights cut off": r"bytes, and had [\d,]+ when it was saved",
    "weights of no length": "has 0 bytes",
    "weights grown": "bytes, and had",
    "weights gone": "is missing",
    "model gone": r"model/.* is missing",
    "optimizer gone": r"optimizer/.* is missing",
    "progress gone": r"progress/.* is missing",
    "progress that is no JSON": "progress/metadata has 1 bytes, and had",
    "progress with one bit": "progress/metadata does not hold",
    "a folder in the place of a file": "bytes, and had|does not hold|fails",
    "Orbax' metadata gone": "is missing",
    "an empty folder": "it is empty",
    "a file in its place": r"seal\.json cannot be read \(NotADirectoryError\)",
    "seal gone": r"its seal\.json is missing",
    "seal cut off": r"seal\.json cannot be read \(JSONDecodeError\)",
    "seal that is a list": "cannot be read",
    "seal that says something else": "is not as it was written",
    "another step's": r"its seal\.json is of step 10",
}


def test_every_kind_of_damage_is_tested():
    assert SAID.keys() == DAMAGE.keys()


@pytest.mark.parametrize("kind", SAID)
def test_damage_is_noticed_and_an_older_checkpoint_goes_on(run: Path, kind: str):
    checkpoints = run / "checkpoints"
    message = SAID[kind]
    DAMAGE[kind](checkpoints / "20")

    # Who reads a model is told, which is whole, and how to take it.
    if kind.split()[0] not in ("optimizer", "progress", "Orbax'") and "optimizer" not in kind:
        with pytest.raises(Damaged, match=message) as error:
            read_model(checkpoints, TEMPLATE)
        assert "The checkpoint of step 10 is whole" in str(error.value)
        assert "`--checkpoint 10`" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(Damaged, match=message):
        copy_checkpoint(checkpoints, 20, run / "copy")
    assert not (run / "copy").exists()

    # The run itself goes back, says so, and keeps what was damaged.
    with opened(checkpoints) as (ours, said):
        restored = ours.restore(model=TEMPLATE, optimizer=TEMPLATE)
        assert (restored.step, restored.progress) == (10, {"at": 10})
        np.testing.assert_array_equal(restored.model["w"], tree(10)["w"])
        assert "The checkpoint of step 20 is damaged" in said.getvalue()
        assert "Going back to step 10" in said.getvalue()
        save(ours, 20)
        assert ours.all_steps() == [10, 20]
    [aside] = (run / "damaged").iterdir()
    assert aside.name.startswith("20-")


def test_nothing_begins_anew_where_no_checkpoint_is_whole(run: Path):
    for step in (10, 20):
        DAMAGE["one bit of the weights"](run / "checkpoints" / str(step))
    before = sorted(run.rglob("*"))
    with (
        opened(run / "checkpoints") as (checkpoints, _),
        pytest.raises(Damaged, match=r"no checkpoint is whole, .*step 20, .*step 10, "),
    ):
        checkpoints.restore(model=TEMPLATE, optimizer=TEMPLATE)
    with pytest.raises(Damaged, match="No older checkpoint is whole"):
        read_model(run / "checkpoints", TEMPLATE)
    assert sorted(run.rglob("*")) == before


def test_an_item_is_read_by_itself(run: Path):
    checkpoints = run / "checkpoints"
    (checkpoints / "20" / "optimizer" / "_METADATA").unlink()
    step, model = read_model(checkpoints, TEMPLATE)
    assert step == 20
    np.testing.assert_array_equal(model["w"], tree(20)["w"])
    assert read_progress(checkpoints, 20) == {"at": 20}
    with pytest.raises(Damaged, match="optimizer/_METADATA is missing"):
        check_checkpoint(checkpoints, 20)


def test_best_last_and_steps_are_found(run: Path):
    for which, step in {"last": 20, "best": 20, 10: 10}.items():
        assert read_model(run / "checkpoints", TEMPLATE, which)[0] == step
    with opened(run / "checkpoints") as (checkpoints, _):
        save(checkpoints, 30, 1.5)
        save(checkpoints, 40, None)  # a signal came: nothing was validated
    assert read_model(run / "checkpoints", TEMPLATE, "best")[0] == 20
    for which in ("first", 15):
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint {which}: .* 10, 20, 30"):
            read_model(run / "checkpoints", TEMPLATE, which)


def test_a_save_that_fails_deletes_nothing(run: Path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with opened(run / "checkpoints", latest=1) as (checkpoints, _):
        monkeypatch.setattr(seal, "seal", full)
        with pytest.raises(OSError, match=r"step 30 could not.*No space left.*is of step 20;"):
            save(checkpoints, 30)
        monkeypatch.undo()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]
        save(checkpoints, 30, 0.5)
        assert kept_steps(run / "checkpoints") == [30]


def test_a_folder_that_is_lost_during_a_save_gets_no_checkpoint(run: Path):
    asked = []

    def guard() -> None:
        asked.append(True)
        if len(asked) > 1:  # the first is asked before anything is written
            raise FolderLost("was taken over")

    checkpoints = Checkpoints(run / "checkpoints", Retention(1), guard=guard)
    with contextlib.closing(checkpoints):
        with pytest.raises(FolderLost, match="was taken over"):
            save(checkpoints, 30)
        assert checkpoints.all_steps() == [10, 20]
    assert kept_steps(run / "checkpoints") == [10, 20]


def test_what_fails_behind_a_run_is_raised_at_its_next_call(run: Path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seal, "seal", full)
    with opened(run / "checkpoints") as (checkpoints, _):
        checkpoints.save(30, model=TEMPLATE, optimizer=TEMPLATE, progress={}, val_loss=None)
        while not checkpoints.is_idle:
            time.sleep(0.01)
        with pytest.raises(ThreadsLeft, match=r"step 30 could not.*No space left"):
            checkpoints.check()
        checkpoints.check()  # it was told


def test_a_save_that_fails_raises_one_error_and_logs_no_others(run: Path, monkeypatch, caplog):
    """As Orbax fails: a thread of it goes on, fails too, and logs pages."""
    threads = []

    def fail(*_, **__):
        def fail_later():
            time.sleep(0.2)
            logging.getLogger("absl").error("pages")

        threads.append(threading.Thread(target=fail_later))
        threads[0].start()
        raise ValueError("RESOURCE_EXHAUSTED: Error writing 'x': [os_error_code='28', y: true}']")

    with opened(run / "checkpoints", latest=1) as (checkpoints, _):
        monkeypatch.setattr(checkpoints._orbax, "save", fail)
        with pytest.raises(
            ThreadsLeft, match=r"step 30 could not.*: No space left on device\. The"
        ):
            save(checkpoints, 30)
    assert not threads[0].is_alive()
    assert not caplog.records
    assert not logging.getLogger("absl").disabled


def test_a_checkpoint_has_its_name_once_it_is_sealed_and_on_disk(tmp_path: Path, monkeypatch):
    order = []
    with opened(tmp_path, latest=1) as (checkpoints, _):
        save(checkpoints, 1)

        def record(name: str, function: Callable) -> Callable:
            def call(*args, **kwargs):
                order.append((name, *kept_steps(tmp_path)))
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(seal, "seal", record("seal", seal.seal))
        sync = record("sync", storage.sync)
        for module in (seal, storage):
            monkeypatch.setattr(module, "sync", sync)
        monkeypatch.setattr(storage, "delete", record("delete", storage.delete))
        save(checkpoints, 2, 0.5)
    assert order[0] == ("seal", 1)
    assert order[-2:] == [("sync", 1, 2), ("delete", 1, 2)]
    # Every file and folder of it, and the folder that it lies in.
    entries = 1 + sum(1 for _ in (tmp_path / "2").rglob("*"))
    assert sum(step[0] == "sync" for step in order) == entries + 1


def test_what_a_killed_run_left_is_removed(run: Path):
    checkpoints = run / "checkpoints"
    (checkpoints / ".saving-30" / "model").mkdir(parents=True)
    (checkpoints / ".deleting-5-x").mkdir()
    with opened(checkpoints) as (ours, _):
        assert ours.latest_step() == 20
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "20"]


def test_a_deleted_folder_is_made_again(run: Path):
    with opened(run / "checkpoints") as (checkpoints, _):
        shutil.rmtree(run / "checkpoints")
        save(checkpoints, 30)
    assert kept_steps(run / "checkpoints") == [30]


@pytest.fixture(name="store")
def _store(tmp_path: Path, monkeypatch) -> epath.Path:
    """A prefix of an object store, as far as a folder can be one: nothing in it is renamed."""
    monkeypatch.setattr(storage, "is_remote", lambda path: isinstance(path, epath.Path))
    return epath.Path(tmp_path) / "checkpoints"


def test_in_an_object_store_the_seal_is_what_makes_a_checkpoint(store: epath.Path):
    with opened(store, latest=1) as (checkpoints, _):
        for step, loss in {1: 2.0, 2: 1.0, 3: 3.0}.items():
            save(checkpoints, step, loss)
        assert checkpoints.all_steps() == kept_steps(store) == [2, 3]
    # A kill before the seal leaves what is no checkpoint, and is removed.
    (store / "3" / storage.SEAL).unlink()
    assert kept_steps(store) == [2]
    with opened(store) as (checkpoints, said):
        assert {path.name for path in store.iterdir()} == {"2", MARK}
        save(checkpoints, 4)
        damaged = store / "4" / "progress" / "metadata"
        damaged.write_text("{}")
        restored = checkpoints.restore(model=TEMPLATE, optimizer=TEMPLATE)
        assert (restored.step, restored.progress) == (2, {"at": 2})
        assert "The checkpoint of step 4 is damaged" in said.getvalue()
    assert read_model(store, TEMPLATE)[0] == 2


def test_in_an_object_store_who_came_last_goes_on(store: epath.Path):
    with opened(store) as (first, _):
        save(first, 1)
        with opened(store) as (second, _):
            save(second, 2)
            with pytest.raises(FolderLost, match="was taken over by process"):
                save(first, 3)
            assert kept_steps(store) == [1, 2]


def test_a_place_for_checkpoints_is_read(tmp_path: Path, monkeypatch):
    assert folder_at("runs/a") == Path("runs/a")
    assert folder_at(tmp_path) == tmp_path
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for text, message in {
        "s3://bucket/a": "expected a path or gs://bucket/prefix, got s3://",
        "gs://": "names no bucket",
        "gs://bucket/a": r"needs gcsfs: pip install gcsfs",
    }.items():
        with pytest.raises(ValueError, match=message):
            folder_at(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for text in ("gs://bucket/a", Path("gs://bucket/a")):
        assert str(folder_at(text)) == "gs://bucket/a"


def test_a_place_for_checkpoints_is_one_run_s(tmp_path: Path):
    place, settings = tmp_path / "elsewhere", {"steps": 3, "checkpoint_dir": "x"}
    claim_checkpoints(place, settings, resume=False)
    with pytest.raises(FileExistsError, match="continue it with --resume, or"):
        claim_checkpoints(place, settings, resume=False)
    with pytest.raises(ValueError, match="steps was 3 and is now 4"):
        claim_checkpoints(place, settings | {"steps": 4}, resume=True)
    claim_checkpoints(place, settings, resume=True)
    (place / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected the settings of a run"):
        claim_checkpoints(place, settings, resume=True)
    run = tmp_path / "run"
    run.mkdir()
    assert checkpoints_of(run) == run / "checkpoints"
    (run / "settings.json").write_text(json.dumps({"checkpoint_dir": str(place)}))
    assert checkpoints_of(run) == place
    (run / "settings.json").write_text(json.dumps({"checkpoint_dir": 1}))
    with pytest.raises(ValueError, match="checkpoint_dir: expected a path, got 1"):
        checkpoints_of(run)
