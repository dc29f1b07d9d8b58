"""The benchmark against transformers runs at toy size, and both of its sides train the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import harness
from benchmarks.train import __main__ as train
from benchmarks.train.ours import LEARNING_RATE, WEIGHT_DECAY
from benchmarks.train.theirs import Theirs
from examples.moonlight.huggingface.pretrained import abstract_model
from examples.moonlight.model.execution.options import Execution
from muon_jax import orthogonalize
from tests.moonlight import hf_toy

pytestmark = pytest.mark.one_stack

# Entries of an update over the learning rate reach 0.7; both iterate in bfloat16; measured 0.022.
MUON_TOLERANCE = 0.06

# One layer: the programs are compiled for what they are, not for what they cost.
SMALL = dataclasses.replace(hf_toy.MOONLIGHT, num_hidden_layers=1, first_k_dense_replace=0)


def test_both_sides_agree_and_every_part_is_timed(tmp_path, capsys):
    output = tmp_path / "train.json"
    args = train.Args(
        families=("qwen2",),
        optimizers=("adamw",),
        batch_size=2,
        sequence_length=12,
        repeats=2,
        output=output,
    )
    record = train.main(args, SMALL)
    assert json.loads(output.read_text()) == record
    assert "Qwen2ForCausalLM" in capsys.readouterr().out
    result = record["families"]["qwen2"]
    losses = result["losses"]["adamw"]
    np.testing.assert_allclose(losses["ours"], losses["theirs"], rtol=1e-4)
    assert losses["ours"][-1] < losses["ours"][0]
    assert set(result["parts"]) == {"forward", "gradient", "update adamw", "step adamw"}
    for part in result["parts"].values():
        assert part["ours_s"] > 0 and len(part["ours_s_all"]) == len(part["theirs_s_all"]) == 2
    assert result["tokens_per_second"]["adamw"]["ours"] > 0


def test_torch_s_muon_gets_the_matrices_of_a_stack_of_experts():
    _, *trees = abstract_model(hf_toy.MOONLIGHT, Execution())
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jax.numpy.asarray(0.1 * rng.standard_normal(leaf.shape), jax.numpy.float32)

    params, bias = (jax.tree.map(draw, tree) for tree in trees)
    tokens = rng.integers(0, 62, (4, 13)).astype(np.int32)
    theirs = Theirs(hf_toy.MOONLIGHT, params, bias, tokens, ("muon",))
    assert set(theirs.routes) == {"attention", "experts"}
    stack = theirs.model.model.layers[1].mlp.experts.gate_up_proj
    head = theirs.model.lm_head.weight
    before = [value.detach().numpy().copy() for value in (stack, head)]
    theirs.calls["step muon"]()
    moved, head_moved = (
        (value.detach().numpy() - old) / LEARNING_RATE
        for value, old in zip((stack, head), before, strict=True)
    )
    for rows in (slice(0, 20), slice(20, 40)):  # gate, then up
        matrices = orthogonalize(jax.numpy.asarray(stack.grad[:, rows].numpy()))
        expected = -0.2 * 48**0.5 * matrices - WEIGHT_DECAY * before[0][:, rows]
        assert np.abs(moved[:, rows] - expected).max() < MUON_TOLERANCE
    # AdamW's first step moves every entry by the learning rate.
    assert np.abs(head_moved).mean() == pytest.approx(1, abs=0.05)


def test_sides_that_differ_are_noticed():
    class Side:
        def __init__(self, loss: float):
            self.calls = {"step muon": lambda: loss}

        def reset(self) -> None: ...

    with pytest.raises(RuntimeError, match=r"step 1 with muon: our loss is 2\.0.*theirs 2\.1"):
        train.check_losses(Side(2.0), Side(2.1), "muon")


def test_threads_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"--threads must be between 1 and .*, got 100000"):
        harness.limit_threads(100_000)
