"""From token streams to batches: windows, their order in every epoch, and the mix of sources.

The order is a function of the tokens and the settings; the position in it is one integer, saved
with a checkpoint. That holds for several sources, too: which window of which source comes n-th
follows from n, through stages of different weights, and a stage goes on in every source where the
stage before it stopped.
"""

import bisect
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from examples.moonlight.schedule.plan import Plan

# Weights become integers of this sum, so that counts are exact however long the run.
_SHARES = 1_000_000


class Tokens(Protocol):
    """A source's token ids: an array, or what reads them from the disk where they are asked for."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, where: slice, /) -> np.ndarray:
        """Those from one to another."""
        ...


class Span(NamedTuple):
    """Windows read in one mix; the last span of a run never ends.

    Attributes:
        windows: How many.
        weights: The weight of each source by name; a source that is left out is not read.
    """

    windows: int
    weights: Mapping[str, float]


def plan_spans(plan: Plan, sizes: Mapping[str, float]) -> list[Span]:
    """The mixes of a plan, with a weight for every source; without a mix, the sources' sizes."""
    spans = (
        (
            segment.steps * segment.batch,
            {name: segment.mix.get(name, 0) for name in sizes} if segment.mix else dict(sizes),
        )
        for segment in plan.segments
    )
    # A mix goes on as it is where only something else changes.
    merged = itertools.groupby(spans, key=lambda span: span[1])
    return [Span(sum(windows for windows, _ in group), mix) for mix, group in merged]


def windows_read(spans: Sequence[Span], windows: int) -> dict[str, int]:
    """How many of the first windows of a run are of each source: where each of them goes on.

    Args:
        spans: The mixes, from `plan_spans`.
        windows: How many are behind the run.
    """
    names = list(spans[0].weights)
    return dict(zip(names, StagedMix(spans, names).read(windows), strict=True))


def train_batches(
    sources: Mapping[str, Tokens],
    spans: Sequence[Span],
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """An endless iterator of int32 [batch_size, sequence_length + 1].

    Every epoch of a source has its own order. Windows overlap by one token: the last target of one
    is the first input of the next. Batches run on across the end of an epoch. The position is
    ``get_state()``, a small dict that JSON can hold; ``set_state()`` continues with exactly the
    next batch.

    Args:
        sources: Token ids of each source.
        spans: The mixes, in order.
        sequence_length: Predicted tokens per window.
        batch_size: Windows per batch.
        seed: The seed of every order.
        rows: Which rows of every batch are read, in order: [len(rows), sequence_length + 1]. The
            position is that of the whole batches. Left out, all.

    Raises:
        ValueError: A source is shorter than one window.
    """
    datasets = [
        grain.MapDataset.source(_Windows(name, tokens, sequence_length))
        .seed(seed + i)
        .shuffle()
        .repeat()
        for i, (name, tokens) in enumerate(sources.items())
    ]
    if len(datasets) == 1:
        (dataset,) = datasets
    else:
        chosen = StagedMix(spans, list(sources))
        dataset = grain.MapDataset.select_from_datasets(datasets, chosen)
    if rows is not None and len(rows) < batch_size:
        dataset = grain.MapDataset.source(_Rows(dataset, batch_size, rows))
        batch_size = len(rows)
    # From memory a window is a copy of some kilobytes: one thread keeps ahead of any model. From a
    # disk, or from one behind a network, several windows are waited for at a time. Processes would
    # only cost start-up time. The order is of numbers alone (`shuffle` permutes an index): nothing
    # here is as long as the tokens are many.
    in_memory = all(isinstance(tokens, np.ndarray) for tokens in sources.values())
    return iter(
        # There is no remainder; but grain counts it as a float, and batches of one overflow.
        dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(
            grain.ReadOptions(num_threads=1 if in_memory else 16, prefetch_buffer_size=64)
        )
    )


class _Rows:
    """Some rows of every batch, one after the other, of a dataset that never ends."""

    def __init__(self, dataset: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._dataset, self._batch, self._rows = dataset, batch_size, tuple(rows)

    def __len__(self) -> int:
        return sys.maxsize // self._batch * len(self._rows)

    # grain asks for the index by SupportsIndex.
    def __getitem__(self, index: Any) -> Any:
        batch, row = divmod(int(index), len(self._rows))
        return self._dataset[batch * self._batch + self._rows[row]]


class StagedMix(grain.transforms.DatasetSelectionMap):
    """Which window of which source is the n-th of a run: a function of n alone.

    Args:
        spans: The mixes, in order.
        names: The sources, in the order of the datasets that are mixed.

    Raises:
        ValueError: A span has a source that is not there, a negative weight, or none above 0.
    """

    def __init__(self, spans: Sequence[Span], names: Sequence[str]):
        self._shares = [_integer_shares(span.weights, names) for span in spans]
        # The last span never ends.
        self._starts = [0, *itertools.accumulate(span.windows for span in spans[:-1])]
        self._read = [[0] * len(names)]
        for span, shares in zip(spans[:-1], self._shares, strict=False):
            counts = _counts(span.windows, shares)
            self._read.append([a + b for a, b in zip(self._read[-1], counts, strict=True)])

    def read(self, windows: int) -> list[int]:
        """How many of the first windows are of each source."""
        place = bisect.bisect_right(self._starts, windows) - 1
        counts = _counts(windows - self._starts[place], self._shares[place])
        return [a + b for a, b in zip(self._read[place], counts, strict=True)]

    def __len__(self) -> int:
        return sys.maxsize

    # grain asks for the index by SupportsIndex.
    def __getitem__(self, index: Any) -> tuple[int, int]:
        place = bisect.bisect_right(self._starts, int(index)) - 1
        local, shares = int(index) - self._starts[place], self._shares[place]
        before, after = _counts(local, shares), _counts(local + 1, shares)
        source = next(i for i, count in enumerate(before) if after[i] > count)
        return source, self._read[place][source] + before[source]


def _integer_shares(weights: Mapping[str, float], names: Sequence[str]) -> list[int]:
    total = sum(weights.values())
    unknown = ", ".join(sorted(weights.keys() - set(names)))
    if unknown or min(weights.values(), default=0) < 0 or not 0 < total < float("inf"):
        raise ValueError(
            f"cannot mix the sources {', '.join(names)} by {dict(weights)}: give each a weight of "
            "0 or more, and one of them more than 0"
        )
    scaled = (_SHARES * weights.get(name, 0) / total for name in names)
    return [max(1, round(share)) if share else 0 for share in scaled]


def _counts(windows: int, shares: Sequence[int]) -> list[int]:
    """How many of the first windows each source gives, evenly spread.

    The first source takes its share of all, rounded up, the second its share of the rest, ...: no
    count ever falls, and each is within the number of sources of its exact share.
    """
    counts, left = [], sum(shares)
    for share in shares:
        rest = windows * (left - share) // left if left else 0
        counts.append(windows - rest)
        windows, left = rest, left - share
    return counts


def validation_windows(
    sources: Mapping[str, Tokens], *, sequence_length: int, batch_size: int, count: int
) -> dict[str, np.ndarray]:
    """The fixed validation set of each source: windows spread evenly over its held-out text.

    Returns:
        int32 [batches, batch_size, sequence_length + 1] by source; ``count`` windows of each where
        the text has that many, rounded down to whole batches. Where one source has not even
        ``batch_size``, the batches of all are that much smaller.

    Raises:
        ValueError: A source is shorter than one window.
    """
    windows = {
        name: _Windows(name, tokens, sequence_length, "held-out ")
        for name, tokens in sources.items()
    }
    batch_size = min(batch_size, count, *map(len, windows.values()))

    def spread(source: _Windows) -> np.ndarray:
        whole = min(count, len(source)) // batch_size * batch_size
        indices = np.linspace(0, len(source) - 1, whole).round().astype(int)
        return np.stack([source[i] for i in indices]).reshape(-1, batch_size, sequence_length + 1)

    return {name: spread(source) for name, source in windows.items()}


class _Windows:
    """Window i holds tokens [i * T, i * T + T]: T inputs and, shifted by one, T targets."""

    def __init__(self, name: str, tokens: Tokens, sequence_length: int, what: str = ""):
        if len(tokens) < sequence_length + 1:
            of = f" of the source {name!r}" if name else ""
            raise ValueError(
                f"{len(tokens)} {what}tokens{of} are fewer than one window of {sequence_length} + "
                "1; give more data or a smaller --sequence-length"
            )
        if len(tokens) // sequence_length >= 2**32:
            raise ValueError(
                f"{len(tokens)} tokens are more windows of {sequence_length} than can be put into "
                "an order (2**32): give a larger --sequence-length, or divide the source"
            )
        self._tokens = tokens
        self._length = sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    # grain calls for a record by this name and asks for the type by SupportsIndex.
    def __getitem__(self, index: Any) -> np.ndarray:
        start = int(index) * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int32)
