"""A run through all three stages: on and back, the same bits; and runs that branch off from it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from examples.moonlight.data import batches
from examples.moonlight.data.sources import parse_mixes
from examples.moonlight.run_folder import branching, metrics, reading, storage
from examples.moonlight.run_folder.folder import CHECKPOINTS
from examples.moonlight.schedule.stages import make_plan
from examples.moonlight.train import train
from examples.moonlight.training import args, loop
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

# Three steps of warmup, by two sequences; after the fourth step, four; one that rises again.
STAGES = {"warmup": 3, "decay": 57, "cooldown": 62}
SOURCES = ("general", "quality")
MIXES = ("general=1", "general=3,quality=1", "general=1,quality=3")


def arguments(folder: Path, **changes):
    for name, step in (("general", 3), ("quality", 7)):
        path = folder / f"{name}.txt"
        if not path.exists():
            path.write_text("".join(f"{name} {i} is {i * i % step}\n" for i in range(800)))
    settings = {
        "data": tuple(f"{name}={folder / name}.txt" for name in SOURCES),
        "mix": MIXES,
        "schedule": "moonlight",
        "steps": None,
        "total_tokens": 60 * 64,
        "warmup_steps": 3,
        "checkpoint_every": 2,
        "eval_every": 20,
        "max_to_keep": 1,
        "keep_every_tokens": 64,
        "steps_per_call": 5,
        "prompt": "general ",
    }
    return toy.arguments(folder, **settings | changes)


def lines(folder: Path) -> list[dict]:
    """Every record of a run but its speed."""
    records = map(json.loads, (folder / "run" / metrics.FILE).read_text().splitlines())
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in records
    ]


def checkpoints(folder: Path) -> list[int]:
    return storage.kept_steps(folder / "run" / CHECKPOINTS)


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; its run is in `run`."""
    folder = tmp_path_factory.mktemp("staged")
    train(arguments(folder), toy.CONFIG)
    return folder


def test_a_run_follows_its_plan(whole: Path):
    results = json.loads((whole / "run" / "results.json").read_text())
    assert results["stages"] == STAGES
    steps = trained(whole)
    rates = [record["learning_rate"] for record in steps]
    assert rates[:4] == pytest.approx([4e-3 / 3, 8e-3 / 3, 4e-3, 4e-3])
    assert rates[56] < 4.1e-4
    assert rates[57:] == pytest.approx([4e-3 / 4.2 * part for part in (1, 1, 0.75, 0.5, 0.25)])
    tokens = np.diff([0, *(record["tokens"] for record in steps)])
    assert tokens.tolist() == [32] * 4 + [64] * 58
    # Validated by source, and the whole in proportion to their text.
    last = lines(whole)[-1]
    assert last["val_loss"] == pytest.approx(
        np.average([last[f"val_loss/{name}"] for name in SOURCES], weights=[1, 1]), abs=0.02
    )
    assert results["final_val_loss_by_source"]["quality"] == last["val_loss/quality"]
    assert (whole / "run" / "schedule.png").stat().st_size > 5000


def test_every_source_goes_on_through_the_stages(whole: Path):
    folder = whole / "run" / CHECKPOINTS
    progress = reading.read_progress(folder, STAGES["decay"])
    # Batches of two; the first stage reads one source only.
    assert progress["data"] == {"next_index": 4 + 2 * 53}
    assert progress["read"] == {"general": 6 + 161, "quality": 53}


class Killed(BaseException):
    """What no one catches."""


def test_a_run_goes_on_and_back_through_all_stages(
    whole: Path, tmp_path: Path, monkeypatch, capsys
):
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    steps_until_stop = loop._steps_until_stop

    def train_until(killed_at: int, **changes) -> None:
        def stop(step: int, *rest) -> int:
            if step >= killed_at:
                raise Killed
            return steps_until_stop(step, *rest)

        monkeypatch.setattr(loop, "_steps_until_stop", stop)
        if killed_at < STAGES["cooldown"]:
            with pytest.raises(Killed):
                train(arguments(folder, **changes), toy.CONFIG)
        else:
            train(arguments(folder, **changes), toy.CONFIG)

    # Back from the end into the warmup; on into the decay, into the cooldown, and to the end.
    every = {"keep_every_tokens": 1280}
    train_until(22, resume_step=2, **every)
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"deleting the checkpoints 3, 4, .*62, all metrics after step 2, and", printed)
    assert checkpoints(folder) == [3, 22]
    assert not (folder / "run" / "results.json").exists()
    train_until(59, resume=True, checkpoint_every=12, **every)
    assert checkpoints(folder) == [3, 22, 48, 57, 60]
    train_until(62, resume=True, checkpoint_every=12, **every)
    # Stages' ends; and the first after every 1280 tokens, of 22, 24, 36, 48, 57, 60, 62.
    assert checkpoints(folder) == [3, 22, 48, 57, 62]
    assert trained(folder) == trained(whole)
    assert lines(folder)[-1] == lines(whole)[-1]
    toy.assert_same_state(whole / "run", folder / "run")
    assert len([*(folder / "run" / "tensorboard").iterdir()]) == 4


def trained(folder: Path) -> list[dict]:
    return [record for record in lines(folder) if record["kind"] == "train"]


def test_a_branch_repeats_the_cooldown_with_other_text(whole: Path, tmp_path: Path):
    source = whole / "run"
    before = {path: path.read_bytes() for path in source.glob("*.json*")}
    changes = {
        "cache_dir": whole / "cache",
        "branch_from": f"{source}@57",
        "mix": (*MIXES[:2], "quality=1"),
        "resume": True,
    }
    results = train(arguments(tmp_path, **changes), toy.CONFIG)
    assert trained(tmp_path)[:57] == trained(whole)[:57]
    # The same weights, and another text.
    assert trained(tmp_path)[57]["loss"] != trained(whole)[57]["loss"]
    assert results["settings"]["branch_from"] == f"{source}@57"
    assert results["stages"] == STAGES
    assert {path: path.read_bytes() for path in source.glob("*.json*")} == before
    # What is branched off stands on its own, and is not copied again.
    assert train(arguments(tmp_path, **changes), toy.CONFIG) == results


def test_a_branch_may_cool_down_from_the_middle_of_a_run(whole: Path, tmp_path: Path):
    settings = json.loads((whole / "run" / "settings.json").read_text())
    recipe = args.resolve(arguments(whole, cooldown_at=24))
    mixes = parse_mixes(MIXES, dict.fromkeys(SOURCES))
    spans = batches.plan_spans(
        make_plan(recipe, bias_rate=1e-3, mixes=mixes), dict.fromkeys(SOURCES, 1)
    )
    branch = branching.find_branch(f"{whole / 'run'}@24", tmp_path / "none", settings, spans)
    assert branch == (whole / "run", 24)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"resume_step": 5}, ValueError, "--resume-step 5: .* it keeps 2, 3, 4, 6, 8"),
        ({"output_dir": Path("none"), "resume_step": 4}, FileNotFoundError, "no run was started"),
        ({"branch_from": "nowhere@3"}, FileNotFoundError, "nowhere holds no run"),
        ({"branch_from": "run@5"}, ValueError, "no checkpoint of step 5; it keeps 2, 3, 4, 6, 8"),
        ({"branch_from": "run@62"}, ValueError, "this run ends after 62 steps; nothing would be"),
        ({"branch_from": "run@24", "data_seed": 3}, ValueError, "data_seed was 0 and is now 3"),
        (
            {"branch_from": "run@24", "mix": ("general=1,quality=1",)},
            ValueError,
            r"has read .*'quality': 20.* would have been .*'quality': 44",
        ),
    ],
)
def test_what_cannot_be_gone_back_to_is_refused(
    whole: Path, changes: dict, error: type, message: str, monkeypatch
):
    monkeypatch.chdir(whole)
    before = sorted(path.name for path in whole.iterdir())
    if "branch_from" in changes:
        changes = {"output_dir": Path("new"), **changes}
    with pytest.raises(error, match=message):
        train(arguments(whole, **changes), toy.CONFIG)
    assert sorted(path.name for path in whole.iterdir()) == before
    assert checkpoints(whole)[-1] == 62
