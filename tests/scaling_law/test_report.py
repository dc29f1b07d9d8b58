"""A whole study at toy size, and the committed one."""

import dataclasses
import json
from pathlib import Path

import matplotlib.image
import pytest

from examples.scaling_law import __main__ as command
from examples.scaling_law import ablations, report, tables
from examples.scaling_law.store import RUNS
from examples.scaling_law.studies import QUICK, STUDIES, Grid
from tests.scaling_law import small

pytestmark = pytest.mark.one_stack

TOY = dataclasses.replace(
    QUICK,
    sizes=(1, 2),
    grids={1: Grid((4e-3, 8e-3), (1,))},
    fractions=(0.5,),
    head_dim=4,
    sequence_length=16,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy study, trained in this process."""
    folder = tmp_path_factory.mktemp("study")
    corpus = small.write_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "gpu", TOY)
        patch.setattr(command.jax, "default_backend", lambda: "gpu")
        command.run(command.Args(preset="gpu", output_dir=folder / "out", data=corpus))
    return folder


def test_a_study_writes_numbers_and_figures(finished: Path):
    summary = json.loads((finished / "out" / report.SUMMARY).read_text())["gpu"]
    assert list(summary["sizes"]) == ["1", "2"]
    assert set(summary["laws"]) == {"power"}
    for size in summary["sizes"].values():
        gain = size["gain"]
        assert gain["low"] <= gain["value"] <= gain["high"]
        # So short a training may not fall at all: then there is no ratio, and that is said.
        assert size["direct"].keys() == {"value", "low", "high", "inside"}
        assert size["price_of_a_token"] > 1
        assert len(size["adamw"]) == len(size["muon"]["0.5"]) == 2
    drawn = sorted(path.name for path in (finished / "out" / report.FIGURES).iterdir())
    assert drawn == ["bowls_gpu.png", "ratios_gpu.png", "scaling_gpu.png"]
    for name in drawn:
        assert matplotlib.image.imread(finished / "out" / report.FIGURES / name).std() > 0.01


def test_a_finished_study_trains_nothing_and_says_the_same(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    runs = (finished / "out" / RUNS).read_bytes()
    numbers = (finished / "out" / report.SUMMARY).read_bytes()
    monkeypatch.setitem(STUDIES, "gpu", TOY)
    monkeypatch.setattr(command.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(command.Pool, "_train", lambda *args: pytest.fail("trained again"))
    command.run(command.Args(preset="gpu", output_dir=finished / "out", data=finished / "corpus"))
    assert (finished / "out" / RUNS).read_bytes() == runs
    assert (finished / "out" / report.SUMMARY).read_bytes() == numbers
    assert "equal loss" in capsys.readouterr().out


def test_a_plan_trains_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command.Pool, "_train", lambda *args: pytest.fail("trained"))
    for preset in ("quick", "main", "distinct", "1m", "ablations"):
        command.run(command.Args(preset=preset, output_dir=tmp_path / "out", plan=True))
        assert f"{preset}: the plan, before tuning" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_corpus_that_is_too_small_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(ValueError, match=r"times, and more than 4 times.*--data"):
        command.run(command.Args(preset="gpu", output_dir=tmp_path / "out", plan=True))


def test_wrong_arguments_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        command.run(command.Args(jobs=0))
    with pytest.raises(ValueError, match="--preset is gpu: give one"):
        command.run(command.Args(preset="gpu", quick=True))
    with pytest.raises(RuntimeError, match="JAX finds no GPU or TPU here"):
        command.run(command.Args(preset="gpu"))
    with pytest.raises(FileNotFoundError, match=r"runs\.jsonl is not there: run"):
        report.report(tmp_path)
    (tmp_path / RUNS).touch()
    with pytest.raises(ValueError, match="no study is complete"):
        report.report(tmp_path)


def test_tables_of_a_page_are_made_anew():
    summary = {"ablations": {"routing": {"question": "?", "settings": {}}}}
    page = "before <!-- table: ablations/routing --> old <!-- end --> after"
    filled = report.fill_in(page, summary)
    assert "| setting | validation loss | seeds |" in filled
    assert "old" not in filled and filled.startswith("before") and filled.endswith("after")
    assert report.fill_in(filled, summary) == filled
    with pytest.raises(ValueError, match="no table 'other'"):
        report.fill_in("<!-- table: other --><!-- end -->", summary)
    with pytest.raises(ValueError, match="has no `<!-- end -->`"):
        report.fill_in("<!-- table: ablations/routing -->", summary)


def test_the_longer_side_of_a_table_goes_down_in_the_terminal():
    def columns(table: tables.Table) -> list[list[str]]:
        made = table.rich()
        return [[str(column.header), *column.cells] for column in made.columns]

    wide = tables.Table("", ("size", "loss", "rate", "batch"), [("2", "1.5", "0.1", "8")])
    assert columns(wide) == [["size", "loss", "rate", "batch"], ["2", "1.5", "0.1", "8"]]
    long = tables.Table("", ("size", "loss"), [("2", "1.5"), ("3", "1.2"), ("4", "1.1")])
    assert columns(long) == [["size", "2", "3", "4"], ["loss", "1.5", "1.2", "1.1"]]


def test_a_study_that_uses_the_main_one_s_grids_has_no_tuning_of_its_own():
    summary = {"main": {"tuned": 1}, "distinct": {"tuned": 1}, "quick": {"tuned": 2}}
    own = [name for name in summary if tables.has_own_tuning(name, summary)]
    assert own == ["main", "quick"]
    assert tables.has_own_tuning("distinct", {"distinct": {"tuned": 1}})


def test_ablations_change_one_thing_each():
    declared = ablations.ablations(lambda layers: small.RUN.replace(layers=layers))
    for ablation in declared.values():
        about_heads = ablation.name in ("heads", "each_head")
        seeds = ablations.HEADS_SEEDS if about_heads else ablations.SEEDS
        for runs in ablation.variants.values():
            assert [run.seed for run in runs] == list(seeds)
        fields = [dataclasses.asdict(runs[0]) for runs in ablation.variants.values()]
        changed = {name for name in fields[0] if len({str(f[name]) for f in fields}) > 1}
        allowed = {
            "scales": {"scale"},
            "update_rms": {"update_rms", "optimizer"},
            "newton_schulz": {"ns_coeffs", "ns_steps"},
            "learning_rate": {"learning_rate", "optimizer"},
            "batch": {"batch", "optimizer"},
            "routing": {"muon_too"},
            "weight_decay": {"weight_decay", "optimizer"},
            "entropy": {"family", "optimizer"},
            "heads": {"heads_per_group"},
            "each_head": {"heads_per_group"},
        }
        assert changed == allowed[ablation.name]


# --------------------------------------------------------------------------------------------------
# What is committed
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The committed runs, summarised again."""
    folder = tmp_path_factory.mktemp("committed")
    (folder / RUNS).write_bytes((report.HERE / "results" / RUNS).read_bytes())
    return report.report(folder)


def test_the_committed_numbers_follow_from_the_committed_runs(committed: dict):
    there = json.loads((report.HERE / "results" / report.SUMMARY).read_text())
    flat, flat_there = (dict(_leaves(value)) for value in (committed, there))
    assert flat.keys() == flat_there.keys()
    for name, value in flat.items():
        # Optimizers of SciPy releases stop at different last digits.
        expected = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
        assert flat_there[name] == expected, name


def test_the_page_has_the_tables_of_the_committed_numbers():
    there = json.loads((report.HERE / "results" / report.SUMMARY).read_text())
    page = (report.HERE / "REPORT.md").read_text()
    assert report.fill_in(page, there) == page
    made = tables.all_tables(there)
    for name in made:
        assert f"<!-- table: {name} -->" in page or name == "distinct/updates"


def _leaves(value, name: str = ""):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}/{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{name}/{i}")
    else:
        yield name, value
