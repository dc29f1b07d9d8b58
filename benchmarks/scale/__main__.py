"""What a training step of Moonlight-16B-A3B takes on real machines: `python -m benchmarks.scale`.

The complete step (forward, backward, Muon with ZeRO-1) is compiled for TPU slices and for eight
H100s, none of which need be there (`benchmarks.targets` says what to install; rows that cannot be
compiled are named and left out), and read: `benchmarks.scale.steps`.

Memory is the compiler's own account of one device. FLOPs are those of the compiled program's
products, each loop counted as often as it runs, beside a formula that computes nothing twice:
recomputed layers, empty slots of the dispatch and the upper half of attention's diagonal blocks
are the difference. "Newton-Schulz" is its share of all FLOPs: of the device that XLA's program
makes the busiest, and of an even division. Wire bytes are what one device sends in a step, as a
ring does.

Of a TPU's program also the time is shown that its compiler expects of each part: of the model, and
of what the optimizer adds (`benchmarks.hlo.timing` has what is estimated, and how). What waits for
the network makes the step longer, what is hidden does not.

The program cannot say how many rounds the dispatch's loop takes: as many as the routing needs.
Counted are those that routing takes which is balanced to a twentieth between devices.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import targets
from benchmarks.harness import environment, make_console, write_json
from benchmarks.scale.cases import GIB, SCALES
from benchmarks.scale.spent import seconds
from examples.moonlight.common.command_line import CommandLine

PAPER_BATCH = 4096
"""Sequences of 8K tokens for which Newton-Schulz was put at 0.13% of FLOPs."""

SHORT = {
    "weights forward": "w. fwd", "weights backward": "w. bwd", "gradients": "grads",
    "dispatch": "tokens", "embedding": "embed", "muon exchange": "exch.",
    "muon gather": "gather", "adamw gather": "adamw", "other": "rest",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Memory, FLOPs and wire bytes of the whole training step, read from compiled programs.

    Attributes:
      targets: machines to compile for: v5e-256, v5e-64, v5e-32, v5e-8, v5p-64, h100-8, cpu-8.
      preset: the architecture.
      layers: fewer than the preset's; the program does not grow with depth, its loops do.
      context: tokens of a sequence.
      batch: sequences of a step; each device takes a few at a time, see `cases.py`.
      output: where the JSON goes; rows of other jobs that are there stay.
      texts: a folder where compiled programs are kept, to be read again instead of compiled.
    """

    targets: tuple[str, ...] = ("v5e-256", "v5e-64", "h100-8")
    preset: str = "moonlight-16b-a3b"
    layers: int | None = None
    context: int = 8192
    batch: int = 2048
    output: Path = Path("runs/benchmarks/scale.json")
    texts: Path | None = None


class WorkerError(RuntimeError):
    """A process that compiled for a target ended badly."""


def measure(name: str, args: Args) -> dict[str, Any]:
    """Compile for a target in a process of its own.

    Raises:
      WorkerError: with the end of what the process wrote, if it failed.
    """
    job = {"target": name} | {
        key: getattr(args, key) for key in ("preset", "layers", "context", "batch")
    }
    command = [sys.executable, "-m", "benchmarks.scale.steps", json.dumps(job)]
    done = subprocess.run(
        command + ([str(args.texts.absolute())] if args.texts else []),
        cwd=targets.ROOT,
        env=targets.environment(SCALES[name].target),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise WorkerError(f"{name}: exit status {done.returncode}\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


KEY = ("target", "preset", "layers", "context", "batch")


def merged(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, the new one in the place of its predecessor."""
    key = [new[name] for name in KEY]
    return [row for row in rows if [row[name] for name in KEY] != key] + [new]


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Newton-Schulz, as a part of all FLOPs of a step.

    "busiest" as compiled, "even" if each device took as much of it; "paper" the latter at the
    paper's batch, the model's FLOPs growing with the tokens.
    """
    model, busiest = row["flops"]["model"], row["flops"]["newton_schulz"]
    even = row["expected"]["newton_schulz"]
    grown = model * PAPER_BATCH * 8192 / (row["batch"] * row["context"])
    return {
        "busiest": busiest / (model + busiest),
        "even": even / (model + even),
        "paper": even / (grown + even),
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the tables, in 80 columns, and what had to be assumed."""
    memory = Table(title="memory of one device, GiB", box=None, title_justify="left")
    for name in ("target", "mesh", "layers", "args", "temp", "code", "total", "of", ""):
        memory.add_column(name, justify="left" if name in ("target", "mesh") else "right")
    for row in rows:
        mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
        start = (row["target"], mesh, str(row["layers"]))
        room = f"{row['memory'] / GIB:.2f}"
        if "bytes" not in row:
            memory.add_row(*start, "", "", "", "", room, "[red]too large[/red]")
            continue
        sizes = row["bytes"]
        parts = (sizes["arguments"] + sizes["outputs"], sizes["temporaries"], sizes["code"])
        figures = (f"{x / GIB:.2f}" for x in (*parts, sum(parts)))
        mark = "[green]fits[/green]" if row["fits"] else "[red]too large[/red]"
        memory.add_row(*start, *figures, room, mark)
    console.print(memory, "")
    for said in dict.fromkeys(targets.compiler(SCALES[row["target"]].target) for row in rows):
        console.print(said)
    console.print()
    for row in rows:
        if "compiler" in row:
            console.print(f"{row['target']}, its compiler: {row['compiler']}\n")
    rows = [row for row in rows if "bytes" in row]
    if not rows:
        return

    flops = Table(title="TFLOPs of one device and step", box=None, title_justify="left")
    for name in ("target", "micro", "model", "formula", "ratio", "newton-schulz", "share", "even"):
        flops.add_column(name, justify="left" if name == "target" else "right")
    wire = Table(title="GB that one device sends in a step", box=None, title_justify="left")
    wire.padding = (0, 1, 0, 0)
    for name in ("target", *SHORT.values(), "all"):
        wire.add_column(name, justify="left" if name == "target" else "right")
    for row in rows:
        model, formula = row["flops"]["model"], row["expected"]["model"]
        share = shares(row)
        flops.add_row(
            row["target"],
            str(row["micro_batches"]),
            f"{model / 1e12:.1f}",
            f"{formula / 1e12:.1f}",
            f"{model / formula:.2f}",
            f"{row['flops']['newton_schulz'] / 1e12:.2f}",
            f"{share['busiest']:.2%}",
            f"{share['even']:.2%}",
        )
        sent = [row["wire"][phase] for phase in SHORT]
        gigabytes = (x / 1e9 for x in (*sent, sum(sent)))
        wire.add_row(row["target"], *(f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in gigabytes))
    console.print(flops, "", wire, "")
    for row in rows:
        if row["seconds"]:
            show_seconds(console, row)
    for row in rows:
        for loop in row["assumed_once"]:
            end = "/".join(loop.split("/")[-3:])
            console.print(
                f"{row['target']}: length not in the program, counted as {row['rounds']}: {end}"
            )


def show_seconds(console: Console, row: dict[str, Any]) -> None:
    """Print what each part of the step takes by the compiler's estimates."""
    spent, chip = row["seconds"], SCALES[row["target"]].chip
    assert chip is not None
    total = seconds(spent)
    table = Table(box=None, title_justify="left")
    table.title = f"{row['target']}: milliseconds of a step, estimated by its compiler"
    table.add_column("part")
    for name in ("computes", "waits", "hidden", "of the step"):
        table.add_column(name, justify="right")
    optimizer = {
        kind: sum(one[kind] for part, one in spent.items() if part != "model")
        for kind in ("computed", "waited", "hidden")
    }
    for part, one in (*spent.items(), ("the optimizer", optimizer)):
        share = (one["computed"] + one["waited"]) / total["all"]
        table.add_row(part, *(f"{1e3 * x:,.1f}" for x in one.values()), f"{share:.3%}")
    console.print(table)
    at_peak = row["flops"]["model"] / chip.peak
    least = seconds(spent, model=at_peak)
    console.print(
        f"a model at the chip's peak, waiting for nothing, would take {at_peak:,.1f} s: "
        f"{1 - at_peak / least['all']:.2%} would be the optimizer's\n"
    )


def main(args: Args) -> dict[str, Any]:
    """Compile one target after the other, save each row at once, print the tables."""
    if unknown := [name for name in args.targets if name not in SCALES]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(SCALES)}")
    console = make_console()
    left_out: dict[str, str] = {}
    new: list[dict[str, Any]] = []
    for name in args.targets:
        if reason := targets.missing(SCALES[name].target):
            left_out[name] = reason
            console.print(f"[yellow]{name}[/yellow] {reason}\n", soft_wrap=True)
            continue
        try:
            with console.status(f"{name}: compiling, for minutes"):
                row = measure(name, args)
        except WorkerError as error:
            left_out[name] = str(error)
            console.print(f"[red]{error}[/red]", markup=True, soft_wrap=True)
            continue
        row["environment"] = environment("jax", "jaxlib", "optax") | targets.compiler_versions()
        new.append(row)
        # Read now: another command may have written while this one compiled.
        old = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
        write_json(args.output, {"rows": merged(old, row)})
    show(console, new)
    console.print(f"written to {args.output}")
    return {"left_out": left_out, "rows": new}


if __name__ == "__main__":
    CommandLine("benchmarks.scale", Args, __doc__).run(main)
