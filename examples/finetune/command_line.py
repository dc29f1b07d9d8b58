"""A command line as ms-swift writes it: `--dataset a.jsonl b.jsonl --packing true --lora_rank 8`.

Flags have underscores (hyphens are read, too), lists are separated by spaces, and a boolean has its
value behind it. So a command of ms-swift's documentation can be pasted: what its flags mean here is
in `Args`, and those that mean nothing here are in `foreign_flags.py`. All that is wrong with a
command is said in one message.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from examples.finetune.foreign_flags import Foreign
from examples.moonlight.common.command_line import CommandLine, made, options

Args = TypeVar("Args")

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def parse(
    cls: type[Args],
    argv: Sequence[str] | None = None,
    *,
    aliases: Mapping[str, str],
    foreign: Mapping[str, Foreign],
    shown: CommandLine[Args] | None = None,
) -> Args:
    """Reads a command line, and says which of its flags are ignored.

    Args:
        cls: A dataclass of the program's flags.
        argv: The words behind the program's name; None is the process's.
        aliases: Other names of flags.
        foreign: Flags of ms-swift that have no meaning here.
        shown: What the help and a shell's completion are made of.

    Raises:
        ValueError: Flags are unknown, given twice, refused, or have values that are none; the
            message names all of them.
        SystemExit: The help was asked for, and is printed.
    """
    argv = sys.argv[1:] if argv is None else argv
    if shown is not None and {"-h", "--help"} & {*argv}:
        shown.parse(["--help"])
    if shown is not None and argv and argv[0].startswith("--tyro"):
        shown.parse(argv)
    kinds = {
        field.name: typing.get_type_hints(owner)[field.name] for owner, field, _ in options(cls)
    }
    values: dict[str, Any] = {}
    wrong: list[str] = []
    ignored: list[str] = []
    seen: set[str] = set()
    for name, words in _split(argv, wrong):
        name = aliases.get(name, name)
        if name in seen:
            wrong.append(f"--{name} is given twice")
        seen.add(name)
        if name in kinds:
            try:
                values[name] = _value(kinds[name], words)
            except ValueError as error:
                wrong.append(f"--{name}: {error}")
        elif (entry := _find(name, foreign)) is None:
            wrong.append(_unknown(name, [*kinds, *aliases]))
        elif entry.is_harmless(words):
            ignored.append(f"--{name} is ignored: {entry.why}")
        else:
            wrong.append(f"--{' '.join([name, *words])} means nothing here: {entry.why}")
    if wrong:
        raise ValueError("; ".join(wrong))
    console = Console(stderr=True)  # what a program writes may be piped on
    for line in ignored:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return made(cls, values)


def given(cls: type, argv: Sequence[str], aliases: Mapping[str, str]) -> set[str]:
    """The names of a program's flags that a command line gives."""
    names = {aliases.get(name, name) for name, _ in _split(argv, [])}
    return names & {field.name for field in dataclasses.fields(cls)}


def _split(argv: Sequence[str], wrong: list[str]) -> list[tuple[str, list[str]]]:
    """Flags, each with the words up to the next one."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            wrong.append(f"{word!r} stands before any flag, such as --model {word}")
    return found


def _find(name: str, foreign: Mapping[str, Foreign]) -> Foreign | None:
    """The entry of a flag; one whose name ends in * is for all that begin so."""
    prefixes = (key for key in foreign if key.endswith("*") and name.startswith(key[:-1]))
    return foreign.get(name) or foreign.get(next(prefixes, ""))


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean --{close[0]}?" if close else "--help lists those that there are"
    return f"--{name} is no flag of this program: {advice}"


def _value(kind: Any, words: list[str]) -> Any:
    """The value of a type that words stand for."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not words:
            raise ValueError("give one or more values")
        return tuple(_value(inner[0], [word]) for word in words)
    if origin in (typing.Union, types.UnionType):
        if words and words[0].lower() in ("none", "null"):
            return None
        return _value(next(x for x in inner if x is not types.NoneType), words)
    if len(words) != 1:
        raise ValueError(f"expected one value, got {' '.join(words) or 'none'}")
    [word] = words
    if origin is Literal:
        if word not in inner:
            raise ValueError(f"expected one of {', '.join(inner)}, got {word}")
        return word
    if kind is bool:
        if word.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"expected true or false, got {word}")
        return word.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError as error:
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"expected {what}, got {word}") from error
    return Path(word) if kind is Path else word
