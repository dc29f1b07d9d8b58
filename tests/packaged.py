"""The packed library in an environment with nothing else: `python -m tests.packaged`.

Packs a source distribution, unpacks it elsewhere, makes the wheel of what was in it, installs that
with what it requires, and beside it pytest, beartype and hypothesis. There it runs the tests that
the source distribution holds, but for those files that import more, which are named. Takes some
minutes, and needs a package index; `make test-packaged` has it ready.
"""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"
TOOLS = ("pytest>=8.3", "pytest-xdist>=3.6", "beartype>=0.20", "hypothesis>=6.130")
# What may be imported there: the library's requirements, the tools, and the tests themselves.
THERE = {"muon_jax", "jax", "jaxtyping", "optax", "numpy", "ml_dtypes", "scipy"} | {
    *("pytest", "beartype", "hypothesis", "tests"),
    *sys.stdlib_module_names,
}
PACKED = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
PACKED += ("CITATION.cff", "SECURITY.md", "muon_jax", "tests", "examples")


def pack(folder: Path) -> tuple[Path, Path]:
    """The source distribution unpacked, and the wheel that was made of it.

    Args:
      folder: where both are made, of copies: the checkout gets no `build`.
    """
    copy, ignored = folder / "copy", shutil.ignore_patterns("__pycache__")
    copy.mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    _build("sdist", copy, folder)
    [packed] = folder.glob("*.tar.gz")
    with tarfile.open(packed) as opened:
        opened.extractall(folder, filter="data")
    source = folder / packed.name.removesuffix(".tar.gz")
    _build("wheel", source, folder)
    [wheel] = folder.glob("*.whl")
    return source, wheel


def _build(kind: str, folder: Path, into: Path) -> None:
    command = [sys.executable, "-c", BUILD.format(kind, str(into))]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def unpack(wheel: Path, into: Path) -> Path:
    """The files of a wheel, as they are installed."""
    zipfile.ZipFile(wheel).extractall(into)
    return into


def imports_more(path: Path) -> set[str]:
    """What a test imports that is not there, by the names of packages."""
    tree = ast.parse(path.read_text())
    named = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in named} - THERE


def main() -> int:
    """Pack, install and test; the exit code is pytest's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, wheel = pack(folder)
        venv.create(folder / "env", with_pip=True)
        python = str(folder / "env/bin/python")
        # Neither the checkout nor what else is on the path is there.
        alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

        def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.run([python, *words], cwd=source, env=alone, text=True, **options)

        shutil.rmtree(source / "muon_jax")  # only the installed one is left
        run("-m", "pip", "install", "-q", str(wheel), check=True)
        # With what it requires and nothing else.
        run("-m", "muon_jax", "report", "--help", check=True, stdout=subprocess.DEVNULL)
        run("-m", "pip", "install", "-q", *TOOLS, check=True)
        tests = sorted(source.glob("tests/*/test_*.py"))
        more = {test: imports_more(test) for test in tests}
        for test in tests:
            if more[test]:
                left = f"{test.relative_to(source)} imports {', '.join(sorted(more[test]))}"
                print(f"left out: {left}", flush=True)
        core = [str(test.relative_to(source)) for test in tests if not more[test]]
        alone["XLA_FLAGS"] = run("-m", "tests.xla_flags", check=True, capture_output=True).stdout
        return run(
            "-m", "pytest", "-q", "-n", "2", "-m", "not bits and not one_stack", *core
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
