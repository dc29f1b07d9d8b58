"""What the processes of a run tell each other, from their main threads.

A network file system may show its files late, and not to all hosts at once: what a folder holds is
looked up by the first process, and told to the others. Every function here is called by all
processes, in the same order; of one process nothing is asked.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# Messages are padded to a power of two of at least so many bytes: each length is another program.
_LEAST = 1024


class ElsewhereFailed(RuntimeError):
    """Another process failed, which says why."""


def gather(value: T) -> list[T]:
    """The values of all processes, in their order.

    Args:
        value: As JSON can hold it.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    room = max(_LEAST, 1 << (int(np.max(lengths)) - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(text, (0, room - text.size)))
    return [
        json.loads(np.asarray(row[:length], np.uint8).tobytes())
        for row, length in zip(rows, np.ravel(lengths), strict=True)
    ]


def of_first(function: Callable[[], T]) -> T:
    """What a function returns in the first process; the others don't call it.

    Args:
        function: Returns what JSON can hold.

    Raises:
        ElsewhereFailed: In the others, where it raised in the first.
    """
    if jax.process_count() == 1:
        return function()
    told: dict[str, Any] = {"failed": ""}
    try:
        if jax.process_index() == 0:
            told["value"] = function()
    except Exception as error:
        told["failed"] = str(error) or type(error).__name__
        gather(told)
        raise
    told = gather(told)[0]
    if told["failed"]:
        raise ElsewhereFailed(f"process 0: {told['failed']}")
    return told["value"]


def together(function: Callable[[], T]) -> T:
    """Calls a function in every process, and fails in all where it fails in one.

    Raises:
        ElsewhereFailed: It raised in another process alone.
    """
    try:
        result, failed = function(), ""
    except Exception as error:
        gather(str(error) or type(error).__name__)
        raise
    for process, failure in enumerate(gather(failed)):
        if failure:
            raise ElsewhereFailed(f"process {process}: {failure}")
    return result
