"""What several processes do in the tests of `common/processes`: `python -m` this, with `--what`."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import rich
from jax.experimental import multihost_utils

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.files import read_json
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import everywhere_equal, of_first
from examples.moonlight.common.processes.args import ProcessArgs
from examples.moonlight.common.processes.start import enter
from examples.moonlight.common.program import run_program


@dataclasses.dataclass(frozen=True)
class Args:
    """What is asked for."""

    what: str = "agree"
    """One of `WORK`."""
    processes: ProcessArgs = dataclasses.field(default_factory=ProcessArgs)
    """Which of several processes this one is."""


def agree() -> None:
    """All that processes can ask of each other."""
    assert group.exchange(f"text {group.index()}") == [f"text {i}" for i in range(group.count())]
    assert of_first(group.index) == 0
    everywhere_equal({"a": 1}, "the settings")
    group.barrier()
    local = jnp.ones(2) * group.index()
    sums = multihost_utils.process_allgather(local).sum(axis=1)
    rich.print(f"sums {sums.tolist()} by {group.index()} of {jax.device_count()}")


def differ() -> None:
    """Settings that are not the same."""
    everywhere_equal({"rate": group.index() / 10, "same": 1}, "the settings")


def fail_one() -> None:
    """A user's mistake in one."""
    if group.index() == 1:
        raise_in_words("/nowhere/one.json")
    group.barrier()


def fail_all() -> None:
    """A user's mistake in all."""
    raise_in_words("/nowhere/all.json")


def crash() -> None:
    """A mistake of ours in one, which another waits for in a collective."""
    if group.index() == 1:
        int("x")
    multihost_utils.process_allgather(jnp.ones(2))


def kill_last() -> None:
    """A kill of the last, which the others wait for."""
    if group.index() == group.count() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def kill_first() -> None:
    """A kill of process 0, where JAX's own service is."""
    if group.is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def leave_out() -> None:
    """One that is alive takes no part in a collective."""
    multihost_utils.process_allgather(jnp.ones(2))
    if group.index() == 1:
        time.sleep(600)
    multihost_utils.process_allgather(jnp.ones(2))


def wait() -> None:
    """All wait, to be hurt from outside."""
    rich.print("waiting")
    group.barrier()
    time.sleep(600)


def raise_in_words(path: str) -> None:
    """Raises from the examples' own code, whose errors are in words for users."""
    read_json(Path(path))


WORK: dict[str, Callable[[], None]] = {
    work.__name__: work
    for work in (agree, differ, fail_one, fail_all, crash, kill_last, kill_first, leave_out, wait)
}

if __name__ == "__main__":
    asked = CommandLine("tests.moonlight.process_toy", Args, __doc__).parse()

    def program() -> None:
        enter(asked.processes)
        WORK[asked.what]()

    run_program(program)
