"""A program outlives its terminal."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
import sys, pathlib
from examples.moonlight.common.terminal import make_sturdy
make_sturdy()
from rich.console import Console
console = Console(width=40)
console.rule("a title")
print("\u2500 \u4e2d")
for i in range(4000):
    console.print("line", i)
    print("plain", i)
pathlib.Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize(
    ("shell", "encoding"),
    [
        ("{python} | head -n 1", "utf-8"),
        ("{python} > /dev/full", "utf-8"),
        ("{python} > /dev/full 2> /dev/full", "utf-8"),
        ("{python} >&-", "utf-8"),
        ("{python} > /dev/null", "ascii"),
        ("{python} > /dev/null", "latin-1"),
    ],
)
def test_a_program_outlives_its_terminal(tmp_path: Path, shell: str, encoding: str):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = tmp_path / "done"
    command = f"{sys.executable} {tmp_path / 'program.py'} {done}; echo $? >&2"
    result = subprocess.run(
        shell.format(python=f"({command})"),
        shell=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.read_text() == "done"
    assert result.stderr.strip() in ("0", "")


def test_nothing_is_written_after_an_error_that_left_threads_behind():
    program = """
import atexit
from examples.moonlight.common.program import ThreadsLeft, run_program
atexit.register(print, "what a thread says at the end")
print("a line before it")
def main():
    raise ThreadsLeft("the disk is full")
run_program(main)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout.splitlines() == ["a line before it", "error: the disk is full"]


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_program_whose_reader_has_what_it_wanted_says_nothing(kind: str, buffered: bool):
    """Unbuffered, nothing is left over that a second try at writing would fail on."""
    program = (
        "from examples.moonlight.common.program import run_program\n"
        "run_program(lambda: print('help', flush=True), keeps_programs=False)"
    )
    pair = os.pipe() if kind == "pipe" else [end.detach() for end in socket.socketpair()]
    reader, writer = pair
    os.close(reader)
    command = [sys.executable, *([] if buffered else ["-u"]), "-c", program]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
