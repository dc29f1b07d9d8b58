"""What is installed is what is here: it imports by itself, at little cost, and has its types."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

import muon_jax
from tests.packaged import imports_more, pack, unpack

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
import jax, jaxtyping, optax
before = set(sys.modules)
import muon_jax
print(*sorted(set(sys.modules) - before))
for found in pkgutil.walk_packages(muon_jax.__path__, "muon_jax."):
    module = importlib.import_module(found.name)
    assert module.__file__.startswith(folder), module.__file__
"""
# What a user under pyright's strict rules may write, with every public name in it. Arrays come from
# outside: jax's own functions that make some are not known throughout.
USER = """
import jax

from muon_jax import MuonDimensionNumbers, by_path, muon, routing_report, update_rms
{imports}


def train(params: dict[str, jax.Array], gradients: dict[str, jax.Array]) -> list[str]:
    rules = by_path({{"proj": MuonDimensionNumbers(-2, -1)}})
    tx = muon(1e-3, muon_weight_dimension_numbers=rules)
    state = tx.init(params)
    updates, state = tx.update(gradients, state, params)
    print(float(update_rms(updates)), {names})
    rows = routing_report(params, muon_weight_dimension_numbers=rules).rows
    return [row.path for row in rows]
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The unpacked source distribution, and a folder like those of installed packages."""
    folder = tmp_path_factory.mktemp("packed")
    source, wheel = pack(folder)
    return source, unpack(wheel, folder / "env/lib/python3.11/site-packages")


def test_an_editable_install_finds_the_examples_too(tmp_path: Path):
    """`python -m examples.moonlight.train` then works from any folder."""
    shutil.copytree(ROOT / "muon_jax", tmp_path / "muon_jax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    command = [sys.executable, "-c", build]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        [path] = [name for name in packed.namelist() if name.endswith(".pth")]
        assert packed.read(path).decode().strip() == str(tmp_path.resolve())


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_holds_the_whole_library_and_nothing_else(packed):
    installed = {path for path in files_of(packed[1]) if not path.parts[0].endswith(".dist-info")}
    here = {path for path in files_of(ROOT / "muon_jax") if "__pycache__" not in path.parts}
    assert installed == {Path("muon_jax") / path for path in here}
    assert [*packed[1].glob("*.dist-info/licenses/LICENSE")]


def test_a_source_distribution_holds_what_packing_takes(packed):
    files = files_of(packed[0])
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"):
        assert Path(name) in files
    here = files_of(ROOT / "muon_jax")
    assert {Path("muon_jax") / path for path in here if "__pycache__" not in path.parts} <= files
    # Core tests, and all that those import which need nothing else.
    core = [path for path in packed[0].glob("tests/*/test_*.py") if not imports_more(path)]
    assert {"optimizer", "routing", "mesh"} == {path.parent.name for path in core}
    assert len(core) > 15


def test_a_wheel_imports_by_itself_and_little_else(packed):
    # -I: neither the folder that it runs in nor PYTHONPATH leads to the checkout.
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(packed[1])]
    ended = subprocess.run(
        command, cwd=packed[0].parent, check=True, capture_output=True, text=True
    )
    loaded = ended.stdout.split()
    foreign = {name for name in loaded if name.partition(".")[0] != "muon_jax"}
    assert foreign <= {"jax.experimental.layout"}  # which `jax` itself does not load
    # What is for those who ask: the reader of programs, the command line.
    assert not {name for name in loaded if name.startswith("muon_jax._planning")}
    assert "muon_jax._routing.use.reader" not in loaded


def test_types_hold_for_a_user_under_strict_rules(packed, tmp_path):
    public = sorted({*muon_jax.__all__})
    used = {"MuonDimensionNumbers", "by_path", "muon", "routing_report", "update_rms"}
    others = [name for name in public if name not in used]
    imports = "\n".join(f"from muon_jax import {name}" for name in others)
    (tmp_path / "user.py").write_text(USER.format(imports=imports, names=", ".join(public)))
    # As installed: a package's types are inferred only as far as py.typed lets them be. Everything
    # else is where it is for this Python.
    (packed[1] / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    settings = {
        "typeCheckingMode": "strict",
        "venvPath": str(packed[0].parent),
        "venv": "env",
        "reportMissingTypeStubs": False,  # Optax has no py.typed
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--project", str(tmp_path), "--outputjson"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    assert [entry["message"] for entry in found["generalDiagnostics"]] == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == muon_jax.__version__
    assert citation["authors"] == [{"name": "The muon_jax authors"}]
    assert f"## {muon_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_tests_are_modules_of_one_package():
    """Otherwise files of one name in two folders would be one module, and pytest would stop."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").is_file()}
