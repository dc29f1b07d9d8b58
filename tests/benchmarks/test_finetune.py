"""The benchmark against peft runs at toy size, and both of its sides train the same factors."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.finetune import __main__ as finetune
from benchmarks.finetune.work import Side, Work, draw

pytestmark = pytest.mark.one_stack

WORK = Work(
    model="nowhere",
    adapter="nowhere/adapter",
    vocab_size=50,
    optimizer="muon",
    rank=2,
    alpha=4.0,
    batch_size=3,
    accumulation=2,
    length=8,
)


class Told:
    """A side that trains one parameter, and says what it is told to say."""

    def __init__(self, *losses: float, trained: int = 1):
        self.told, self.losses = {"trained": trained}, list(losses)

    def take(self, steps: int):
        return {"losses": self.losses}


def test_both_sides_agree_and_are_timed(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is part of the benchmarks extra")
    output = tmp_path / "finetune.json"
    args = finetune.Args(
        optimizers=("muon",),
        hidden_size=16,
        layers=1,
        heads=2,
        intermediate_size=24,
        vocab_size=50,
        rank=2,
        batch_size=2,
        length=8,
        blocks=2,
        steps=1,
        output=output,
    )
    record = finetune.main(args)
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    assert "Qwen2ForCausalLM" in capsys.readouterr().out
    result = record["optimizers"]["muon"]
    ours, theirs = result["ours"], result["theirs"]
    assert theirs["optimizer"] == "Muon"
    # Seven matrices: q and o 16 x 16, k and v 16 x 8, three of 16 x 24.
    assert ours["trained"] == theirs["trained"] == 2 * (2 * 32 + 2 * 24 + 3 * 40)
    assert ours["losses"][-1] < ours["losses"][0] - 1e-4
    for side in (ours, theirs):
        assert len(side["step_s_all"]) == 2 and side["tokens_per_second"] > 0
        assert 1e7 < side["libraries_bytes"] < side["peak_bytes"]


def test_rows_count_their_answers():
    tokens_abt, targets_abt, weight_abt = draw(WORK)
    assert tokens_abt.shape == targets_abt.shape == weight_abt.shape == (2, 3, 8)
    np.testing.assert_array_equal(tokens_abt[..., 1:], targets_abt[..., :-1])
    np.testing.assert_array_equal(weight_abt[..., :4], 0)
    np.testing.assert_array_equal(weight_abt[..., 4:], 1)
    for a, b in zip(draw(WORK), (tokens_abt, targets_abt, weight_abt), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sides_that_differ_are_noticed():
    with pytest.raises(RuntimeError, match=r"step 1 with adamw: our loss is 2\.0.*theirs 2\.1"):
        finetune.check_losses(Told(2.0), Told(2.1), "adamw")
    with pytest.raises(RuntimeError, match=r"step 2 with adamw: our loss is nan"):
        finetune.check_losses(Told(2.0, float("nan")), Told(2.0, 1.9), "adamw")
    with pytest.raises(RuntimeError, match=r"we train 1 parameters, they 2"):
        finetune.check_losses(Told(), Told(trained=2), "muon")


def test_a_side_that_ends_is_noticed():
    with pytest.raises(RuntimeError, match=r"json\.tool ended with code [12]"):
        Side("json.tool", WORK)


def test_the_peak_is_this_process_s_own():
    code = "from benchmarks.finetune.work import memory as m; print(m('VmRSS'), m('VmHWM'))"
    held = np.ones(2**24)  # 128 MB, which `ru_maxrss` would pass on to the child
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, peak = map(int, done.stdout.split())
    assert 1e6 < now <= peak < held.nbytes
