"""The log: each step once, JSON whatever the numbers are, and no hostage of the weights."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.board import Board


@contextlib.contextmanager
def opened(folder: Path, after_step: int) -> Iterator[tuple[metrics.MetricsLog, io.StringIO]]:
    said = io.StringIO()
    console = Console(file=said, width=1000)
    log = metrics.MetricsLog(folder, after_step=after_step, console=console)
    with contextlib.closing(log):
        yield log, said


def steps(folder: Path) -> list[int]:
    return [r["step"] for r in metrics.read_metrics(folder / metrics.FILE, metrics.TRAIN)]


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """A folder with a log of three steps."""
    with opened(tmp_path, 0) as (log, _):
        for step in (1, 2, 3):
            log.write(metrics.TRAIN, step, {"loss": 1.0 / step})
    return tmp_path


def test_the_log_is_cut_back_to_the_checkpoint(folder: Path):
    path = folder / metrics.FILE
    path.write_text(path.read_text() + '{"kind": "train", "st')  # a kill interrupted it
    with opened(folder, 2) as (log, said):
        assert said.getvalue() == ""
        assert (log.losses(1), log.losses(9)) == ([1 / 2], [1.0, 1 / 2])
    assert steps(folder) == [1, 2]
    assert not (folder / metrics.UNREADABLE).exists()


def test_a_lost_log_leaves_a_gap_and_says_so(folder: Path):
    (folder / metrics.FILE).unlink()
    with opened(folder, 3) as (log, said):
        assert "lacks 3 of the 3 steps behind the checkpoint" in said.getvalue()
        log.write(metrics.TRAIN, 4, {"loss": 0.2})
    assert steps(folder) == [4]


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\xfe\x00", b"[" * 100_000, b"nonsense", b"3", b'{"step": 2}', b'{"kind": "train"}'],
)
def test_a_garbled_log_keeps_what_can_be_read(folder: Path, garbage: bytes):
    path = folder / metrics.FILE
    first, second, third = path.read_bytes().splitlines()
    damaged = b"\n".join([first, garbage, third, second[:9], b""])
    path.write_bytes(damaged)
    with opened(folder, 3) as (_, said):
        assert "2 lines cannot be read and are left out" in said.getvalue()
        assert "lacks 1 of the 3 steps behind the checkpoint, the first is 2" in said.getvalue()
    assert steps(folder) == [1, 3]
    assert (folder / metrics.UNREADABLE).read_bytes() == damaged


def test_a_step_that_was_written_twice_counts_once(folder: Path):
    path = folder / metrics.FILE
    path.write_text(path.read_text() * 2)
    with opened(folder, 3):
        pass
    assert steps(folder) == [1, 2, 3]


def test_the_log_stays_json(tmp_path: Path):
    values = {"loss": float("nan"), "grad_norm": float("inf"), "heads": [1.0, float("-inf")]}
    with opened(tmp_path, 0) as (log, _):
        log.write(metrics.TRAIN, 1, values, {"loss": values["loss"], "rate": 1.0})

    def refuse(name: str):
        pytest.fail(f"{name} is not JSON")

    line = (tmp_path / metrics.FILE).read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "heads": [1.0, None],
    }
    [record] = metrics.read_metrics(tmp_path / metrics.FILE, metrics.TRAIN)
    assert record["loss"] != record["loss"]


def test_a_deleted_log_is_written_again_whole(folder: Path):
    with opened(folder, 3) as (log, said):
        log.write(metrics.TRAIN, 4, {"loss": 0.2})
        log.flush()
        (folder / metrics.FILE).unlink()
        log.write(metrics.TRAIN, 5, {"loss": 0.1})
        log.sync()
        assert steps(folder) == [1, 2, 3, 4, 5]
        assert "was deleted: writing it again" in said.getvalue()
        log.write(metrics.TRAIN, 6, {"loss": 0.1})
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_without_tensorboard(tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with opened(tmp_path, 0) as (log, said):
        log.write(metrics.TRAIN, 1, {"loss": 1.0})
        monkeypatch.setattr(Board, "add", full)
        for step in range(2, 40):  # more than any queue holds
            log.write(metrics.TRAIN, step, {"loss": 1.0})
        assert said.getvalue().count("no longer written: [Errno 28] No space left") == 1
    assert steps(tmp_path) == list(range(1, 40))


def test_tensorboard_reads_what_is_written_and_forgets_what_was_taken_back(tmp_path: Path):
    reader = pytest.importorskip("tensorboardX.record_writer")
    del reader
    board = Board(tmp_path, after_step=7)
    board.add(8, {"train/loss": 2.5})
    board.close()
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    assert b"brain.Event:2" in content
    assert b"train/loss" in content
