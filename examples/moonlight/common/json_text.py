"""JSON from elsewhere: what its grammar and Python's reader let pass, and nobody means.

Two values under one key, numbers that are none, halves of characters, brackets without end: each is
refused with file and line, or field, in a time that grows with the file and no faster.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.moonlight.common.untrusted import (
    MEBIBYTE,
    lone_surrogate,
    read_text,
    shown,
    shown_name,
)

# Of a file that is one value, in bytes. A published index of 100,000 tensors has 10 MB.
MAX_JSON = 64 * MEBIBYTE

# A configuration is nested 4 deep.
MAX_DEPTH = 64

# Python itself refuses integers of more than 4300 digits, without saying where they are.
_MAX_DIGITS = 1000


def parse_json(text: str, path: Path, *, line: int | None = None) -> Any:
    """A JSON value, of which no object has a key twice.

    Args:
        text: The JSON.
        path: The file, for messages.
        line: Its line in a file of one value a line; None if it is the whole file.

    Raises:
        ValueError: It is none; the message names file and line.
    """
    name = shown_name(path)
    where = name if line is None else f"{name}, line {line}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            again = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{where}: {shown(again)} occurs twice; keep one of them")
        return found

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            place = f"{name}, line {line or 1 + text.count(chr(10), 0, text.find(digits))}"
            raise ValueError(f"{place}: a number of {len(digits):,} digits, {digits[:20]}...")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=integer)
    except json.JSONDecodeError as error:
        place = f"{name}, line {line or error.lineno}"
        raise ValueError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: brackets are nested too deep to be read") from error


def check_plain(content: Any, path: Path) -> None:
    """Checks what JSON's grammar lets through: depth, numbers, and halves of characters.

    Raises:
        ValueError: A value is nested more than `MAX_DEPTH` deep, a number is NaN or infinite, or a
            text holds a lone surrogate; the message names file and field.
    """
    stack: list[tuple[Any, str, int]] = [(content, "", 0)]
    while stack:
        value, field, depth = stack.pop()
        where = f"{shown_name(path)}: {shown_name(field) + ': ' if field else ''}"
        if depth > MAX_DEPTH:
            raise ValueError(f"{where}nested more than {MAX_DEPTH} deep")
        if isinstance(value, str) and (at := lone_surrogate(value)) is not None:
            raise ValueError(
                f"{where}a lone surrogate, {value[at]!a}, which is no character: remove it"
            )
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ValueError(f"{where}{value} is no finite number")
        if isinstance(value, dict):
            for key, inner in value.items():
                if not key.isascii() and lone_surrogate(key) is not None:
                    raise ValueError(f"{where}the key {shown(key)} has a lone surrogate: remove it")
                stack.append((inner, f"{field}.{key}" if field else key, depth + 1))
        elif isinstance(value, list):
            stack += [(inner, field, depth + 1) for inner in value]


def read_jsonl(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that has one `{"FIELD": "..."}` a line, by number; other fields are free.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is no UTF-8 text; or as `parse_jsonl`.
    """
    return parse_jsonl(read_text(path), path, field)


def parse_jsonl(text: str, path: Path, field: str, *, start: int = 1) -> Iterator[tuple[int, str]]:
    """The same, of a text that was read already.

    Args:
        text: The file's content.
        path: The file, for messages.
        field: What is read of each line's object.
        start: The number of the text's first line.

    Raises:
        ValueError: A line does not hold such an object, or half a character in its text; the
            message names file and line.
    """
    for number, line in enumerate(text.split("\n"), start):
        if not line.strip():
            continue
        record = parse_json(line, path, line=number)
        where = f"{shown_name(path)}, line {number}"
        if not isinstance(record, dict) or not isinstance(value := record.get(field), str):
            raise ValueError(f'{where}: expected an object {{"{field}": "..."}}, got {shown(line)}')
        if (at := lone_surrogate(value)) is not None:
            raise ValueError(
                f"{where}: the {field} has a lone surrogate, {value[at]!a}, at character {at}, "
                "which is no character and has no UTF-8: remove or replace it"
            )
        yield number, value
