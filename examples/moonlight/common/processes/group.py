"""Who am I, who writes, and what all processes have in common.

All of it goes through JAX's coordination service, at process 0: no device takes part, so that
processes may wait here for as long as it takes (one that tokenizes a corpus, say), where a
collective would time out. Alone, nothing is exchanged.

Each of these calls is one of all processes, in one order. Who raises between two of them ends the
others: see `watch`.
"""

import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

# The only way to the service's keys and barriers, which Orbax takes as well.
from jax._src import distributed

# Milliseconds. A process that is lost ends a wait, and a program that hangs has no better end.
_PATIENCE = 7 * 24 * 3600 * 1000

# Seconds that others leave process 0, to say the same first.
_FIRST_SAYS = 5.0

_counter = itertools.count()

# This process's key of the last exchange.
_exchanged: list[str] = []


def count() -> int:
    """How many processes there are."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """Which of them this one is, from 0 on."""
    return distributed.global_state.process_id or 0


def is_first() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return index() == 0


def barrier() -> None:
    """Waits until every process is here.

    It belongs between a compilation, for which one may need a minute more than another, and the
    first call of what was compiled: on CPU, processes wait for each other half a minute there.
    """
    if count() > 1:
        _client().wait_at_barrier(f"barrier/{next(_counter)}", _PATIENCE)


def exchange(text: str) -> list[str]:
    """The texts of all processes, by their numbers."""
    if count() == 1:
        return [text]
    client, folder = _client(), f"exchange/{next(_counter)}"
    client.key_value_set(f"{folder}/{index()}", text)
    client.wait_at_barrier(folder, _PATIENCE)
    # By the service's own order of keys, 10 is before 2.
    found = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(folder)}
    # All are here, so all have read what was exchanged before.
    while _exchanged:
        client.key_value_delete(_exchanged.pop())
    _exchanged.append(f"{folder}/{index()}")
    return [found[i] for i in range(count())]


def of_first(value: Any) -> Any:
    """Process 0's value, in all processes; as JSON can hold it."""
    return json.loads(exchange(json.dumps(value) if is_first() else "")[0])


def everywhere_equal(value: Any, what: str) -> None:
    """Makes sure that all processes have the same.

    Args:
        value: As JSON can hold it. Of a mapping, what differs is named.
        what: What it is, with which the error begins: "the settings".

    Raises:
        ValueError: In every process: one has another value than process 0.
    """
    mine = json.dumps(value, sort_keys=True, default=str)
    first, *others = [json.loads(text) for text in exchange(mine)]
    for number, other in enumerate(others, start=1):
        if other != first:
            if not is_first():  # one line is enough
                time.sleep(_FIRST_SAYS)
            raise ValueError(
                f"{what} must be the same in all processes: {_differences(first, other, number)}. "
                "Start all with the same command, on the same files"
            )


def _differences(first: Any, other: Any, number: int) -> str:
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        return "; ".join(
            f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in process "
            f"{number}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        )
    return f"process 0 has {first!r}, and process {number} has {other!r}"


def _client() -> Any:
    return distributed.global_state.client
