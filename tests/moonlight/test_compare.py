"""The declared comparison: its protocol on made-up runs, and its processes on real ones."""

import json
from pathlib import Path

import matplotlib.image
import pytest

from examples.moonlight import compare
from examples.moonlight.data.tokenized import load_corpus
from examples.moonlight.run_folder import metrics
from examples.one_thread import cores
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack


def arguments(folder: Path, **changes) -> compare.Args:
    settings = {
        "output_dir": folder / "compare",
        "data": toy.write_corpus(folder / "corpus.txt"),
        "cache_dir": folder / "cache",
        "steps": 40,
    }
    return compare.Args(**settings | changes)


def make_up_runs(monkeypatch: pytest.MonkeyPatch, final_loss) -> list[compare.Run]:
    """Replaces training by `final_loss(run)`, approached linearly; returns the runs asked for."""
    asked = []

    def train_in_process(run: compare.Run, args: compare.Args, core: int | None) -> dict:
        asked.append(run)
        folder = args.output_dir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / metrics.FILE).unlink(missing_ok=True)
        log = metrics.MetricsLog(folder, after_step=0)
        for step in range(1, args.steps + 1):
            loss = final_loss(run) + (args.steps - step) / 10
            log.write(metrics.TRAIN, step, {"loss": loss})
            if step % 10 == 0:
                log.write(metrics.VALIDATION, step, {"val_loss": loss})
        log.close()
        return {
            "final_val_loss": final_loss(run),
            "final_val_loss_per_byte": final_loss(run) / 4,
            "tokens_per_second": 1000.0,
            "versions": {},
            "device": "none",
        }

    monkeypatch.setattr(compare, "_train_in_process", train_in_process)
    return asked


def test_the_comparison_follows_its_declaration(tmp_path, monkeypatch, capsys):
    def final_loss(run: compare.Run) -> float:
        ahead = 1.5 if run.optimizer == "muon" else 0.0
        return 4.0 + abs(run.learning_rate - compare.GRID[1]) * 100 + run.seed / 10 - ahead

    asked = make_up_runs(monkeypatch, final_loss)
    args = arguments(tmp_path)
    summary = compare.compare(args)

    best = compare.GRID[1]
    assert summary["learning_rate"] == best
    assert set(asked[:4]) == {compare.Run("adamw", rate, 0) for rate in compare.GRID}
    assert set(asked[4:]) == {
        compare.Run(optimizer, best, seed) for optimizer in ("muon", "adamw") for seed in (0, 1, 2)
    }
    assert summary["optimizers"]["adamw"]["final_val_loss"] == pytest.approx([4.0, 4.1, 4.2])
    assert summary["optimizers"]["adamw"]["mean"] == pytest.approx(4.1)
    assert summary["optimizers"]["adamw"]["standard_deviation"] == pytest.approx(0.1)
    assert summary["muon_minus_adamw"] == pytest.approx([-1.5] * 3)
    assert summary["muon_steps_to_adamw"] == 30
    assert json.loads((args.output_dir / "compare.json").read_text())["steps"] == 40
    assert matplotlib.image.imread(args.output_dir / "compare.png").std() > 0.05
    printed = capsys.readouterr().out
    assert "Muon is ahead by 1.5000 on average, in 3 of 3 seeds" in printed
    assert "edge of the grid" not in printed


def test_adamw_is_reported_where_it_is_ahead(tmp_path, monkeypatch, capsys):
    make_up_runs(monkeypatch, lambda run: 4.0 + run.learning_rate - (run.optimizer == "adamw"))
    summary = compare.compare(arguments(tmp_path))
    assert summary["muon_steps_to_adamw"] is None
    printed = capsys.readouterr().out
    assert "AdamW is ahead by 1.0000 on average, in 3 of 3 seeds" in printed
    assert "is at the edge of the grid" in printed


def test_one_real_run_in_a_process_of_its_own(tmp_path: Path):
    args = arguments(tmp_path, steps=2)
    load_corpus(args.data, vocab_size=4096, cache_dir=args.cache_dir)
    run = compare.Run("adamw", 1e-3, 1)
    result = compare._train_in_process(run, args, cores(1)[0])
    settings = result["settings"]
    assert (settings["optimizer"], settings["learning_rate"]) == ("adamw", 1e-3)
    assert (settings["seed"], settings["data_seed"], settings["steps"]) == (1, 1, 2)
    assert len((args.output_dir / run.name / metrics.FILE).read_text().splitlines()) == 3


def test_a_failed_run_shows_what_it_said(tmp_path: Path):
    args = arguments(tmp_path, steps=2)
    folder = args.output_dir / "adamw-0.001-seed0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(RuntimeError, match=r"(?s)adamw-0\.001-seed0 ended with code 1.*no run was"):
        compare._finish([compare.Run("adamw", 1e-3, 0)], args)


def test_wrong_arguments_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        compare.compare(arguments(tmp_path, jobs=0))
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        compare.compare(arguments(tmp_path, steps=0))


def test_jobs_without_cores_of_their_own_wander():
    assert cores(10_000) == [None] * 10_000
