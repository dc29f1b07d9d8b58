"""The accelerator's run at toy size: it goes on where it stopped, and survives what fails."""

import dataclasses
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from benchmarks import step
from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import correctness, work
from benchmarks.accelerator.tables import summary
from benchmarks.device_clock import WALL
from benchmarks.orthogonalize import sides
from benchmarks.train import theirs
from examples.moonlight.model.config import MoonlightConfig
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

SMALL = dataclasses.replace(hf_toy.MOONLIGHT, num_hidden_layers=2, first_k_dense_replace=1)
TOY = work.Sizes(
    models=("moonlight-tiny",),
    cases=("a", "e"),
    scale=16,
    repeats=1,
    passes=2,
    batch=2,
    length=12,
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    for module in (step, sides, theirs):
        monkeypatch.setattr(module, "available_cores", lambda: 1)
    monkeypatch.setattr(correctness, "AWKWARD", ((1, 7), (20, 33)))
    monkeypatch.setattr(MoonlightConfig, "preset", classmethod(preset))


def preset(cls, name, real=MoonlightConfig.preset):
    return SMALL if name == "small" else real(name)


def test_a_run_stops_goes_on_and_reports(tmp_path, capsys, monkeypatch):
    args = accelerator.Args(output_dir=tmp_path, sizes=TOY)
    begun = accelerator.main(dataclasses.replace(args, minutes=0))
    assert not begun["correctness"] and begun["left"][0] == "correctness/1x7"
    assert "rows are left" in capsys.readouterr().out

    def fails(*args):
        raise MemoryError("an expert too many")

    with monkeypatch.context() as patched:
        patched.setattr(step, "measure", fails)
        failing = accelerator.main(args)
    assert failing["failed"] == dict.fromkeys(
        ("step/a", "step/e"), "MemoryError: an expert too many"
    )
    assert not accelerator.is_well(failing)
    assert failing["training"]["optimizers"]["muon_jax"]["step_s"] > 0

    before = (tmp_path / "runs.jsonl").read_text().splitlines()
    record = accelerator.main(args)
    after = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in after[len(before) :]] == ["step/a", "step/e"]
    assert accelerator.is_well(record) and not record["left"]
    assert json.loads((tmp_path / accelerator.RECORD).read_text()) == json.loads(json.dumps(record))
    assert matplotlib.image.imread(tmp_path / accelerator.PICTURE).std() > 0.05
    assert [json.loads(line)["kind"] for line in after][:2] == ["correctness"] * 2
    for case in ("a", "e"):
        rows = record["cases"][case]["optimizers"]
        assert all(row["step_s"] > 0 for row in rows.values()) and len(rows) == 4
    trained = record["training"]["optimizers"]
    losses = [row["first_loss"] for row in trained.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)  # one model, in four programs
    assert set(trained) == set(step.PEERS) and trained["optax"]["step_s_to_optax"] == 1
    assert record["clock"] == "wall clock" and record["torch"] == "takes part"
    lines = summary(record).rows
    shapes = len(record["correctness"])
    assert shapes > 8 and (f"right: {shapes} of {shapes} shapes", *[""] * 6) in lines
    assert lines[-1][0] == "a training step of small" and lines[-1][3] != "-"
    printed = capsys.readouterr().out
    assert "A training step of small" in printed and "Limits of the device" in printed

    other = dataclasses.replace(args, sizes=dataclasses.replace(TOY, scale=8))
    with pytest.raises(ValueError, match=r"rows whose sizes is .*give --output-dir a folder"):
        accelerator.main(other)


def test_rows_that_need_the_limits_say_that_they_are_missing():
    rows = {row.kind: row for row in work.all_work(TOY, WALL, torch=False)}
    with pytest.raises(RuntimeError, match="the limits, to which this row is held"):
        rows["shape"].measure(None)


def test_a_wrong_result_is_not_right(monkeypatch):
    assert correctness.check(20, 33, ("muon_jax",))["right"]
    real = correctness.orthogonalize
    monkeypatch.setattr(correctness, "orthogonalize", lambda x, **options: -real(x, **options))
    found = correctness.check(20, 33, ("muon_jax",))
    assert not found["right"] and found["distance"]["muon_jax float32"] == pytest.approx(2)
    assert not accelerator.is_well({"failed": {}, "correctness": [found]})


def test_what_is_multiplied_in_bfloat16_sums_is_not_right(monkeypatch):
    def rounded(x, ns_dtype):
        x = jax.numpy.asarray(x, ns_dtype)
        x /= jax.numpy.linalg.norm(x, axis=(-2, -1), keepdims=True)
        wide = x if x.shape[-2] <= x.shape[-1] else x.mT
        for _ in range(5):
            gram = wide @ wide.mT
            wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
        out = wide if x.shape[-2] <= x.shape[-1] else wide.mT
        return out.astype("float32")

    monkeypatch.setattr(correctness, "orthogonalize", rounded)
    found = correctness.check(100, 130, ())
    assert not found["right"]
    assert found["distance"]["muon_jax bfloat16"] > correctness.LARGEST["bfloat16"]


def test_torch_is_left_out_where_it_does_not_see_the_device(monkeypatch):
    assert accelerator.why_no_torch() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "does not see this device" in str(accelerator.why_no_torch())
    keys = [row.key for row in work.all_work(TOY, WALL, torch=False)]
    assert len(keys) == len(set(keys)) and keys[-1] == "training/small"
