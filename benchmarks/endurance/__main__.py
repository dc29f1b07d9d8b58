"""Hurt a training run, and count what it lost: `python -m benchmarks.endurance`.

A small run of the Moonlight example is killed at random moments of its whole life (imports,
compilation, steps, saving, results), its newest checkpoint is damaged, it is started twice, its
disk fills up. After each, what is there is compared with what was there, and every run is taken to
its end and compared, bit for bit, with one that nothing happened to.

Counted are four faults, of which none should be: lost (less than the newest whole checkpoint that
was seen is left), silent (the program ended without saying why, or how to go on), hung (it did not
end), and different (it ended with other losses or weights than the run that nothing happened to).
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.endurance import ordeals
from benchmarks.endurance.args import Args
from benchmarks.endurance.report import Report
from benchmarks.endurance.trial import EVERY, STEPS, Trial, outcome
from benchmarks.harness import environment, make_console, write_json
from examples.moonlight.common.command_line import CommandLine


def main(args: Args) -> int:
    """Runs all trials, prints the table, writes every row; 1 if there is a fault."""
    console = make_console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = Report(folder)
        text = "".join(f"line {i} holds {i * i % 101}\n" for i in range(20_000))
        (folder / "text.txt").write_text(text)
        with console.status("a run that nothing happens to"):
            first = Trial(folder / "first", folder, args.processes)
            first.finish(10 * args.patience)  # fills the caches
            trial = Trial(folder / "reference", folder, args.processes)
            started = time.monotonic()
            process = trial.finish(args.patience)
            life = time.monotonic() - started
        if process.wait(0) != 0:
            console.print(process.text, markup=False)
            return 1
        reference = outcome(trial)
        console.print(f"its whole life takes {life:.1f} s")
        record = {"environment": environment("jax", "orbax-checkpoint"), "life_seconds": life}
        record |= {
            "args": {
                "kills": args.kills,
                "processes": args.processes,
                "seed": args.seed,
                "steps": STEPS,
                "every": EVERY,
            }
        }
        trials = [lambda: ordeals.kill(args, folder, reference, life, report)]
        if args.processes == 1:
            trials += [
                lambda: ordeals.start_twice(args, folder, reference, report),
                lambda: ordeals.damage(args, folder, reference, report),
            ]
        if args.disk and args.processes == 1:
            last = trial.checkpoints / str(STEPS)
            trials.append(lambda: ordeals.starve(args, folder, reference, last, report))
        for hurt in trials:
            hurt()
            write_json(args.output, record | {"trials": report.rows})  # also if it is cut short
    console.print(report.table())
    for row in report.faults:
        console.print(row, markup=False)
    console.print(f"{len(report.rows)} trials, {len(report.faults)} with a fault: {args.output}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    CommandLine("benchmarks.endurance", Args, __doc__).run(lambda args: sys.exit(main(args)))
