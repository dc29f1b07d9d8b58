"""The debugging page says what the record of the runs says, and the runs can be made again."""

import json
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

from benchmarks.sick_runs import figure
from benchmarks.sick_runs.cases import CASES
from benchmarks.sick_runs.train import UNSEEN, batches, program

DOCS = Path(__file__).parents[2] / "docs"
RECORD = json.loads((DOCS / "results/sick_runs.json").read_text())
PAGE = (DOCS / "debugging.md").read_text()


@pytest.fixture(name="runs")
def _runs() -> dict:
    return {
        name: {key: np.asarray(values) for key, values in record.items()}
        for name, record in RECORD["runs"].items()
    }


def test_the_page_has_the_records_table():
    table = PAGE.partition("<!-- table: sick_runs -->")[2].partition("<!-- end -->")[0]
    assert table.strip() == figure.table(RECORD["runs"])


def test_each_run_shows_what_the_page_says_of_it(runs):
    assert runs.keys() == CASES.keys()
    healthy = runs["healthy"]
    end = {name: record["loss"][-5:].mean() for name, record in runs.items()}
    assert min(end, key=end.__getitem__) == "healthy"
    assert {name for name in end if end[name] > 2.3} == {"rate", "clipped"}
    assert (abs(healthy["update_rms"] - 0.2) < 0.05).all()
    np.testing.assert_allclose(healthy["arrived"], 1, rtol=1e-2)
    # A learning rate too high.
    assert runs["rate"]["max_logit"].max() > 100 * healthy["max_logit"].max()
    assert runs["rate"]["update_rms"].min() < 0.6 * healthy["update_rms"].min()
    # Decay that is lost, and updates at the end.
    ends = {name: runs[name]["unseen"][-1] / runs[name]["unseen"][0] for name in runs}
    assert ends["bfloat16"] == 1 and 0.87 < ends["slow"] < 0.89
    assert runs["bfloat16"]["arrived"][-1] < 0.5
    # Clipping, by the norm of an orthogonal update.
    assert runs["clipped"]["update_rms"].max() < 0.1 * healthy["update_rms"].min()
    # Roles and shapes that are wrong leave the RMS of the matrices as it was.
    for name in ("tables", "folded"):
        np.testing.assert_allclose(runs[name]["update_rms"], healthy["update_rms"], rtol=0.1)
    assert np.ptp(runs["tables"]["embed_update"]) < 0.03 < np.ptp(healthy["embed_update"])
    assert (runs["folded"]["orthogonality"] > 1.8 * healthy["orthogonality"]).all()
    assert runs["folded"]["entropy"][-1] < healthy["entropy"][-1] - 0.05
    # No decay.
    assert runs["decay"]["weight_rms"][-1] > 1.4 * healthy["weight_rms"][-1]
    assert runs["decay"]["max_logit"][-1] > 5 * healthy["max_logit"][-1]


def test_the_pictures_are_drawn_and_shown(tmp_path, runs):
    some = {name: runs[name] for name in ("healthy", "decay")}
    for path in figure.draw(tmp_path, some, RECORD["every"]):
        assert matplotlib.image.imread(path).std() > 0.05
    for name in CASES:
        assert (f"(run_{name}.png)" in PAGE) == bool(CASES[name].shows)


def test_a_run_can_be_traced():
    """Traced only: to compile it takes a quarter of a minute."""
    texts = batches(2, 2, 2, 8)
    assert texts.shape == (2, 2, 2, 9) and texts.min() >= UNSEEN
    seen = jax.eval_shape(program(CASES["folded"], texts.shape, width=8, layers=2), texts)
    assert seen.keys() == RECORD["runs"]["folded"].keys()
    assert {value.shape for value in seen.values()} == {(2,)}
