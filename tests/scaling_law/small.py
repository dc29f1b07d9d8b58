"""Runs of a second or two, and a corpus for them. As a script, the subject of the kill test."""

import sys
from pathlib import Path

import numpy as np

from examples.scaling_law.corpus import Corpus, Part
from examples.scaling_law.pool import Pool
from examples.scaling_law.protocol import Run
from examples.scaling_law.store import Store

RUN = Run(
    part="study",
    layers=2,
    head_dim=4,
    sequence_length=16,
    tokens=40 * 2 * 16,
    batch=2,
    learning_rate=8e-3,
    optimizer="muon",
)


def make_corpus(seed: int = 0) -> Corpus:
    """Two parts of random letters, each letter twice in a row: something to learn."""
    rng = np.random.default_rng(seed)

    def letters(count: int) -> np.ndarray:
        return np.repeat(rng.integers(97, 123, count // 2), 2).astype(np.uint8)

    parts = (Part(letters(4000), letters(600)) for _ in range(3))
    return Corpus(f"random letters {seed}", *parts)


def write_corpus(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"{i} and {j * j % 101}\n" for j in range(300)))
    return folder


def runs_to_kill() -> list[Run]:
    return [RUN.replace(seed=seed, tokens=400 * 2 * 16) for seed in range(4)]


if __name__ == "__main__":
    store, corpus = (Path(argument) for argument in sys.argv[1:])
    Pool(Store(store), corpus, jobs=2).finish(runs_to_kill(), "to be killed")
