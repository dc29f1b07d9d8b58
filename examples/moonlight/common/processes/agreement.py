"""What all processes have in common: values of each, of the first, and whether they are equal.

What lies in a folder, or is typed, is looked up by the first process and told to the others: a
network file system may show its files late, and not to all hosts at once. Every function here is
called by all processes, in the same order; of one process nothing is asked.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from examples.moonlight.common.processes import group

T = TypeVar("T")

# Seconds that others leave process 0, to say the same first.
_FIRST_SAYS = 5.0


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


def everywhere_equal(value: Any, what: str) -> None:
    """Makes sure that all processes have the same.

    Args:
        value: As JSON can hold it. Of a mapping, what differs is named.
        what: What it is, with which the error begins: "the settings".

    Raises:
        ValueError: In every process: one has another value than process 0.
    """
    mine = json.loads(json.dumps(value, sort_keys=True, default=str))
    first, *others = gather(mine)
    for number, other in enumerate(others, start=1):
        if other != first:
            if not group.is_first():  # one line is enough
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
