"""The docs' tables are those of the records, and pictures are drawn of them."""

import json
import shutil

import matplotlib.image
import pytest

from benchmarks.report import __main__ as report
from benchmarks.report import figures, tables
from examples.scaling_law.report import fill_in

RECORDS = report.read_records(report.DOCS)
PAGE = (report.DOCS / report.PAGE).read_text()


def test_the_page_has_the_records_tables():
    assert {"step", "orthogonalize"} <= RECORDS.keys()
    assert fill_in(PAGE, tables.all_tables(RECORDS)) == PAGE
    for name in ("step", "orthogonalize/times", "orthogonalize/errors", "accelerator"):
        assert f"<!-- table: {name} -->" in PAGE


def test_another_figure_makes_another_table():
    changed = json.loads(json.dumps(RECORDS))
    changed["step"]["cases"]["a"]["optimizers"]["muon_jax"]["step_s"] *= 2
    changed["orthogonalize"]["rows"][0]["peers"]["torch"]["matrix_s"] *= 2
    made, now = tables.all_tables(RECORDS), tables.all_tables(changed)
    assert {name for name in made if made[name] != now[name]} >= {"step", "orthogonalize/times"}


def test_one_command_makes_the_page_and_its_pictures_again(tmp_path):
    shutil.copytree(report.DOCS / "results", tmp_path / "results")
    page = tmp_path / report.PAGE
    page.write_text(PAGE.replace(" ms |", " s |"))
    report.main(report.Args(docs=tmp_path))
    assert page.read_text() == PAGE
    for name in ("step", "orthogonalize"):
        assert (report.DOCS / f"{name}.png").exists()
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.05


def test_what_failed_and_what_was_left_out_stands_in_the_tables():
    peers = {"muon_jax": {"matrix_s": 0.5, "share_of_peak": {"float32": 0.5, "bfloat16": 0.25}}}
    peers["muon_jax"]["polar_error"] = 0.2
    peers["optax"] = {"error": "MemoryError: too large"}
    row = {"model": "gpt2-small", "rows": 2, "cols": 3, "count": 48, "measured": 1, "flops": 1}
    measured = row | {"peers": peers, "exact_polar_error": 0.19}
    left = row | {"measured": 0, "left_out": "too long"}
    found = tables.orthogonalize_tables([measured, left])
    said = ("500.00", "MemoryError: too large", "", "", "")
    assert found["times"].rows[0][3:] == (*said, "50%", "25%")
    assert found["times"].rows[1][3] == "too long"
    assert found["errors"].rows == [("2 x 3", "0.1900", "0.2000", "MemoryError: too large", "")]
    assert found["models"].rows == []  # one of its shapes is missing
    assert tables.orthogonalize_tables([measured | {"count": 47}])["models"].rows == []
    assert tables.orthogonalize_tables([measured])["models"].rows[0][1:] == (
        "48",
        "24.00",
        "-",
        "-",
    )


def test_a_record_that_is_missing_is_said_and_not_drawn(tmp_path):
    made = tables.all_tables({})
    assert "`python -m benchmarks.accelerator`" in made["accelerator"].markdown()
    assert figures.draw_all({}, tmp_path) == []


@pytest.mark.parametrize("peers", [{}, {"muon_jax": {"error": "MemoryError: too large"}}])
def test_a_picture_is_drawn_without_what_failed(tmp_path, peers):
    step = json.loads(json.dumps(RECORDS["step"]))
    for case in step["cases"].values():
        case["optimizers"] = case["optimizers"] | peers
    path = figures.draw_steps(tmp_path / "step.png", step)
    assert matplotlib.image.imread(path).std() > 0.05
