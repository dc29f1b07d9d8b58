"""Break the library in small ways and see its tests notice: `python -m benchmarks.mutants`.

Each mutation is a patch of one place. It is applied in a copy of the tree, where the tests run that
should fail on it. A mutation that survives is a promise that no test keeps.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from benchmarks.harness import make_console
from benchmarks.mutants.mutations import MUTANTS, ROOT, Mutant, fits
from examples.moonlight.common.command_line import CommandLine

COPIED = ("muon_jax", "tests", "benchmarks", "examples", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Args:
    """Break the library in small ways and see its tests notice.

    Attributes:
      only: the names of some mutations, or parts of them; all if there are none.
    """

    only: tuple[str, ...] = ()


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass on the broken library, in a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, copy / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, copy / name)
        path = copy / "muon_jax" / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, *shlex.split(mutant.tests)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    if run.returncode not in (0, 1):  # pytest itself failed, or ran no test
        raise RuntimeError(f"pytest {mutant.tests}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 0


def main(args: Args) -> int:
    """Run the mutations, print a table, and return 1 if one survives or fits no more."""
    console = make_console()
    chosen = {
        name: mutant
        for name, mutant in MUTANTS.items()
        if not args.only or any(part in name for part in args.only)
    }
    if not chosen:
        raise SystemExit(
            f"No mutation is called {', '.join(args.only)}: see MUTANTS in mutations.py."
        )
    table = Table(title="Mutations of muon_jax", title_justify="left")
    for column in ("mutation", "file", "tests", "outcome"):
        table.add_column(column)
    bad = 0
    for name, mutant in chosen.items():
        with console.status(f"{name}: {mutant.tests}"):
            if not fits(mutant):
                outcome = "fits no more"
            else:
                outcome = "survived" if survives(mutant) else "caught"
        bad += outcome != "caught"
        console.print(f"{name}: {outcome}")
        table.add_row(name, mutant.file, mutant.tests, outcome)
    console.print(table)
    console.print(f"{len(chosen) - bad} of {len(chosen)} caught")
    return 1 if bad else 0


if __name__ == "__main__":
    CommandLine("benchmarks.mutants", Args, __doc__).run(lambda args: sys.exit(main(args)))
