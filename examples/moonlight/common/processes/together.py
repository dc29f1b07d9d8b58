"""A program as one of several processes, from its command line to its end."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from rich.console import Console

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import everywhere_equal
from examples.moonlight.common.processes.start import enter

Args = TypeVar("Args")
Result = TypeVar("Result")


def work_together(
    main: Callable[[Args], Result],
    args: Args,
    *,
    own: Collection[str] = (),
    underscores: bool = False,
    reads: bool = False,
    console: Console | None = None,
) -> Result:
    """Enters the group, makes sure that all were asked for the same, works, and waits for all.

    Args:
        main: The work.
        args: Its options: a dataclass with the field `processes`.
        own: Options in which processes may differ, such as paths of a host's own disk.
        underscores: Whether flags are spelled with underscores.
        reads: Whether the work reads what is typed in the terminal.
        console: Where process 0 says who works together; None is rich's.

    Raises:
        ValueError: Options differ, or those of processes do not go together.
        RuntimeError: The others cannot be found.
        SystemExit: All that were started here have ended.
    """
    asked: Any = args
    enter(asked.processes, reads=reads, console=console)
    options = dataclasses.asdict(asked)
    mark = "_" if underscores else "-"
    everywhere_equal(
        {
            f"--{name.replace('_', mark)}": value
            for name, value in options.items()
            if name != "processes" and name not in own
        },
        "the options",
    )
    result = main(args)
    # Whoever is done waits here for as long as it takes: at its end, JAX would give the others up.
    group.barrier()
    return result
