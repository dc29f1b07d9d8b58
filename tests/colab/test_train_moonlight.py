"""`train_moonlight.ipynb`, from top to bottom."""

from typing import Any

import nbformat
import pytest

from examples.colab.clean import FOLDER
from tests.colab.executed import Executed, execute
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

NAME = "train_moonlight.ipynb"
TELL = """{
    "devices": jax.device_count(), "muon": muon_losses, "adamw": adamw_losses, "again": again,
    "texts": texts,
}"""


@pytest.fixture(scope="module", name="executed")
def _executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The notebook after ten steps on two devices."""
    folder = tmp_path_factory.mktemp("notebook")
    corpus = toy.write_corpus(folder / "corpus.txt")
    settings = f"STEPS, DATA, FOLDER = 10, {str(corpus)!r}, Path({str(folder / 'saved')!r})"
    return execute(NAME, folder, settings=settings, tell=TELL, devices=2)


def test_losses_fall_under_both_optimizers_from_the_same_start(executed: Executed):
    muon, adamw = executed.told["muon"], executed.told["adamw"]
    assert len(muon) == len(adamw) == 10
    assert muon[0] == pytest.approx(adamw[0], rel=1e-6)
    assert min(muon[-3:]) < muon[0] - 1 and min(adamw[-3:]) < adamw[0] - 1
    assert muon[-1] != adamw[-1]


def test_a_resumed_run_has_the_losses_of_the_uninterrupted(executed: Executed):
    told = executed.told
    assert told["devices"] == 2
    assert told["again"] == told["muon"][5:10]
    assert len(set(told["again"])) == 5


def test_its_pictures_show_both_curves(executed: Executed):
    for cell in ("losses", "spectrum"):
        # A black frame and letters on white.
        assert {0xFFFFFF, 0x000000, 0x1F77B4, 0xFF7F0E} <= executed.colours(cell)


def test_it_tells_what_the_reader_is_to_see(executed: Executed):
    assert "2 x cpu, mesh data=2, preset tiny" in executed.said("devices")
    assert "muon: 103 matrices" in executed.said("routing")
    assert "contracted over axis" in executed.said("routing")  # as read from the loss
    assert "on 2 devices:" in executed.said("optimizer")
    assert "first half: 100%" in executed.said("train") and "loss=" in executed.said("train")
    sample = executed.said("sample")
    assert sample.startswith("    def __init__(self, ") and "tokens/s" in sample
    assert all(executed.told["texts"])
    assert not executed.errors()


def test_steps_that_do_not_divide_are_refused():
    (first,) = (
        cell.source for cell in nbformat.read(FOLDER / NAME, 4).cells if cell.id == "parameters"
    )
    names: dict[str, Any] = {}
    with pytest.raises(ValueError, match="STEPS must be a multiple of 10, got 7"):
        exec(first.replace("STEPS = 300", "STEPS = 7"), names)
