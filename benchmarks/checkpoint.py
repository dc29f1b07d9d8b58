"""Time what sealing costs: `python -m benchmarks.checkpoint`.

A checkpoint of the Moonlight example is written by Orbax, read again for the SHA-256 of every file,
and put on disk; before it is restored, its files are compared with these. Beside both stands Orbax
alone, in turns with them.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.harness import environment, make_console, median, time_interleaved, write_json
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.run_folder import engine
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.retention import Retention


@dataclasses.dataclass(frozen=True)
class Args:
    """Seconds to save and to restore, with digests and without.

    Attributes:
      megabytes: of float32, half of it as the model, half as the optimizer's state.
      repeats: how often each is timed, in turns.
      output: where the JSON goes.
    """

    megabytes: int = 256
    repeats: int = 5
    output: Path = Path("runs/benchmarks/checkpoint.json")


def main(args: Args) -> dict[str, float]:
    """Time both, print and write the seconds."""
    count = args.megabytes * 2**20 // 4 // 2
    model, state = (
        {"w": jax.random.normal(jax.random.key(seed), (count // 1024, 1024), jnp.float32)}
        for seed in (0, 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder) / "sealed", Retention(1))
        with contextlib.closing(kept), engine.make_checkpointer() as orbax:
            plain = Path(folder) / "plain"
            items = engine.save_args(model, state, {"at": 1})
            targets = engine.restore_args(model, state)
            steps = iter(range(1, 10**6))

            def save_plain() -> None:
                shutil.rmtree(plain, ignore_errors=True)
                orbax.save(plain, args=items)
                orbax.wait_until_finished()

            def save_sealed() -> None:
                kept.save(
                    next(steps), model=model, optimizer=state, progress={"at": 1}, val_loss=None
                )
                kept.wait()

            calls = {
                "save, Orbax": save_plain,
                "save, sealed": save_sealed,
                "restore, Orbax": lambda: jax.block_until_ready(
                    orbax.restore(plain, args=targets)["model"]
                ),
                "restore, checked": lambda: jax.block_until_ready(
                    kept.restore(model=model, optimizer=state).model
                ),
            }
            timed = time_interleaved(calls, args.repeats)
    seconds = {name: median(times) for name, times in timed.items()}
    table = Table(title=f"{args.megabytes} MB of float32, median of {args.repeats}", box=None)
    for column in ("", "seconds", "to Orbax"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in seconds.items():
        peer = seconds[f"{name.split(',')[0]}, Orbax"]
        table.add_row(name, f"{value:.3f}", f"{value / peer:.2f}x")
    make_console().print(table)
    write_json(
        args.output,
        {
            "environment": environment("jax", "orbax-checkpoint"),
            "megabytes": args.megabytes,
            "median_seconds": seconds,
            "seconds": timed,
        },
    )
    return seconds


if __name__ == "__main__":
    CommandLine("benchmarks.checkpoint", Args, __doc__).run(main)
