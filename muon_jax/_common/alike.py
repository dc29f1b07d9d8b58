"""Names that differ in numbers only, as one: ``layers.{1..26}.mlp.experts.{0..63}.w1.weight``."""

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

# A number that is a part of a path, or ends one behind an underscore: "layers/0", "layers_0". The
# digit of "w1" and "fc2" is a name.
_NUMBER = re.compile(r"(?:(?<=[/._])|^)\d+(?=[/.]|$)")


def groups_of_alike(named: Iterable[tuple[str, Key]]) -> list[tuple[list[str], Key]]:
    """The names that share a key and differ in numbers only, in the order of their first.

    Args:
      named: names, each with whatever else has to be alike.
    """
    groups: dict[tuple[str, Key], list[str]] = {}
    for name, key in named:
        groups.setdefault((_NUMBER.sub("0", name), key), []).append(name)
    return [(names, key) for (_, key), names in groups.items()]


def one_name(names: Sequence[str]) -> str:
    """All of them as one, with the numbers that differ as ``{0..26}``, ``{0,2}``, or ``*``.

    Args:
      names: names that differ in numbers only.
    """
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    columns = [sorted({*column}) for column in zip(*numbers, strict=True)]
    # Else some combination is missing, and ranges would say that it is there.
    whole = len({*numbers}) == math.prod(map(len, columns))
    texts = iter([_range(column, whole) for column in columns])
    return _NUMBER.sub(lambda _: next(texts), names[0])


def _range(values: list[int], whole: bool) -> str:
    if len(values) == 1:
        return str(values[0])
    if not whole:
        return "*"
    if values == [*range(values[0], values[-1] + 1)]:
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}" if len(values) <= 4 else "*"
