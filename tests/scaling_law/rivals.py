"""Processes that work on one folder at once, and train nothing. `start` starts one."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from examples.scaling_law.protocol import Run, to_json
from examples.scaling_law.store import Store
from tests.scaling_law import small

ROOT = Path(__file__).parents[2]
STARTED = "started.txt"
RECORDS = 150


def start(*arguments: Any) -> subprocess.Popen:
    """A process that calls the function of this file with these arguments."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})


def record(run: Run, corpus: str, **more: Any) -> dict:
    return {"key": run.key(corpus), "corpus": corpus, "run": to_json(run), "val_loss": 2.5} | more


def write(folder: Path, rival: int) -> None:
    """Appends records of its own, of many lengths, once all rivals are there."""
    (folder / f"ready{rival}").touch()
    while len(list(folder.glob("ready*"))) < 4:
        time.sleep(0.001)
    store = Store(folder / "out")
    for i in range(RECORDS):
        store.append(record(small.RUN.replace(seed=RECORDS * rival + i), "c", note="x" * (i * 37)))


def runs() -> list[Run]:
    return [small.RUN.replace(seed=seed) for seed in range(8)]


def study(folder: Path, rival: int, seconds: float) -> None:
    """Does as if it trained: notes what it starts, and takes its time."""
    from examples.scaling_law import training
    from examples.scaling_law.pool import Pool

    def train(run: Run, corpus: Any) -> dict:
        with (folder / STARTED).open("a") as file:
            file.write(f"{rival} {run.seed}\n")
        time.sleep(seconds)
        return record(run, corpus.hash, seconds=seconds)

    training.train = train
    pool = Pool(Store(folder / "out"), folder / "corpus", jobs=1, accelerator=True)
    assert len(pool.finish(runs(), "rivals")) == len(runs())


if __name__ == "__main__":
    name, folder, *numbers = sys.argv[1:]
    if name == "write":
        write(Path(folder), int(numbers[0]))
    else:
        study(Path(folder), int(numbers[0]), float(numbers[1]))
