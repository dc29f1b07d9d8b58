"""How a program ends at a mistake that is its user's: with one sentence, without a traceback."""

import dis
import errno
import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.start import fail
from examples.moonlight.common.program_cache import keep_programs

# A flag of every program: its errors keep their traceback.
TRACEBACK = "--traceback"

_ROOT = Path(__file__).parents[3]
_OURS = (_ROOT / "examples", _ROOT / "benchmarks", _ROOT / "muon_jax")

# Remedies for what the system reports.
_REMEDIES = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.EDQUOT: "make room there, or write elsewhere",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a file or folder that you may use, or change its permissions",
    errno.EPERM: "choose a file or folder that you may use, or change its permissions",
    errno.ENOENT: "check the path, or make the folder first",
    errno.ENOTDIR: "a part of the path is a file: choose another one",
    errno.EEXIST: "choose another name, or remove it",
    errno.EISDIR: "give a file",
}


class ThreadsLeft(OSError):
    """An error that left threads behind, which may still write: nothing shall come after it."""


def run_program(main: Callable[[], object], *, keeps_programs: bool = True) -> None:
    """Runs a program; its exit code is 1 at a mistake of its user, and 130 after Ctrl-C.

    Such a mistake is an error that this project's code raises in words for the user, one that the
    system reports about a file, or a device whose memory is too small. On a terminal its message
    stands in a frame; in a pipe or a log it is a line that begins with "error:". Any other error
    keeps its traceback, and so does every one with `--traceback`.

    Args:
        main: The program. It does not find `--traceback` in `sys.argv`.
        keeps_programs: Whether compiled programs are kept for the next start.
    """
    whole = TRACEBACK in sys.argv
    sys.argv = [word for word in sys.argv if word != TRACEBACK]
    try:
        if keeps_programs:
            keep_programs()
        main()
    except KeyboardInterrupt as error:
        if type(error) is not KeyboardInterrupt or whole:
            raise
        _tell("stopped", "stopped", style="yellow")
        # Past the interpreter's end: XLA, interrupted while it compiled, crashed there.
        os._exit(130)
    except BrokenPipeError as error:
        if not _reader_left():
            _end(error, whole)
        sys.exit(1)
    except Exception as error:
        _end(error, whole)


def _end(error: Exception, whole: bool) -> None:
    """Ends the process with the words of a foreseen error; raises any other.

    One of several processes tells the others, and waits for nobody, as Python's own end would.
    """
    words = None if whole else _words(error)
    if group.count() > 1:
        fail(words or repr(error))
        if words is None:
            traceback.print_exception(error)
        else:
            _tell("error", words, style="red")
        sys.stderr.flush()
        os._exit(1)
    if words is None:
        raise error
    _tell("error", words, style="red")
    if isinstance(error, ThreadsLeft):
        os._exit(1)
    sys.exit(1)


def _words(error: Exception) -> str | None:
    """What a foreseen error says to a user; None of any other."""
    if isinstance(error, ThreadsLeft) or _is_raised_by_us(error.__traceback__):
        foreseen = isinstance(error, ValueError | OSError | ArithmeticError | RuntimeError)
        return str(error) if foreseen else None
    if isinstance(error, OSError) and error.errno is not None:
        said = error.strerror or os.strerror(error.errno)
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        remedy = _REMEDIES.get(error.errno)
        return where + said + (f"; {remedy}" if remedy else "")
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and first.startswith("RESOURCE_EXHAUSTED")
    ):
        said = first.removeprefix("RESOURCE_EXHAUSTED:").strip()
        return f"out of memory ({said or 'on the host'}): take fewer or shorter texts at a time"
    return None


def _is_raised_by_us(trace: TracebackType | None) -> bool:
    """Whether an error comes from a `raise` of this project, and not from an expression there.

    `raise ValueError("--steps ...")` is in words for a user; `int("x")` and `1 / 0`, whose
    tracebacks end in the same place, are not.
    """
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    ours = any(folder in Path(code.co_filename).parents for folder in _OURS)
    return ours and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _tell(title: str, words: str, *, style: str) -> None:
    """Writes to the standard error; whatever it cannot print, as Python writes it."""
    if sys.stderr is None:
        return
    encoding = sys.stderr.encoding or "utf-8"
    words = words.encode(errors="backslashreplace").decode()
    words = words.encode(encoding, "backslashreplace").decode(encoding)
    if sys.stdout is not None:
        sys.stdout.flush()
    if sys.stderr.isatty():
        hint = Text(f"{TRACEBACK} shows where", style="dim") if title == "error" else None
        panel = Panel(Text(words), title=title, title_align="left", border_style=style)
        panel.subtitle, panel.subtitle_align = hint, "right"
        Console(stderr=True).print(panel)
    else:
        sys.stderr.write(words + "\n" if words == title else f"{title}: {words}\n")
    sys.stderr.flush()


def _reader_left() -> bool:
    """Whether whoever read the standard output is gone; nothing more is written to it then."""
    output = 1  # its file, whatever `sys.stdout` is
    # What could not be written may be lost already, so that another try would find no fault.
    watched = select.poll()
    watched.register(output, 0)
    gone = select.POLLERR | select.POLLHUP  # of a pipe, and of a socket
    if not any(event & gone for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
