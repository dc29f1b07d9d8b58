"""What is installed is what is here: a wheel holds every module, and imports by itself."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('wheels'))"
IMPORT_ALL = """
import importlib, pkgutil, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
import muon_jax
for found in pkgutil.walk_packages(muon_jax.__path__, "muon_jax."):
    module = importlib.import_module(found.name)
    assert module.__file__.startswith(folder), module.__file__
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, built from a copy, so that the checkout gets no `build`."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("muon_jax", "examples"):  # what must be packed, and what must not
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    [wheel] = (copy / "wheels").glob("*.whl")
    site = copy / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_holds_the_whole_library_and_nothing_else(installed: Path):
    packed = {path for path in files_of(installed) if not path.parts[0].endswith(".dist-info")}
    here = {path for path in files_of(ROOT / "muon_jax") if "__pycache__" not in path.parts}
    assert packed == {Path("muon_jax") / path for path in here}


def test_a_wheel_imports_outside_of_the_checkout(installed: Path):
    # -I: neither the folder that it runs in nor PYTHONPATH leads to the checkout.
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(installed)]
    subprocess.run(command, cwd=installed.parent, check=True)


def test_tests_are_modules_of_one_package():
    """Otherwise files of one name in two folders would be one module, and pytest would stop."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").is_file()}
