"""The loss on held-out text: of each source, and of all their text."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from examples.moonlight.data.batches import validation_windows
from examples.moonlight.data.prepared import PreparedSources
from examples.moonlight.data.tokenized import TokenizedSources


class Validation(NamedTuple):
    """The fixed windows of every source, one after the other.

    Attributes:
        windows_kbt: int32 [batches, batch, time + 1].
        batches: How many of them each source has.
        shares: Each source's part of the held-out tokens.
        bytes_per_token: Bytes in a token of the held-out text, by the same shares.
    """

    windows_kbt: np.ndarray
    batches: Mapping[str, int]
    shares: Mapping[str, float]
    bytes_per_token: float

    def record(self, losses_k: np.ndarray) -> dict[str, float]:
        """What a validation logs: `val_loss`, of all held-out text, and that of each named source.

        Args:
            losses_k: The mean loss of each batch.
        """
        losses = self._by_source(losses_k)
        record = {"val_loss": _weighted(losses, self.shares)}
        return record | {f"val_loss/{name}": loss for name, loss in losses.items() if name}

    def _by_source(self, values_k: np.ndarray) -> dict[str, float]:
        ends = np.cumsum([*self.batches.values()])[:-1]
        parts = np.split(np.asarray(values_k, np.float64), ends)
        return {name: float(part.mean()) for name, part in zip(self.batches, parts, strict=True)}


def make_validation(
    corpus: TokenizedSources | PreparedSources,
    byte_lengths: np.ndarray,
    *,
    sequence_length: int,
    batch_size: int,
    count: int,
) -> Validation:
    """The validation set of a corpus.

    Args:
        corpus: Its held-out tokens.
        byte_lengths: Bytes behind each token id.
        sequence_length: Predicted tokens per window.
        batch_size: Windows per batch, at most.
        count: Windows of each source, at most.

    Raises:
        ValueError: A source is shorter than one window.
    """
    windows = validation_windows(
        corpus.validation, sequence_length=sequence_length, batch_size=batch_size, count=count
    )
    total = sum(len(tokens) for tokens in corpus.validation.values())
    shares = {name: len(tokens) / total for name, tokens in corpus.validation.items()}
    lengths = {name: float(byte_lengths[w[..., 1:]].mean()) for name, w in windows.items()}
    return Validation(
        np.concatenate([*windows.values()]),
        {name: len(source) for name, source in windows.items()},
        shares,
        _weighted(lengths, shares),
    )


def _weighted(values: Mapping[str, float], shares: Mapping[str, float]) -> float:
    return sum(value * shares[name] for name, value in values.items())
