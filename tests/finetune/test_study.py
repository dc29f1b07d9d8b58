"""The fine-tuning study: its task, one run of it, and the report that is beside it."""

import dataclasses
import json
import math

import matplotlib.image
import numpy as np
import pytest

from examples.finetune.study import protocol, report, runs, task
from examples.finetune.study.__main__ import plan_table
from examples.finetune.study.analysis import summarize
from examples.finetune.study.protocol import STUDIES, Run, from_json, to_json
from examples.finetune.study.tables import all_tables
from examples.finetune.study.training import train
from examples.scaling_law.report import fill_in

pytestmark = pytest.mark.one_stack

MAIN = STUDIES["main"]


def text_of(rows, number):
    """What a row says, and which of its bytes count."""
    tokens, targets, weight = (x[number] for x in rows[:3])
    length = int((rows.segment_bt[number] > 0).sum())
    said = bytes([tokens[0], *targets[:length]]).decode()
    return said, bytes(targets[weight > 0].astype(np.uint8)).decode()


def test_no_question_is_in_two_parts():
    asked = {
        part: {text_of(rows, i)[0] for i in range(len(rows.tokens_bt))}
        for part in task.PARTS
        for rows in [task.task_rows(part)]
    }
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == 5050
    assert min(map(len, asked.values())) > 1000


def test_the_answer_and_the_end_of_its_line_count():
    rows = task.task_rows("test")
    for number in range(0, len(rows.tokens_bt), 100):
        said, counted = text_of(rows, number)
        question, answer = said.split("? ")
        _, _, _, a, _, b = question.split()
        assert counted == answer == f"{int(a) - int(b)}\n"


def test_pretraining_never_shows_the_task():
    rows = task.pretraining_rows(0, 50, 8)
    text = bytes(rows.tokens_bt.astype(np.uint8)).decode()
    assert "plus" in text and "minus" not in text
    assert (rows.weight_bt == 1).all() and rows.tokens_bt.shape == (50, 8, task.LENGTH)


def test_seeds_order_the_same_questions_otherwise():
    first, again, other = (task.training_rows(seed, 95, 32).tokens_bt for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    kinds = [{bytes(row) for row in x.reshape(-1, task.LENGTH)[:3030]} for x in (first, other)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 3030


def test_a_run_is_found_by_what_it_trains():
    run = MAIN.tuning(MAIN.cells()[0])[0]
    assert from_json(json.loads(json.dumps(to_json(run)))).key() == run.key()
    changed = [dataclasses.replace(run, seed=7), dataclasses.replace(run, measured_on="test")]
    assert len({x.key() for x in (run, run.base, *changed)}) == 4
    keys = [run.key() for cell in MAIN.cells() for run in MAIN.tuning(cell)]
    assert len(set(keys)) == len(keys) == 120


def made_up(run):
    """A record in which Muon is ahead where the model was pre-trained with it, by seed."""
    ahead = 0.1 * (run.optimizer == run.pretrained_by == "muon")
    loss = abs(math.log(run.learning_rate / 3e-3)) + run.seed / 100
    return {
        "key": run.key(),
        "run": to_json(run),
        "loss": loss,
        "exact": 0.5 + ahead + run.seed / 100,
        "curve": [],
        "cpu_seconds": 1.0,
        "seconds": 1.0,
    }


@pytest.fixture
def store(tmp_path):
    store = runs.open_store(tmp_path)
    for run in MAIN.bases():
        store.append(made_up(run))
    for cell in MAIN.cells():
        for run in MAIN.tuning(cell):
            store.append(made_up(run))
        for run in MAIN.reported(cell, 3e-3):
            store.append(made_up(run))
    return store


def test_every_cell_has_its_rate_its_seeds_and_its_pairs(store, tmp_path):
    summary = report.report(tmp_path, "main")
    cell = summary["full"]["cells"]["muon -> muon"]
    assert cell["rate"] == 3e-3 and not cell["at_edge"]
    assert cell["exact"] == pytest.approx([0.6 + seed / 100 for seed in protocol.SEEDS])
    assert summary["lora"]["pairs"]["muon"]["muon_ahead"] == 5
    assert summary["lora"]["pairs"]["adamw"]["mean"] == 0
    made = all_tables(summary)
    assert made["full"].rows[0][1].startswith("63.0% ± 1.6%")
    assert "**" in made["lora/rates"].rows[0][3]
    assert matplotlib.image.imread(tmp_path / report.FIGURE).std() > 0.05


def test_runs_that_are_missing_are_named(store, tmp_path):
    assert [*plan_table(MAIN, tmp_path, "main").columns[2].cells] == ["0", "0", ""]
    with pytest.raises(KeyError):
        summarize(STUDIES["quick"], store)


def test_a_cell_whose_runs_all_diverged_ends_the_study(tmp_path):
    store, tuning = runs.open_store(tmp_path), MAIN.tuning(MAIN.cells()[0])
    for run in tuning:
        store.append(made_up(run) | {"loss": None, "exact": None})
    with pytest.raises(RuntimeError, match=r"every rate of .* diverged"):
        runs.chosen_rate(store, tuning)


def test_a_rate_is_chosen_by_the_mean_of_its_seeds(tmp_path):
    store, tuning = runs.open_store(tmp_path), MAIN.tuning(MAIN.cells()[0])
    seeds, low, lucky, diverged = protocol.TUNING_SEEDS, 1e-3, 3e-3, 1e-2
    for run in tuning:
        loss = {low: 0.5, lucky: 0.1 if run.seed == seeds[0] else 0.8}.get(run.learning_rate, 1.0)
        if (run.learning_rate, run.seed) == (diverged, seeds[-1]):
            loss = None
        store.append(made_up(run) | {"loss": loss})
    assert runs.chosen_rate(store, tuning) == low
    losses = runs.tuning_losses(store, tuning)
    assert losses[lucky] == pytest.approx(1.7 / 3) and losses[diverged] is None
    assert not set(seeds) & set(protocol.SEEDS)


@pytest.mark.one_stack
def test_runs_begin_with_their_base_and_are_measured(tmp_path):
    base = Run(pretrained_by="muon", pretraining_steps=20)
    before = train(base, tmp_path)
    tuned = dataclasses.replace(
        base, optimizer="adamw", tuner="lora", steps=20, learning_rate=3e-3, seed=1
    )
    first, again = (train(tuned, tmp_path) for _ in range(2))
    assert first["loss"] == again["loss"] < before["loss"]
    # Factors begin at zero: a rate of nothing leaves the base as it was.
    still = train(dataclasses.replace(tuned, learning_rate=0.0), tmp_path)
    assert still["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_the_page_has_the_tables_of_the_committed_runs():
    store = runs.open_store(report.RESULTS)
    summary = summarize(MAIN, store)
    assert summary == json.loads((report.RESULTS / report.SUMMARY).read_text())
    page = (report.HERE / "REPORT.md").read_text()
    made = all_tables(summary)
    assert fill_in(page, made) == page
    assert page.count("<!-- table:") == len(made)
