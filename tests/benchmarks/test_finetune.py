"""The benchmark of fine-tuning, at toy size: both sides train the same model."""

import json

import pytest

pytest.importorskip("peft")

from benchmarks import finetune

pytestmark = pytest.mark.one_stack

TOY = {"layers": 1, "hidden_size": 64, "vocab_size": 96, "batch_size": 2, "sequence_length": 8}


def test_both_sides_train_the_same_model(tmp_path, monkeypatch):
    # Two processes that compile are not worth their seconds here.
    monkeypatch.setattr(finetune, "peak_megabytes", lambda args, side: 1.0)
    path = tmp_path / "finetune.json"
    record = finetune.main(finetune.Args(repeats=1, output=path, **TOY))
    assert json.loads(path.read_text())["losses"] == record["losses"]
    for losses in record["losses"].values():
        assert losses["ours"] == pytest.approx(losses["theirs"], rel=2e-3)
        assert losses["ours"][2] < losses["ours"][0]
    assert record["speedup"].keys() == {"muon", "adamw"}


def test_sides_that_differ_are_refused():
    with pytest.raises(RuntimeError, match=r"step 1 with muon: our loss is 1.000000, theirs 2"):
        finetune.check_losses(lambda: 1.0, lambda: 2.0, "muon")
