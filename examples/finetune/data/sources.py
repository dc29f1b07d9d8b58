"""Datasets as the command line names them: `path`, or `path#N` for N of its conversations."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.finetune.data.conversations import Conversation, Malformed, parse_record
from examples.finetune.data.order import shuffled
from examples.moonlight.common.json_text import parse_json
from examples.moonlight.common.untrusted import MEBIBYTE, check_file, is_there, shown, shown_name

# In bytes: a line that never ends is no record.
MAX_LINE = 16 * MEBIBYTE

_BOM = b"\xef\xbb\xbf"


class Source(NamedTuple):
    """A file, and the number of conversations to take; None is all of them, once."""

    path: Path
    number: int | None


class SourceReport(NamedTuple):
    """What became of one file.

    Attributes:
        path: The file.
        read: Conversations in it.
        used: Conversations taken; more than there are repeat some.
        malformed: Lines that were skipped, by reason.
        examples: The first such line of each reason, as the error that it would have been.
    """

    path: Path
    read: int
    used: int
    malformed: dict[str, int]
    examples: dict[str, str]

    def lines(self) -> list[str]:
        """The report for people."""
        said = f"{shown_name(self.path)}: {self.used:,} of {self.read:,} conversations"
        if self.used > self.read:
            said += f", each {self.used // self.read} or {-(-self.used // self.read)} times"
        for reason, count in sorted(self.malformed.items()):
            said += f"\n  {count:,} skipped ({reason}), as {self.examples[reason]}"
        return said.split("\n")


class Loaded(NamedTuple):
    """The conversations of all sources, one source after the other, and a report on each."""

    conversations: list[Conversation]
    reports: list[SourceReport]


def parse_source(text: str) -> Source:
    """Reads `path` or `path#N`.

    Raises:
        ValueError: N is no number, or 0.
    """
    path, mark, count = text.rpartition("#")
    if not mark or (is_there(Path(text)) and not re.fullmatch("[0-9]+", count)):
        return Source(Path(text), None)
    if not re.fullmatch("[0-9]{1,12}", count) or int(count) == 0 or not path:
        raise ValueError(
            f"--dataset {shown_name(text)}: expected a path, or path#N with N conversations to "
            f"take, from 1 up; got {shown(count)} after the #"
        )
    return Source(Path(path), int(count))


def load_conversations(
    sources: Sequence[str], *, seed: int, skip_malformed: bool = False
) -> Loaded:
    """Reads datasets.

    N of a file's conversations are the first N of an endless series, in which every run through the
    file has an order of its own: they differ as long as there are enough, and each occurs about as
    often as any other when there are not.

    Args:
        sources: Each `path` or `path#N`.
        seed: Chooses among a file's conversations.
        skip_malformed: Whether lines that are no conversation are counted and left out; otherwise
            the first raises.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A source is no `path#N`, a file has no conversation, or has a line longer than
            `MAX_LINE`.
        Malformed: A line is no conversation, unless they are skipped.
    """
    conversations, reports = [], []
    for place, source in enumerate(map(parse_source, sources)):
        read, malformed, examples = _read_file(source.path, skip_malformed)
        if not read:
            raise ValueError(
                f"{shown_name(source.path)}: no conversation in it ({sum(malformed.values())} "
                "lines were skipped): leave the file out"
            )
        used = read
        if source.number is not None:
            order = shuffled(len(read), seed=seed + place)
            used = [read[order(i)] for i in range(source.number)]
        conversations += used
        reports.append(SourceReport(source.path, len(read), len(used), malformed, examples))
    return Loaded(conversations, reports)


def hold_out(
    conversations: Sequence[Conversation], share: float, *, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Parts conversations into those to train on and those to validate with, at least one each.

    Those from the same line, which a `path#N` may repeat, go to the same part.

    Args:
        conversations: What `load_conversations` read.
        share: The share of the lines that is held out, above 0 and below 1.
        seed: Chooses them.

    Raises:
        ValueError: There is only one line, or the share is none.
    """
    origins = list(dict.fromkeys(conversation.origin for conversation in conversations))
    if not 0 < share < 1 or len(origins) < 2:
        raise ValueError(
            f"cannot hold out {share:g} of {len(origins)} conversations: give a share between 0 "
            "and 1, and two conversations or more"
        )
    count = min(max(1, round(share * len(origins))), len(origins) - 1)
    order = shuffled(len(origins), seed=seed)
    held = {origins[order(i)] for i in range(count)}
    return (
        [each for each in conversations if each.origin not in held],
        [each for each in conversations if each.origin in held],
    )


def _read_file(
    path: Path, skip_malformed: bool
) -> tuple[list[Conversation], dict[str, int], dict[str, str]]:
    read, malformed, examples = [], Counter(), {}
    for number, line in _lines(path):
        try:
            read.append(_parse_line(line, path, number))
        except Malformed as error:
            if not skip_malformed:
                raise
            malformed[error.reason] += 1
            examples.setdefault(error.reason, str(error))
    return read, dict(malformed), examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, by number."""
    if not is_there(path):
        raise FileNotFoundError(f"{shown_name(path)}: no such file; give one of conversations")
    left = check_file(path)
    with path.open("rb") as file:
        number = 0
        # No further than the file was long: some files never end.
        while left > 0 and (line := file.readline(min(MAX_LINE + 1, left))):
            number, left = number + 1, left - len(line)
            if len(line) > MAX_LINE:
                raise ValueError(
                    f"{shown_name(path)}, line {number}: longer than {MAX_LINE:,} bytes: expected "
                    "one record a line"
                )
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, line


def _parse_line(line: bytes, path: Path, number: int) -> Conversation:
    origin = f"{shown_name(path)}, line {number}"
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the line is {line[error.start]:#04x}"
        raise Malformed(origin, "not UTF-8", detail) from error
    try:
        record = parse_json(text, path, line=number)
    except ValueError as error:
        detail = str(error).removeprefix(f"{origin}: ") + "; expected an object a line"
        raise Malformed(origin, "no JSON", detail) from error
    return parse_record(record, origin)
