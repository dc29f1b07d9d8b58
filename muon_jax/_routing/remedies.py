"""The error for leaves whose matrices cannot be known, with the code that declares them."""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from muon_jax._common.paths import Path, show
from muon_jax._routing import names
from muon_jax._routing.roles import Question

Asked = Sequence[tuple[Path, tuple[int, ...], Question]]
_SHOWN = 3


def how_to_declare(
    asked: Asked, others: Sequence[Path], by_name: Sequence[tuple[Path, tuple[int, ...], str]]
) -> str:
    """The message of the error.

    Args:
      asked: the path, the shape and the question of every leaf whose matrices cannot be known.
      others: the paths of all other leaves, which no pattern may find.
      by_name: path, shape and reading of the leaves of three or more axes that were read.

    Returns:
      What is not known, the code that declares it, and what rests on names beside it.
    """
    lines = [f"The matrices in {len(asked)} parameter(s) of three or more axes cannot be known:"]
    lines += listed((path, shape, f"{question.why}.") for path, shape, question in asked)
    lines += [
        "Say which axes are reduced (fan-in) and which are outputs (fan-out); all others are a "
        "batch, and None means AdamW. By their names and shapes they look like this, which only "
        "you can know:",
        f"  muon(..., muon_weight_dimension_numbers={declaration(asked, others)})",
        "If you give rules already, add these to them.",
    ]
    if by_name:
        lines.append("Read by name and shape, and to be looked at while those above are not known:")
        lines += listed(by_name)
    return "\n".join(lines)


def listed(leaves: Iterable[tuple[Path, tuple[int, ...], str]]) -> list[str]:
    """A line for each leaf with its shape and a sentence; those that differ in numbers share it."""
    alike = collections.defaultdict(list)
    for path, shape, text in leaves:
        alike[_no_numbers(show(path)), shape, _no_numbers(text)].append((show(path), text))
    lines = []
    for (_, shape, _), members in alike.items():
        paths = ", ".join(path for path, _ in members[:_SHOWN])
        more = f", ... ({len(members)} of them)" if len(members) > _SHOWN else ""
        lines.append(f"  {paths}{more}, shape {shape}: {members[0][1]}")
    return lines


def declaration(asked: Asked, others: Sequence[Path]) -> str:
    """The code that declares leaves as their questions propose, whole trees or a bare array.

    Args:
      asked: as `how_to_declare` has it.
      others: the paths of all other leaves, which no pattern may find.
    """
    if asked[0][0] == ():
        return _code(asked[0][2].spec)
    groups = collections.defaultdict(list)
    kinds = {}
    for path, shape, question in asked:
        spec = _from_the_end(question.spec, len(shape))
        groups[spec].append("/".join(path))
        kinds.setdefault(spec, question.kind)
    rules = []
    for spec, paths in groups.items():
        outside = ["/".join(path) for path in others]
        outside += [path for other, more in groups.items() if other != spec for path in more]
        rules.append((pattern_for(paths, outside), spec, f"{kinds[spec]}: {len(paths)}"))
    if len(rules) == 1:
        ((pattern, spec, _),) = rules
        return f"muon_jax.by_path({{{code_pattern(pattern)}: {_code(spec)}}})"
    lines = [
        f"    {code_pattern(pattern)}: {_code(spec)},  # {note}" for pattern, spec, note in rules
    ]
    return "\n".join(["muon_jax.by_path({", *lines, "  })"])


def pattern_for(paths: Sequence[str], outside: Sequence[str]) -> str:
    """A regular expression that finds all of `paths` and none of `outside`, as short as may be."""
    # Paths that differ in numbers only are found by the same ends.
    excluded = {end for path in {*map(_no_numbers, outside)} for end in _ends(path)}
    of_path = {path: [e for e in _ends(path) if e not in excluded] for path in paths_alike(paths)}
    waiting, patterns = {path for path, ends in of_path.items() if ends}, []
    while waiting:
        counts = collections.Counter(end for path in waiting for end in of_path[path])
        best = max(counts, key=lambda end: (counts[end], -len(end), end))
        patterns.append(_written(best))
        waiting = {path for path in waiting if best not in of_path[path]}
    # A path that differs from one outside in its numbers only.
    patterns += [f"^{re.escape(p)}$" for p in paths if not of_path[_no_numbers(p)]]
    return "|".join(patterns)


def paths_alike(paths: Sequence[str]) -> list[str]:
    """The paths without their numbers, each once."""
    return [*dict.fromkeys(map(_no_numbers, paths))]


def _no_numbers(path: str) -> str:
    return re.sub(r"\d+", "0", path)


def _ends(path: str) -> list[tuple[str, ...]]:
    """The last parts of a path and their separators, from one part to all; "^" is the whole.

    A generic name such as ``kernel`` has the part above it with it: alone it would find every layer
    that is added later.
    """
    parts = re.findall(r"[^/.]+|[/.]", path)
    starts = [*range(0, len(parts), 2)]
    if len(starts) > 1 and names.GENERIC.fullmatch(parts[-1].lower()):
        starts.pop()
    whole = [("^", *parts)]
    return whole + [("", *parts[start:]) for start in starts]


def _written(end: tuple[str, ...]) -> str:
    text = "".join(re.escape(part).replace("0", r"\d+") for part in end[1:])
    return f"{end[0] or '(^|[/.])'}{text}$"


def _from_the_end(spec: Any, rank: int) -> Any:
    """The same axes of leaves of this rank, written so that equal ones are alike."""
    if spec is None:
        return None

    def written(axes: Any) -> Any:
        several = [a % rank for a in (axes if isinstance(axes, Sequence) else (axes,))]
        return tuple(several) if len(several) > 1 else several[0]

    reduction, output = written(spec.reduction_axis), written(spec.output_axis)
    if (reduction, output) == (rank - 2, rank - 1):
        return MuonDimensionNumbers(-2, -1)
    return MuonDimensionNumbers(reduction, output)


def _code(spec: MuonDimensionNumbers | None) -> str:
    if spec is None:
        return "None"
    return f"muon_jax.MuonDimensionNumbers({spec.reduction_axis}, {spec.output_axis})"


def code_pattern(pattern: str) -> str:
    """The pattern as code."""
    return f'r"{pattern}"' if '"' not in pattern else repr(pattern)
