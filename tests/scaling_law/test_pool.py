"""Processes: found again after a kill, ended with their parent, and never run twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.scaling_law.pool import Pool, describe, estimate
from examples.scaling_law.store import RUNS, Store
from tests.scaling_law import small

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).parents[2]


def children_of(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_study_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path):
    corpus = small.write_corpus(tmp_path / "corpus")
    path = tmp_path / "out" / RUNS
    command = [sys.executable, str(Path(small.__file__)), str(path.parent), str(corpus)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 240
    while not (path.exists() and path.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = children_of(process.pid)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    kept = path.read_text()
    with path.open("a") as file:
        file.write('{"key": "half a li')
    pool = Pool(Store(path.parent), corpus, jobs=1)
    missing = pool.missing(small.runs_to_kill())
    assert len(missing) == len(small.runs_to_kill()) - kept.count("\n")
    records = pool.finish(small.runs_to_kill(), "resumed")
    assert path.read_text().startswith(kept)
    assert len({record["val_loss"] for record in records.values()}) == len(small.runs_to_kill())
    assert Pool(Store(path.parent), corpus, jobs=1).missing(small.runs_to_kill()) == []


def test_a_failing_run_ends_the_study_with_its_error(tmp_path: Path):
    corpus = small.write_corpus(tmp_path / "corpus")
    too_long = small.RUN.replace(tokens=10**6)
    pool = Pool(Store(tmp_path / "out"), corpus, jobs=1)
    with pytest.raises(ValueError, match="give a larger corpus with --data"):
        pool.finish([too_long], "too long")
    assert pool.missing([too_long]) == [too_long]


def test_a_flag_that_xla_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """XLA ends the study's processes for it, and the study says why."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    pool = Pool(Store(tmp_path / "out"), small.write_corpus(tmp_path / "corpus"), jobs=1)
    with pytest.raises(ValueError, match=r"XLA_FLAGS has --xla_no_such_flag=1, which jaxlib \d"):
        pool.finish([small.RUN], "does not begin")


def test_estimates_grow_with_the_run():
    run = small.RUN
    assert estimate(run) < estimate(run.replace(tokens=10 * run.tokens))
    assert estimate(run.replace(optimizer="adamw")) < estimate(run)


def test_a_description_tells_runs_apart():
    run = small.RUN
    others = [run.replace(update_rms=0.4), run.replace(muon_too=("embed",)), run.replace(seed=3)]
    assert len({describe(other) for other in (run, *others)}) == 4
    assert "embed to Muon" in describe(others[1])
