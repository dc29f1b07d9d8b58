"""One GPU or TPU, measured in one command: `python -m benchmarks.accelerator`.

1. Correctness: every shape against float64, Optax and torch, and shapes that fill no tile.
2. The device's limits: the speed of plain products in both precisions, and of a copy.
3. Orthogonalization by shape, of the tables of `benchmarks.orthogonalize`.
4. Whole optimizer steps, of the trees of `benchmarks.step`, the large ones too.
5. A training step of the example's preset `small`.

Beside `muon_jax` run `optax.contrib.muon` and, where torch has the same GPU, `torch.optim.Muon`
under `torch.compile`, in turns. Times are read from the device's own events where JAX's profiler
shows any (on both sides: CUDA events in torch), else from the wall clock; the record says which.
Several passes go into one dispatch, so that Python is not what is timed.

Each row is a line of `runs.jsonl` as soon as it is there. The command may be interrupted, stops by
itself when its minutes are over, and goes on where it stopped when it is given again; rows that
failed are tried again then, and stand in no one's way. The minutes are looked at between rows: a
row that has begun is finished.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import step
from benchmarks.accelerator.tables import all_tables
from benchmarks.accelerator.work import Sizes, Work, all_work
from benchmarks.device_clock import choose_clocks
from benchmarks.harness import describe, environment, load_average, make_console, write_json
from benchmarks.orthogonalize.measure import add_shares
from benchmarks.report.figures import draw_accelerator
from examples.moonlight.common.command_line import CommandLine
from examples.scaling_law.store import Store

RECORD, PICTURE = "accelerator.json", "accelerator.png"

# Rows of another device, of other versions or sizes are not taken for this run's; the commit may
# differ, and each row has its own.
MUST_AGREE = ("device", "processor", "versions", "clock", "sizes")


@dataclasses.dataclass(frozen=True)
class Args:
    """Everything that one GPU or TPU can tell, in at most twenty minutes.

    Attributes:
      output_dir: the folder of the rows, the JSON and the picture; a second run goes on there.
      minutes: when no further row is begun.
      sizes: what is measured, and how large.
    """

    output_dir: Path = Path("runs/benchmarks/accelerator")
    minutes: float = 20.0
    sizes: Sizes = dataclasses.field(default_factory=Sizes)


def why_no_torch() -> str | None:
    """Why torch does not take part; None if it does."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if jax.default_backend() == "cpu" or torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} does not see this device"


def sizes_of_a_row(sizes: Sizes) -> dict[str, Any]:
    """What rows depend on besides their key."""
    return {k: v for k, v in dataclasses.asdict(sizes).items() if k not in ("models", "cases")}


def open_store(folder: Path, here: dict[str, Any]) -> Store:
    """The rows of a folder.

    Raises:
      ValueError: they are of another device, or of other versions or sizes.
    """
    store = Store(folder, dict, ("key", "kind", "environment", "result", "error"))
    for record in store.records.values():
        for name in MUST_AGREE:
            if record["environment"][name] != here[name]:
                raise ValueError(
                    f"{store.path} has rows whose {name} is {record['environment'][name]}, and "
                    f"here it is {here[name]}: give --output-dir a folder of its own"
                )
    return store


def run(work: Work, store: Store, here: dict[str, Any], limits: dict[str, Any] | None) -> None:
    """Measures a row and keeps it; what it raises is kept in its place."""
    start = time.perf_counter()
    result, error = None, None
    try:
        result = work.measure(limits)
    except Exception as raised:  # the next rows may well work
        error = describe(raised)
    record = {"key": work.key, "kind": work.kind, "run": {"key": work.key}, "environment": here}
    seconds = time.perf_counter() - start
    store.append(record | {"seconds": seconds, "result": result, "error": error})
    jax.clear_caches()


def summarize(store: Store, work: list[Work], here: dict[str, Any]) -> dict[str, Any]:
    """What the tables and the picture take: the rows by kind, in their order."""
    there = [store[w.key] for w in work if w.key in store]
    results: dict[str, list[Any]] = {w.kind: [] for w in work}
    for record in there:
        if record["error"] is None:
            results[record["kind"]].append(record["result"])
    limits = results["limits"][0] if results["limits"] else {}
    if peaks := limits.get("matmul_peak_flops"):
        peaks = add_shares(results["shape"], peaks)
        for found in results["step"]:
            step.add_shares(found, peaks)
    return {
        "environment": here,
        "clock": here["clock"],
        "torch": here["torch"],
        "seconds": sum(record["seconds"] for record in there),
        "matmul_peak_flops": peaks,
        "copy_bytes_per_s": limits.get("copy_bytes_per_s"),
        "correctness": results["correctness"],
        "shapes": results["shape"],
        "cases": {row["case"]: row for row in results["step"]},
        "training": results["training"][0] if results["training"] else None,
        "failed": {r["key"]: r["error"] for r in there if r["error"] is not None},
        "left": [w.key for w in work if w.key not in store],
    }


def main(args: Args) -> dict[str, Any]:
    """Measures what is missing, prints the tables, writes the JSON and the picture."""
    start = time.perf_counter()
    console = make_console()
    load = load_average(console)
    no_torch = why_no_torch()
    versions = ["jax", "jaxlib", "optax", *([] if no_torch else ["torch"])]
    clocks = choose_clocks()
    here = environment(*versions) | {
        "clock": clocks.name,
        "torch": no_torch or "takes part",
        "load_average": load,
        "sizes": sizes_of_a_row(args.sizes),
    }
    store = open_store(args.output_dir, here)
    work = list(all_work(args.sizes, clocks, torch=no_torch is None))
    console.print(f"{here['device']}, timed by the {clocks.name}; torch: {here['torch']}")
    for number, row in enumerate(work, start=1):
        if row.key in store and store[row.key]["error"] is None:
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            break
        known = store.records.get("limits")
        with console.status(f"{number} of {len(work)}: {row.key}"):
            run(row, store, here, known and known["result"])
        console.print(f"{row.key}: {store[row.key]['error'] or 'done'}", highlight=False)
    record = summarize(store, work, here)
    write_json(args.output_dir / RECORD, record)
    draw_accelerator(args.output_dir / PICTURE, record)
    for table in all_tables(record).values():
        console.print(table.rich())
    if record["left"]:
        console.print(f"{len(record['left'])} rows are left: give the same command again")
    console.print(f"written to {args.output_dir}")
    return record


def is_well(record: dict[str, Any]) -> bool:
    """Whether every result is right, and no row failed."""
    return not record["failed"] and all(row["right"] for row in record["correctness"])


if __name__ == "__main__":
    # JAX would take three quarters of a GPU's memory when it starts, and torch needs its own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    line = CommandLine("benchmarks.accelerator", Args, __doc__, keeps_programs=False)
    line.run(lambda args: sys.exit(0 if is_well(main(args)) else 1))
