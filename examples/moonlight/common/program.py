"""How a program ends at a mistake that is its user's: with one sentence, without a traceback."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from examples.moonlight.common.program_cache import keep_programs

# The examples: the pretraining of Moonlight, and the programs that are built on it.
_OURS = Path(__file__).parents[2]


class ThreadsLeft(OSError):
    """An error that left threads behind, which may still write: nothing shall come after it."""


def run_program(main: Callable[[], object]) -> None:
    """Runs a program; its exit code is 1 at a mistake of its user.

    Such a mistake is an error that the example raises itself, in words for the user, or one that
    the system reports about a file. Any other error keeps its traceback.

    Args:
        main: The program.
    """
    try:
        keep_programs()
        main()
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = isinstance(error, ThreadsLeft) or (
            trace is not None and _OURS in Path(trace.tb_frame.f_code.co_filename).parents
        )
        if not ours and not (isinstance(error, OSError) and error.filename is not None):
            raise
        # Whatever the terminal cannot print, as Python writes it.
        words = f"error: {error}\n".encode(errors="backslashreplace").decode()
        encoding = sys.stderr.encoding or "utf-8"
        sys.stdout.flush()
        sys.stderr.write(words.encode(encoding, "backslashreplace").decode(encoding))
        sys.stderr.flush()
        if isinstance(error, ThreadsLeft):
            os._exit(1)
        sys.exit(1)
