"""Who am I, who writes, and how one waits for all, and hears from all.

All of it goes through JAX's coordination service, at process 0: no device takes part, so that
processes may wait here for as long as it takes (one that tokenizes a corpus, say), where a
collective would time out. Alone, nothing is exchanged.

Each of these calls is one of all processes, in one order. Who raises between two of them ends the
others: see `watch`.
"""

import itertools
from typing import Any

# The only way to the service's keys and barriers, which Orbax takes as well.
from jax._src import distributed

# Milliseconds. A process that is lost ends a wait, and a program that hangs has no better end.
_PATIENCE = 7 * 24 * 3600 * 1000

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


def _client() -> Any:
    return distributed.global_state.client
