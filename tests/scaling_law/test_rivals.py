"""Processes on one folder: no record is lost, no run is trained twice, and no kill holds a run."""

import time
from pathlib import Path

import pytest

from examples.scaling_law.store import CLAIMS, RUNS, Store, read_runs
from tests.scaling_law import rivals, small

pytestmark = pytest.mark.one_stack

TIMEOUT = 240


def started(folder: Path) -> list[tuple[int, int]]:
    """Rival and seed of each training, in the order of their starts."""
    path = folder / rivals.STARTED
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(rival), int(seed)) for rival, seed in map(str.split, lines)]


def wait_until(happened) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_four_writers_lose_nothing(tmp_path: Path):
    writers = [rivals.start("write", tmp_path, rival) for rival in range(4)]
    assert [writer.wait(TIMEOUT) for writer in writers] == [0] * 4
    path = tmp_path / "out" / RUNS
    assert path.read_bytes().count(b"\n") == 4 * rivals.RECORDS
    assert {run.seed for run in read_runs(path)} == set(range(4 * rivals.RECORDS))


def test_pools_share_the_runs_and_take_over_those_of_a_killed_one(tmp_path: Path):
    """The first hangs in its first run; two others train the rest, and then that one."""
    small.write_corpus(tmp_path / "corpus")
    pools = [rivals.start("study", tmp_path, 0, 600)]
    try:
        wait_until(lambda: started(tmp_path))
        ((_, begun),) = started(tmp_path)
        pools += [rivals.start("study", tmp_path, rival, 0.4) for rival in (1, 2)]
        wait_until(lambda: len(started(tmp_path)) == 8)
        # Longer than it takes them to ask again.
        time.sleep(1.5)
        assert [pool.poll() for pool in pools] == [None] * 3
        assert sorted(seed for _, seed in started(tmp_path)) == list(range(8))
        pools[0].kill()
        assert [pool.wait(TIMEOUT) for pool in pools[1:]] == [0, 0]
        ((rival, last),) = started(tmp_path)[8:]
        assert rival in (1, 2) and last == begun
    finally:
        for pool in pools:
            pool.kill()
            pool.wait()
    path = tmp_path / "out" / RUNS
    assert path.read_bytes().count(b"\n") == 8
    assert {run.seed for run in read_runs(path)} == set(range(8))
    assert not list((tmp_path / "out" / CLAIMS).iterdir())


# --- one process ----------------------------------------------------------------------------------


def a_record(seed: int) -> dict:
    return rivals.record(small.RUN.replace(seed=seed), "c")


def test_what_others_have_added_is_read_before_writing(tmp_path: Path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.append(a_record(0))
    second.append(a_record(1))
    assert a_record(0)["key"] in second and a_record(1)["key"] not in first
    first.refresh()
    assert first.records == second.records


def test_a_run_is_claimed_once_until_it_is_given_up(tmp_path: Path):
    first, second = Store(tmp_path), Store(tmp_path)
    key = a_record(0)["key"]
    with first.claim(key) as ours:
        assert ours
        with second.claim(key) as theirs, second.claim("another") as another:
            assert not theirs and another
    with second.claim(key) as theirs:
        assert theirs
        second.append(a_record(0))
    with first.claim(key) as ours:
        assert not ours
    assert first[key] == a_record(0)


@pytest.mark.parametrize("what", ["shortened", "removed"])
def test_records_that_vanish_are_noticed(tmp_path: Path, what: str):
    store = Store(tmp_path)
    for seed in range(2):
        store.append(a_record(seed))
    size = store.path.stat().st_size
    whole = store.path.read_bytes()
    left = whole[: whole.index(b"\n") + 1] if what == "shortened" else b""
    store.path.write_bytes(left) if left else store.path.unlink()
    message = rf"{RUNS} had {size} bytes .* and has {len(left)} now: .* removed finished runs"
    for act in (store.refresh, lambda: store.append(a_record(2))):
        with pytest.raises(RuntimeError, match=message):
            act()
    assert (store.path.read_bytes() if store.path.exists() else b"") == left


def test_a_file_system_without_locks_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def flock(fd: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    for act in (lambda: Store(tmp_path).append(a_record(0)), Store(tmp_path).refresh):
        with pytest.raises(OSError, match=r"cannot lock files.*give --output-dir a fold"):
            act()
