"""From rows to batches: their order in every epoch, and the micro-batches of an optimizer step.

The order follows from the rows and the seed, and the position in it is one integer, saved with a
checkpoint. An epoch reads every row once. Its last batch is filled up with rows of padding, which
weigh nothing: gradients are sums over counted targets, divided by their number, so that no sample
is lost, none is read twice, and every batch has the same shape.
"""

import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from examples.finetune.data.order import shuffled
from examples.finetune.data.packing import Rows, empty_rows


def steps_per_epoch(rows: Rows, *, micro_batches: int, batch_size: int) -> int:
    """Batches that read every row once."""
    return -(-len(rows.tokens_bt) // (micro_batches * batch_size))


def train_batches(
    rows: Rows, *, micro_batches: int, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of `Rows` of [micro_batches, batch_size, t], one an optimizer step.

    Every epoch has its own order. The position is `get_state()`, a small dict that JSON can hold;
    `set_state()` continues with exactly the next batch.

    Args:
        rows: All rows of the dataset, [rows, t].
        micro_batches: `--gradient_accumulation_steps`.
        batch_size: Rows of a micro-batch.
        seed: The seed of every order.
    """
    return iter(
        grain.MapDataset.source(_Batches(rows, micro_batches, batch_size, seed)).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        )
    )


def validation_batches(rows: Rows, *, batch_size: int) -> Iterator[Rows]:
    """Every row once, in order: `Rows` of [batch_size, t], the last filled up with padding.

    Args:
        rows: All rows, [rows, t].
        batch_size: Rows of a batch.
    """
    for first in range(0, len(rows.tokens_bt), batch_size):
        batch = empty_rows((batch_size, rows.tokens_bt.shape[1]))
        for filled, array in zip(batch, rows, strict=True):
            part = array[first : first + batch_size]
            filled[: len(part)] = part
        yield batch


class _Batches:
    """The n-th batch of a run that never ends: a function of n alone."""

    def __init__(self, rows: Rows, micro_batches: int, batch_size: int, seed: int):
        self._rows = rows
        self._shape = (micro_batches, batch_size)
        self._steps = steps_per_epoch(rows, micro_batches=micro_batches, batch_size=batch_size)
        self._order = shuffled(len(rows.tokens_bt), seed=seed)

    def __len__(self) -> int:
        return sys.maxsize

    # grain asks for the index by SupportsIndex.
    def __getitem__(self, index: Any) -> Rows:
        epoch, step = divmod(int(index), self._steps)
        count, size = len(self._rows.tokens_bt), self._shape[0] * self._shape[1]
        chosen = [
            self._order(epoch * count + i)
            for i in range(step * size, min(count, (step + 1) * size))
        ]
        batch = empty_rows((size, self._rows.tokens_bt.shape[1]))
        for filled, array in zip(batch, self._rows, strict=True):
            filled[: len(chosen)] = array[chosen]
        return Rows(*(np.reshape(array, (*self._shape, -1)) for array in batch))
