"""A program says what it does while it does it."""

import io
import re
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from examples.moonlight.common import phases


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits for another thread's line."""
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("nothing was said")


def test_a_pipe_gets_lines_while_a_phase_lasts(monkeypatch):
    monkeypatch.setattr(phases, "FIRST", 0.001)
    monkeypatch.setattr(phases, "INTERVAL", 0.002)
    said = io.StringIO()
    with phases.phase(Console(file=said, width=20), "reading [bold] letters of a long name"):
        wait_for(lambda: said.getvalue().count("\n") >= 3)
    first, second, *_, last = said.getvalue().splitlines()
    assert first == "reading [bold] letters of a long name ..."
    assert re.fullmatch(r"reading \[bold\] letters of a long name \.\.\. \d+ s", second)
    assert re.fullmatch(r"reading \[bold\] letters of a long name: \d+\.\d s", last)


def test_a_short_phase_has_one_line():
    said = io.StringIO()
    with phases.phase(Console(file=said), "reading"):
        pass
    assert re.fullmatch(r"reading: \d\.\d s\n", said.getvalue())


def test_a_terminal_shows_the_seconds_and_keeps_the_last_line():
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=60)
    # What a part of it says, and its own bar, stand beside.
    with phases.phase(console, "reading"), phases.phase(console, "a part"):
        console.print("a line of its own")
    shown = said.getvalue()
    assert "0:00:00" in shown and "a line of its own" in shown
    assert re.search(r"a part: \d\.\d s", shown) and re.search(r"reading: \d\.\d s\n$", shown)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_has_the_last_word(terminal: bool, monkeypatch):
    monkeypatch.setattr(phases, "FIRST", 0.001)
    said = io.StringIO()
    ended = phases.phase(Console(file=said, force_terminal=terminal), "reading")
    with pytest.raises(ValueError, match="no such letter"), ended:
        wait_for(lambda: "reading" in said.getvalue())
        raise ValueError("no such letter")
    assert "reading: " not in said.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == phases.THREAD]
