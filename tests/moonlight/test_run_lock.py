"""One process works in a run's folder, and notices when it is no longer its own."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.moonlight.run_folder.folder import open_run_folder
from examples.moonlight.run_folder.lock import LOCK, MARK, FolderInUse, FolderLost, RunLock

ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
import sys, time, pathlib
from examples.moonlight.run_folder.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(name="holder")
def _holder(tmp_path: Path):
    """Another process that holds `tmp_path`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path, holder):
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = rf"in use by process {holder.pid} on .*, since 20.*nothing was changed"
    with pytest.raises(FolderInUse, match=message), RunLock(tmp_path):
        pytest.fail("let in")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path) as lock:
        lock.check()
        owner = json.loads((tmp_path / MARK).read_text())
        assert owner["process"] != holder.pid
    assert not (tmp_path / MARK).exists()


def test_a_run_that_is_under_way_is_not_entered(tmp_path: Path):
    settings = {"steps": 12}
    with open_run_folder(tmp_path, settings, resume=True):
        before = (tmp_path / "settings.json").read_bytes()
        with pytest.raises(FolderInUse), open_run_folder(tmp_path, settings, resume=True):
            pytest.fail("let in")
        assert (tmp_path / "settings.json").read_bytes() == before
    with open_run_folder(tmp_path, settings, resume=True) as lock:
        lock.check()


def test_who_is_let_in_by_a_file_system_without_locks_is_found_out(tmp_path: Path):
    with RunLock(tmp_path) as first:
        (tmp_path / LOCK).unlink()  # what is locked is the file, not its name
        with RunLock(tmp_path) as second:
            second.check()
            with pytest.raises(FolderLost, match=r"taken over by process .* it stops here"):
                first.check()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_deleted_is_noticed(tmp_path: Path, again: bool):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLock(folder) as lock:
        shutil.rmtree(folder)
        if again:
            folder.mkdir()
        what = "was used by another process, or made anew," if again else "was deleted or moved"
        with pytest.raises(FolderLost, match=f"{what} while this process worked in it"):
            lock.check()
