"""The first signal is taken down, the second ends the process, whatever it is doing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from examples.moonlight.training.stopping import SIGNALS, Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]

# Holds the interpreter's main thread in C, as a compilation does.
PROGRAM = """
import ctypes, sys
from examples.moonlight.training.stopping import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(int(sys.argv[1])):
        ctypes.CDLL(None).usleep(300_000)
    print("signal", stop.signum, flush=True)
"""


def start(rounds: int, *prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", PROGRAM, str(rounds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_lets_the_work_go_on(number: int):
    process = start(4)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == f"signal {int(number)}\n"
    assert errors.count("stopping as soon as the run can go on from there") == 1


def test_the_second_signal_ends_at_once():
    process = start(1000)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert time.monotonic() - sent < 5
    assert errors.splitlines()[-1] == "ended at once: --resume goes on from the last checkpoint"


def test_a_signal_that_was_ignored_stays_ignored():
    process = start(2, "nohup")
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert out == "signal None\n"


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with StopRequest() as stop:
        stop.check("nothing came")
        assert signal.getsignal(signal.SIGTERM) not in before
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while stop.signum is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(Stopped, match="stopped after step 3") as error:
            stop.check("stopped after step 3")
    assert error.value.signum == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_another_thread_takes_down_nothing():
    seen = []

    def run() -> None:
        with StopRequest() as stop:
            seen.append(stop.signum)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
