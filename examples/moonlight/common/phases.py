"""What a program does, said while it does it: its phases, with the time of each."""

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Seconds until a phase's first line where no terminal shows its seconds passing, and between the
# others: a phase that is over before has one line.
FIRST = 1.0
INTERVAL = 5.0

THREAD = "says that a phase goes on"


@contextlib.contextmanager
def phase(console: Console, what: str) -> Iterator[None]:
    """Says what is done, for how long by now, and at the end how long it took.

    A terminal shows the seconds as they pass. Elsewhere (a pipe, a file, a notebook) there is a
    line after `FIRST` seconds and one every `INTERVAL` seconds. A phase that ends in an error has
    no last line: the error's is to be the last.

    Args:
        console: Where it is said.
        what: What is done, such as "compiling the training step".
    """
    started = time.perf_counter()
    with _spinner(console, what) if console.is_terminal else _lines(console, what):
        yield
    _say(console, f"{what}: {time.perf_counter() - started:.1f} s")


def _spinner(console: Console, what: str) -> Progress:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    bar.add_task(what, total=None)
    return bar


@contextlib.contextmanager
def _lines(console: Console, what: str) -> Iterator[None]:
    ended, started = threading.Event(), time.perf_counter()

    def tell() -> None:
        if ended.wait(FIRST):
            return
        _say(console, f"{what} ...")
        due = INTERVAL
        while not ended.wait(max(0.0, started + due - time.perf_counter())):
            _say(console, f"{what} ... {due:.0f} s")
            due += INTERVAL

    # A daemon, so that it can keep no program alive.
    teller = threading.Thread(target=tell, name=THREAD, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
