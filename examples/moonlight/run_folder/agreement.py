"""What the processes of a run tell each other of the run's folder.

A network file system may show its files late, and not to all hosts at once: what a folder holds is
looked up by the first process, and told to the others. Every function here is called by all
processes, in the same order; of one process nothing is asked.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from examples.moonlight.common.processes import group

T = TypeVar("T")


class ElsewhereFailed(RuntimeError):
    """Another process failed, which says why."""


def gather(value: T) -> list[T]:
    """The values of all processes, in their order.

    Args:
        value: As JSON can hold it.
    """
    if group.count() == 1:
        return [value]
    return [json.loads(text) for text in group.exchange(json.dumps(value))]


def of_first(function: Callable[[], T]) -> T:
    """What a function returns in the first process; the others don't call it.

    Args:
        function: Returns what JSON can hold.

    Raises:
        ElsewhereFailed: In the others, where it raised in the first.
    """
    if group.count() == 1:
        return function()
    told: dict[str, Any] = {"failed": ""}
    try:
        if group.is_first():
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
