"""A run that is stopped, entered twice, or loses its files, and what it goes on from."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rich
from rich.console import Console

from examples.moonlight import train as program
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.lock import FolderInUse, FolderLost, RunLock
from examples.moonlight.run_folder.storage import kept_steps
from examples.moonlight.train import train
from examples.moonlight.training import loop
from examples.moonlight.training.stopping import SIGNALS, Stopped
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy run that nothing interrupted; its run is in `run`."""
    folder = tmp_path_factory.mktemp("whole")
    train(toy.arguments(folder), toy.CONFIG)
    return folder


@pytest.fixture(name="said")
def _said(monkeypatch) -> io.StringIO:
    """What the run prints."""
    said = io.StringIO()
    console = Console(file=said, width=1000)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return said


@pytest.fixture(name="during")
def _during(monkeypatch) -> Callable[[int, Callable[[], object]], None]:
    """Has something happen while a run takes a step, and saves nothing."""
    events: dict[int, Callable[[], object]] = {}
    real = loop.Run._call

    def call(self, state, step, count, buffer_sabt):
        for taken in range(step + 1, step + count + 1):
            if taken in events:
                self.checkpoints.wait()
                events.pop(taken)()
        return real(self, state, step, count, buffer_sabt)

    monkeypatch.setattr(loop.Run, "_call", call)
    return events.__setitem__


def records(folder: Path) -> list[dict]:
    """Every record of a run but its speed."""
    lines = (folder / "run" / metrics.FILE).read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_a_stopped_run_saves_and_goes_on_the_same(tmp_path: Path, whole: Path, during):
    number = signal.SIGTERM
    during(5, send(number))
    with pytest.raises(Stopped, match=r"^stopped after step 7$") as error:
        train(toy.arguments(tmp_path), toy.CONFIG)
    assert error.value.signum == number
    assert kept_steps(tmp_path / "run" / "checkpoints") == [4, 7]
    assert not (tmp_path / "run" / "results.json").exists()
    train(toy.arguments(tmp_path, resume=True), toy.CONFIG)
    assert records(tmp_path) == records(whole)
    toy.assert_same_state(tmp_path / "run", whole / "run")


@pytest.fixture(name="signals_as_before")
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_as_before")
def test_a_stopped_program_says_how_to_go_on(tmp_path: Path, during, monkeypatch, capsys):
    for name in ("stdout", "stderr"):  # the program wraps them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    during(2, send(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        program.main(toy.arguments(tmp_path), toy.CONFIG)
    assert ended.value.code == 128 + signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)  # a second one, while the program ends: no traceback
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped after step 3; the same command with --resume goes on"


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path, whole: Path, during):
    tried = []

    def second() -> None:
        with pytest.raises(FolderInUse, match="in use by process"):
            train(toy.arguments(tmp_path, resume=True), toy.CONFIG)
        tried.append(True)

    during(5, second)
    results = train(toy.arguments(tmp_path), toy.CONFIG)
    assert tried
    assert records(tmp_path) == records(whole)
    assert results["final_val_loss"] == records(whole)[-1]["val_loss"]


def test_results_are_of_the_run_that_writes_them(tmp_path: Path, whole: Path, during):
    """Where a lock does not hold, the first of two runs ends, and writes no results."""

    def second() -> None:
        (tmp_path / "run" / ".lock").unlink()
        with RunLock(tmp_path / "run"):
            pass

    during(11, second)
    with pytest.raises(FolderLost, match="was used by another process"):
        train(toy.arguments(tmp_path), toy.CONFIG)
    assert not (tmp_path / "run" / "results.json").exists()
    assert kept_steps(tmp_path / "run" / "checkpoints") == [4, 8]
    train(toy.arguments(tmp_path, resume=True), toy.CONFIG)
    assert records(tmp_path) == records(whole)


def test_results_do_not_come_from_the_log(tmp_path: Path, whole: Path, during, said):
    run = shutil.copytree(whole / "run", tmp_path / "run")
    before = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    (run / metrics.FILE).unlink()
    (run / "loss.png").unlink()
    again = train(
        toy.arguments(tmp_path, resume=True, data=(str(whole / "corpus.txt"),)), toy.CONFIG
    )
    for name in ("final_val_loss", "best_val_loss", "best_step", "final_val_loss_by_source"):
        assert again[name] == before[name]
    assert "lacks 12 of the 12 steps behind the checkpoint" in said.getvalue()


def test_a_run_whose_newest_checkpoint_is_damaged_ends_the_same(
    tmp_path: Path, whole: Path, during, said
):
    during(10, send(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(toy.arguments(tmp_path), toy.CONFIG)
    newest = tmp_path / "run" / "checkpoints" / "11"
    (newest / "optimizer" / "_METADATA").write_text("{")
    train(toy.arguments(tmp_path, resume=True), toy.CONFIG)
    assert "Going back to step 8, the newest checkpoint that is whole" in said.getvalue()
    assert records(tmp_path) == records(whole)
    toy.assert_same_state(tmp_path / "run", whole / "run")


def test_a_deleted_folder_ends_the_run_at_its_next_save(tmp_path: Path, during):
    during(5, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(FolderLost, match="was deleted or moved while this process"):
        train(toy.arguments(tmp_path), toy.CONFIG)
    assert not (tmp_path / "run").exists()


def test_deleted_checkpoints_are_saved_anew(tmp_path: Path, whole: Path, during, said):
    during(5, lambda: shutil.rmtree(tmp_path / "run" / "checkpoints"))
    train(toy.arguments(tmp_path), toy.CONFIG)
    assert "checkpoints was deleted: it is made again for step 8" in said.getvalue()
    assert kept_steps(tmp_path / "run" / "checkpoints") == [8, 12]
    assert records(tmp_path) == records(whole)


def test_going_back_to_a_damaged_checkpoint_deletes_nothing(tmp_path: Path, whole: Path):
    run = shutil.copytree(whole / "run", tmp_path / "run")
    (run / "checkpoints" / "8" / "seal.json").unlink()
    before = sorted(path for path in run.rglob("*") if path.is_file())
    arguments = toy.arguments(
        tmp_path, resume_step=8, data=(str(whole / "corpus.txt"),), cache_dir=whole / "cache"
    )
    with pytest.raises(ValueError, match=r"checkpoints/8: this checkpoint is damaged: its seal"):
        train(arguments, toy.CONFIG)
    after = sorted(path for path in run.rglob("*") if path.is_file())
    assert [path for path in after if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]
