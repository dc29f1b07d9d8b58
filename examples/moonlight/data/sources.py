"""What `--data` and `--mix` say: several sources by name, and their weights in each stage."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A path may hold "=", but then it has a slash or a dot before.
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.DOTALL)


def parse_sources(data: Sequence[str]) -> dict[str, Path | None]:
    """The sources' paths by name; a lone one without a name has "".

    Raises:
        ValueError: Two sources have one name, or one of several has none.
    """
    if not data:
        return {"": None}
    if len(data) == 1 and not _NAMED.fullmatch(data[0]):
        return {"": Path(data[0])}
    sources: dict[str, Path | None] = {}
    for text in data:
        match = _NAMED.fullmatch(text)
        if not match or match[1] in sources:
            raise ValueError(
                f"--data {text}: several sources need a name each, of letters, digits, - and _, "
                "such as --data general=texts/ --data quality=best.jsonl"
            )
        sources[match[1]] = Path(match[2])
    return sources


def parse_mixes(mix: Sequence[str], sources: Mapping[str, Any]) -> list[dict[str, float]]:
    """The weights of every `--mix`.

    Raises:
        ValueError: One cannot be read, or names a source that is not there, or has no weight.
    """
    mixes = []
    for text in mix:
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, _, weight = (word.strip() for word in part.partition("="))
            try:
                value = float(weight)
            except ValueError:
                value = -1.0
            if name not in sources or name in weights or not 0 <= value < float("inf"):
                raise ValueError(
                    f"--mix {text}: cannot read {part!r}. Write the weight of each source once, "
                    f"such as general=9,quality=1; the sources are {', '.join(sources) or 'none'}"
                )
            weights[name] = value
        if not any(weights.values()):
            raise ValueError(f"--mix {text}: no source has a weight above 0")
        mixes.append(weights)
    return mixes
