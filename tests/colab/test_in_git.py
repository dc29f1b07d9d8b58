"""The notebooks as they are in git, and the cell with which each of them installs."""

import copy
import subprocess
import sys
from importlib import metadata as installed_metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from examples.colab import clean as clean_module
from examples.colab.clean import NOTEBOOKS, clean, metadata

pytestmark = pytest.mark.one_stack

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MOONLIGHT = next(path for path in NOTEBOOKS if path.stem == "train_moonlight")


def cells(path: Path) -> dict[str, str]:
    """The sources of a notebook's cells, by their ids."""
    return {cell.id: cell.source for cell in nbformat.read(path, as_version=4).cells}


def test_there_are_three():
    assert {path.stem for path in NOTEBOOKS} == {
        *("muon_in_five_minutes", "shard_your_optimizer", "train_moonlight"),
    }


@every_notebook
def test_it_is_committed_clean(path: Path):
    text = path.read_text(encoding="utf-8")
    assert clean(text, path.name) == text, "run python -m examples.colab.clean"
    notebook = nbformat.reads(text, as_version=4)
    assert notebook.metadata == metadata(path.name)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 40 for cell in code)


@every_notebook
def test_it_says_how_to_run_it_in_colab(path: Path):
    title = cells(path)["title"]
    for words in ("File > Open notebook > GitHub", "`REPOSITORY`", "Runtime > Run all"):
        assert words in title


def test_only_moonlight_asks_for_a_gpu():
    asking = [path for path in NOTEBOOKS if "accelerator" in metadata(path.name)]
    assert asking == [MOONLIGHT]


def test_cleaning_takes_away_what_running_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = nbformat.read(MOONLIGHT, as_version=4)
    cell = run.cells[2]
    cell.outputs = [nbformat.v4.new_output("stream", text="said")]
    cell.execution_count, cell.metadata = 3, {"collapsed": True}
    run.metadata["kernelspec"] = {"name": "mine", "display_name": "Mine"}
    dirty = tmp_path / MOONLIGHT.name
    dirty.write_text(nbformat.writes(run), encoding="utf-8")
    monkeypatch.setattr(clean_module, "NOTEBOOKS", (dirty,))
    clean_module.main()
    assert dirty.read_bytes() == MOONLIGHT.read_bytes()
    with pytest.raises(ValueError, match="not a notebook"):
        clean("{}", "any.ipynb")


# --------------------------------------------------------------------------------------------------
# Installation
# --------------------------------------------------------------------------------------------------


def test_all_install_alike():
    first, *others = (
        [line for line in cells(path)["install"].splitlines() if not line.startswith("needed, ")]
        for path in NOTEBOOKS
    )
    assert all(other == first for other in others)
    assert len({cells(path)["install-text"] for path in NOTEBOOKS}) == 1


@every_notebook
def test_without_a_copy_it_asks_for_the_repository(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert 'REPOSITORY = ""' in cells(path)["parameters"]
    with pytest.raises(FileNotFoundError, match='into REPOSITORY = "" in the first cell'):
        exec(cells(path)["install"], {"REPOSITORY": ""})


@pytest.mark.parametrize(
    "installed, extras",
    [
        (["jax", "jax-cuda12-plugin"], ["jax[cuda12]"]),
        (["jax", "libtpu"], ["jax[tpu]"]),
        (["jax"], []),
    ],
)
@every_notebook
def test_elsewhere_it_clones_and_keeps_the_accelerator(
    path: Path,
    installed: list[str],
    extras: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    commands = []
    distributions = [SimpleNamespace(name=name) for name in installed]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", copy.copy(sys.path))
    monkeypatch.setattr(installed_metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(
        subprocess, "run", lambda command, check, cwd=None: commands.append((command, cwd))
    )
    url, root = "https://example.org/muon.git", tmp_path / "muon_jax"
    exec(cells(path)["install"], {"REPOSITORY": url})
    clone, install = commands
    packages = ["-e", ".[examples]"] if path == MOONLIGHT else ["matplotlib", "-e", "."]
    assert clone == (["git", "clone", "--depth=1", url, str(root)], None)
    assert install == ([sys.executable, "-m", "pip", "install", "-q", *extras, *packages], root)
    assert sys.path[0] == str(root)
