"""The Colab notebook: as it is in git, its installation, and its cells from top to bottom."""

import base64
import copy
import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

from examples.colab import clean as clean_module
from examples.colab.clean import METADATA, NOTEBOOK, clean
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

TEXT = NOTEBOOK.read_text(encoding="utf-8")
CELLS = {cell.id: cell for cell in nbformat.reads(TEXT, as_version=4).cells}

# What the last cell of a test's copy tells of the notebook's variables.
TELL = """
import json
print(json.dumps({
    "devices": jax.device_count(), "muon": muon_losses, "adamw": adamw_losses, "again": again,
    "texts": texts,
}))
"""


class Finished(NamedTuple):
    """A notebook with its outputs, and what it told."""

    outputs: dict[str, list]
    told: dict


@pytest.fixture(scope="module", name="finished")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The notebook after ten steps on two devices, each compiled quickly and not well."""
    folder = tmp_path_factory.mktemp("notebook")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "MUON_DEMO_STEPS": "10",
        "MUON_DEMO_DATA": str(toy.write_corpus(folder / "corpus.txt")),
        "MUON_DEMO_FOLDER": str(folder / "saved"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    notebook = nbformat.reads(TEXT, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(TELL, id="tell"))
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute(env=environment)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    return Finished(outputs, json.loads(outputs["tell"][0].text))


def test_losses_fall_under_both_optimizers_from_the_same_start(finished: Finished):
    muon, adamw = finished.told["muon"], finished.told["adamw"]
    assert len(muon) == len(adamw) == 10
    assert muon[0] == pytest.approx(adamw[0], rel=1e-6)
    assert min(muon[-3:]) < muon[0] - 1 and min(adamw[-3:]) < adamw[0] - 1
    assert muon[-1] != adamw[-1]


def test_a_resumed_run_has_the_losses_of_the_uninterrupted(finished: Finished):
    told = finished.told
    assert told["devices"] == 2
    assert told["again"] == told["muon"][5:10]
    assert len(set(told["again"])) == 5


def test_its_pictures_show_something(finished: Finished):
    for name in ("losses", "spectrum"):
        (picture,) = [
            output.data["image/png"]
            for output in finished.outputs[name]
            if output.output_type == "display_data"
        ]
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600
        # Black frame and letters on white, and both curves.
        colours = (pixels[..., :3] * 255).round().astype(int) @ [1 << 16, 1 << 8, 1]
        assert {0xFFFFFF, 0x000000, 0x1F77B4, 0xFF7F0E} <= set(colours.ravel().tolist())


def shown(output: Any) -> str:
    """What a cell printed, or the value of its last line."""
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def test_it_tells_what_the_reader_is_to_see(finished: Finished):
    said = {name: "".join(map(shown, out)) for name, out in finished.outputs.items()}
    assert "2 x cpu, mesh data=2, preset tiny" in said["devices"]
    assert "muon: 103 matrices" in said["routing"]
    assert "contracted over axis" in said["routing"]  # as read from the loss
    assert "on 2 devices:" in said["optimizer"]
    assert "first half: 100%" in said["train"] and "loss=" in said["train"]
    assert said["sample"].startswith("    def __init__(self, ") and "tokens/s" in said["sample"]
    assert all(finished.told["texts"])
    errors = [o.text for out in finished.outputs.values() for o in out if o.get("name") == "stderr"]
    assert not errors


# --------------------------------------------------------------------------------------------------
# In git
# --------------------------------------------------------------------------------------------------


def test_it_is_committed_clean():
    assert clean(TEXT) == TEXT, "run python -m examples.colab.clean"
    notebook = nbformat.reads(TEXT, as_version=4)
    assert notebook.metadata == METADATA
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert notebook.metadata["accelerator"] == "GPU"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 40 for cell in code)


def test_cleaning_takes_away_what_running_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = nbformat.reads(TEXT, as_version=4)
    cell = run.cells[2]
    cell.outputs = [nbformat.v4.new_output("stream", text="said")]
    cell.execution_count, cell.metadata = 3, {"collapsed": True}
    run.metadata["kernelspec"] = {"name": "mine", "display_name": "Mine"}
    dirty = tmp_path / "dirty.ipynb"
    dirty.write_text(nbformat.writes(run), encoding="utf-8")
    monkeypatch.setattr(clean_module, "NOTEBOOK", dirty)
    clean_module.main()
    assert dirty.read_text(encoding="utf-8") == TEXT
    with pytest.raises(ValueError, match="not a notebook"):
        clean("{}")


# --------------------------------------------------------------------------------------------------
# Its first cells
# --------------------------------------------------------------------------------------------------


def test_steps_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUON_DEMO_STEPS", "7")
    with pytest.raises(ValueError, match="STEPS must be a multiple of 10, got 7"):
        exec(CELLS["parameters"].source, {})


def test_without_a_copy_it_asks_for_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="set REPOSITORY in the first cell"):
        exec(CELLS["install"].source, {"REPOSITORY": "", "Path": Path})


@pytest.mark.parametrize(
    "installed, extras",
    [
        (["jax", "jax-cuda12-plugin"], ["jax[cuda12]"]),
        (["jax", "libtpu"], ["jax[tpu]"]),
        (["jax"], []),
    ],
)
def test_elsewhere_it_clones_and_keeps_the_accelerator(
    installed: list[str],
    extras: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    commands = []
    distributions = [SimpleNamespace(name=name) for name in installed]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", copy.copy(sys.path))
    monkeypatch.setattr(metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    url = "https://example.org/muon.git"
    exec(CELLS["install"].source, {"REPOSITORY": url, "Path": Path})
    clone, install = commands
    root = str(tmp_path / "muon_jax")
    assert clone == ["git", "clone", "--depth=1", url, root]
    assert install[1:] == ["-m", "pip", "install", "-q", *extras, "-e", f"{root}[examples]"]
    assert sys.path[0] == root
