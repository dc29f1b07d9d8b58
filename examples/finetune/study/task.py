"""Text to pre-train on, and a task to fine-tune on: arithmetic with numbers below 100.

A token is a byte. Pre-training reads lines of sums, in signs and in words, of successors and of
comparisons; the task, which it never shows, is subtraction:

    How much is 42 minus 17? 25

What counts is the answer and the end of its line.

The pairs are divided once and for all: what is trained on, what learning rates are chosen by, and
what is reported share none.
"""

import functools

import numpy as np

from examples.finetune.data.packing import Rows

VOCABULARY = 128
LENGTH = 32
END = ord("\n")

# Parts of all pairs a >= b.
PARTS = {"train": 0.6, "tuning": 0.2, "test": 0.2}

_BELOW = 100


def pretraining_rows(seed: int, steps: int, batch: int) -> Rows:
    """Windows of generated lines, `[steps, batch, LENGTH]`, every byte counting."""
    rng = np.random.default_rng((seed, 0))
    count = steps * batch * (LENGTH + 1)
    lines, size = [], 0
    while size < count:
        a, b, kind = (int(x) for x in rng.integers(0, (_BELOW, _BELOW, 4)))
        line = (
            f"{a}+{b}={a + b}\n",
            f"{a},{a + 1},{a + 2}\n",
            f"The larger of {a} and {b}: {max(a, b)}\n",
            f"How much is {a} plus {b}? {a + b}\n",
        )[kind]
        lines.append(line)
        size += len(line)
    text = np.frombuffer("".join(lines).encode()[:count], np.uint8).astype(np.int32)
    windows = text.reshape(steps, batch, LENGTH + 1)
    here = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), windows[..., 1:].shape)
    ones = np.ones(here.shape, np.int32)
    tokens, targets = windows[..., :-1], windows[..., 1:]
    return Rows(tokens, targets, ones.astype(np.float32), ones, here)


def task_rows(part: str) -> Rows:
    """Every question of a part with its answer, one to a row, `[questions, LENGTH]`."""
    return Rows(*map(np.stack, zip(*map(_row, _pairs()[part]), strict=True)))


def training_rows(seed: int, steps: int, batch: int) -> Rows:
    """Questions to train on in the order of a seed, `[steps, batch, LENGTH]`, epoch after epoch."""
    rows = task_rows("train")
    rng, questions = np.random.default_rng((seed, 1)), len(rows.tokens_bt)
    epochs = -(-steps * batch // questions)
    order = np.concatenate([rng.permutation(questions) for _ in range(epochs)])[: steps * batch]
    return Rows(*(x[order].reshape(steps, batch, LENGTH) for x in rows))


@functools.cache
def _pairs() -> dict[str, list[tuple[int, int]]]:
    pairs = [(a, b) for a in range(_BELOW) for b in range(a + 1)]
    order = np.random.default_rng(0).permutation(len(pairs))
    parts, start = {}, 0
    for name, share in PARTS.items():
        stop = start + round(share * len(pairs))
        parts[name] = [pairs[i] for i in order[start:stop]]
        start = stop
    return parts


def _row(pair: tuple[int, int]) -> tuple[np.ndarray, ...]:
    a, b = pair
    question = f"How much is {a} minus {b}? ".encode()
    text = [*question, *str(a - b).encode(), END]
    tokens, targets, segment, position = np.zeros((4, LENGTH), np.int32)
    weight = np.zeros(LENGTH, np.float32)
    length = len(text) - 1
    tokens[:length], targets[:length] = text[:-1], text[1:]
    segment[:length], position[:length] = 1, np.arange(length)
    weight[len(question) - 1 : length] = 1
    return tokens, targets, weight, segment, position
