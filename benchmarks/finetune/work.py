"""The work that both sides of `benchmarks/finetune` do, and how their processes speak.

A side is a process of its own, so that its peak memory is its own. It imports no library of the
other side, and neither does this module. Lines of JSON go both ways: the side says what it is once
it is ready, and answers each `[steps]` with what these steps took.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Optimizer = Literal["muon", "adamw"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained, on what, and how.

    Attributes:
        model: Folder of the base, a Hugging Face directory.
        adapter: Folder of the first adapter, PEFT's; our side writes it, the other one reads it.
        vocab_size: Tokens are below it.
        optimizer: The factors' optimizer.
        rank: Columns of a factor.
        alpha: The factors' product is scaled by alpha / rank.
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches of a step.
        length: Tokens of a row.
        learning_rate: Of every step.
        weight_decay: Decoupled, times the learning rate.
        max_grad_norm: Largest norm of a gradient.
        betas: AdamW's two.
        seed: Of the tokens and of the factors.
    """

    model: str
    adapter: str
    vocab_size: int
    optimizer: Optimizer
    rank: int
    alpha: float
    batch_size: int
    accumulation: int
    length: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that a step reads."""
        return self.accumulation * self.batch_size * self.length


class Drawn(NamedTuple):
    """The rows of every step, `[micro-batches, batch, time]`; no row has padding.

    Attributes:
        tokens_abt: int32, what the model reads.
        targets_abt: int32, the next tokens.
        weight_abt: float32, 0 on each row's first half, its prompt, and 1 on its answer.
    """

    tokens_abt: np.ndarray
    targets_abt: np.ndarray
    weight_abt: np.ndarray


def draw(work: Work) -> Drawn:
    """The same rows on both sides."""
    shape = work.accumulation, work.batch_size, work.length + 1
    tokens = np.random.default_rng(work.seed).integers(0, work.vocab_size, shape).astype(np.int32)
    weight_abt = np.zeros(tokens[..., 1:].shape, np.float32)
    weight_abt[..., work.length // 2 :] = 1
    return Drawn(tokens[..., :-1], tokens[..., 1:], weight_abt)


def serve(make: Callable[[Work], tuple[Callable[[], float], dict[str, Any]]]) -> None:
    """A side's process, until its caller closes the pipe.

    Args:
        make: Builds a call that takes a step and returns its loss, and what to tell of it.
    """
    # Whatever a library prints goes where errors go.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    libraries = memory("VmRSS")
    step, told = make(Work(**json.loads(sys.argv[1])))
    print(json.dumps(told | {"libraries_bytes": libraries}), file=out)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(json.loads(line)[0]):
            start = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - start)
        answer = {"seconds": seconds, "losses": losses, "peak_bytes": memory("VmHWM")}
        print(json.dumps(answer), file=out)


def memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes that this process holds, or the most that it ever held.

    Of Linux' own record: `ru_maxrss`, which is all that others have, begins at the size of the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words[0] == f"{field}:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Side:
    """A side's process, as its caller sees it.

    Args:
        module: What to run with `python -m`.
        work: What it is to do.

    Attributes:
        told: What the side said of itself.
    """

    def __init__(self, module: str, work: Work):
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(dataclasses.asdict(work))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.told = self._answer()

    def take(self, steps: int) -> dict[str, Any]:
        """Takes steps.

        Returns:
            The `seconds` and the `losses` of each, and the process's `peak_bytes` so far.

        Raises:
            RuntimeError: The process ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"[{steps}]\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(
                f"{self._module} ended with code {self._process.returncode}: it says why above"
            )
        return json.loads(line)
