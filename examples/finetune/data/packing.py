"""Samples as rows of one length: several to a row, kept apart by segments, or one to a row.

Segments are numbered 1, 2, ... in a row, and positions count from 0 in each, so that a packed
sample is read as if it were alone. Padding is segment 0.
"""

import bisect
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from examples.finetune.data.template import Sample

Truncation = Literal["delete", "left", "right"]

# Samples that are packed together; a sample waits for none further away.
WINDOW = 1024

# Rows are as long as needed, in steps of this many tokens: one program, little padding.
ROW_STEP = 64


class Rows(NamedTuple):
    """Rows of samples, as arrays of one shape: [rows, t], or with any axes before these.

    Attributes:
        tokens_bt: int32 token ids; 0 where there is padding.
        targets_bt: int32, the next token of the same sample; 0 where none follows.
        weight_bt: float32, 1 on targets that count for the loss, else 0.
        segment_bt: int32, 1, 2, ... for the samples of a row; 0 for padding.
        position_bt: int32, a token's place in its sample, from 0; 0 for padding.
    """

    tokens_bt: np.ndarray
    targets_bt: np.ndarray
    weight_bt: np.ndarray
    segment_bt: np.ndarray
    position_bt: np.ndarray


class PackingReport(NamedTuple):
    """What became of the samples.

    Attributes:
        samples: Samples given.
        used: Samples in rows.
        too_long: Samples longer than a row, which were dropped or cut.
        truncation: Which of the two, and from where.
        uncounted: Samples dropped because none of their targets counts (after the cut).
        tokens: Tokens in rows.
        counted: Targets that count.
        rows: Rows.
        length: Tokens of a row.
        digest: 16 hexadecimal digits over all rows: the same data, template and settings.
    """

    samples: int
    used: int
    too_long: int
    truncation: Truncation
    uncounted: int
    tokens: int
    counted: int
    rows: int
    length: int
    digest: str

    @property
    def fill(self) -> float:
        """Share of the rows that is no padding."""
        return self.tokens / (self.rows * self.length)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [
            f"{self.used:,} of {self.samples:,} samples, {self.tokens:,} tokens, of which "
            f"{self.counted:,} count for the loss",
            f"{self.rows:,} rows of {self.length:,} tokens, {self.fill:.1%} filled",
        ]
        if self.too_long:
            done = "dropped" if self.truncation == "delete" else f"cut at the {self.truncation}"
            lines.append(f"{self.too_long:,} samples are longer than --max_length: {done}")
        if self.uncounted:
            lines.append(f"{self.uncounted:,} samples without a target that counts: dropped")
        return lines


class Packed(NamedTuple):
    """All rows of a dataset, [rows, t], and the report."""

    rows: Rows
    report: PackingReport


def pack(
    samples: Sequence[Sample],
    *,
    max_length: int,
    packing: bool,
    truncation: Truncation = "delete",
) -> Packed:
    """Puts samples into rows.

    Packing is best fit, the longest first, among `WINDOW` samples at a time: the same samples give
    the same rows.

    Args:
        samples: What `template.encode` made.
        max_length: Tokens of a row at most. Rows are shorter, down to a multiple of `ROW_STEP`,
            where no row needs that many.
        packing: Whether a row holds several samples.
        truncation: What happens to a sample longer than a row: it is dropped (`delete`), or loses
            its first tokens (`left`) or its last (`right`).

    Raises:
        ValueError: No sample is left, or an argument has no meaning.
    """
    if truncation not in get_args(Truncation):
        names = ", ".join(get_args(Truncation))
        raise ValueError(f"truncation: expected one of {names}, got {truncation!r}")
    if max_length < 2:
        raise ValueError(f"max_length: a token and a target need at least 2, got {max_length}")
    too_long = sum(len(sample.tokens) > max_length for sample in samples)
    fitting = [cut for sample in samples if (cut := _fit(sample, max_length, truncation))]
    kept = [sample for sample in fitting if any(sample.counts[1:])]
    if not kept:
        raise ValueError(
            f"none of {len(samples)} samples is left: {too_long} are longer than "
            f"--max_length {max_length}, and {len(fitting)} have no target that counts for the loss"
        )
    places = _best_fit([len(sample.tokens) for sample in kept], max_length, packing)
    rows = _fill([[kept[i] for i in place] for place in places], max_length)
    report = PackingReport(
        samples=len(samples),
        used=len(kept),
        too_long=too_long,
        truncation=truncation,
        uncounted=len(fitting) - len(kept),
        tokens=sum(len(sample.tokens) for sample in kept),
        counted=int(rows.weight_bt.sum(dtype=np.int64)),
        rows=len(places),
        length=rows.tokens_bt.shape[1],
        digest=_digest(rows),
    )
    return Packed(rows, report)


def empty_rows(shape: tuple[int, ...]) -> Rows:
    """Rows that are all padding."""
    ids = [np.zeros(shape, np.int32) for _ in range(4)]
    return Rows(ids[0], ids[1], np.zeros(shape, np.float32), ids[2], ids[3])


def _fit(sample: Sample, max_length: int, truncation: Truncation) -> Sample | None:
    if len(sample.tokens) <= max_length:
        return sample
    if truncation == "delete":
        return None
    kept = slice(-max_length, None) if truncation == "left" else slice(max_length)
    return Sample(sample.tokens[kept], sample.counts[kept])


def _best_fit(lengths: Sequence[int], room: int, packing: bool) -> list[list[int]]:
    """The samples of each row: each goes into the fullest row of its window that has room."""
    if not packing:
        return [[i] for i in range(len(lengths))]
    rows: list[list[int]] = []
    for first in range(0, len(lengths), WINDOW):
        window = range(first, min(first + WINDOW, len(lengths)))
        spaces: list[tuple[int, int]] = []  # room left and row, sorted
        for i in sorted(window, key=lambda i: -lengths[i]):
            place = bisect.bisect_left(spaces, (lengths[i], -1))
            if place < len(spaces):
                space, row = spaces.pop(place)
            else:
                space, row = room, len(rows)
                rows.append([])
            rows[row].append(i)
            bisect.insort(spaces, (space - lengths[i], row))
    return rows


def _fill(placed: Sequence[Sequence[Sample]], max_length: int) -> Rows:
    longest = max(sum(len(sample.tokens) for sample in row) for row in placed)
    rows = empty_rows((len(placed), min(max_length, -(-longest // ROW_STEP) * ROW_STEP)))
    for row, samples in enumerate(placed):
        start = 0
        for segment, (tokens, counts) in enumerate(samples, start=1):
            stop = start + len(tokens)
            rows.tokens_bt[row, start:stop] = tokens
            rows.targets_bt[row, start : stop - 1] = tokens[1:]
            rows.weight_bt[row, start : stop - 1] = counts[1:]
            rows.segment_bt[row, start:stop] = segment
            rows.position_bt[row, start:stop] = np.arange(len(tokens))
            start = stop
    return rows


def _digest(rows: Rows) -> str:
    found = hashlib.sha256()
    for array in rows:
        found.update(array.tobytes())
    return found.hexdigest()[:16]
