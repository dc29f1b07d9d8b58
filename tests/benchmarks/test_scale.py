"""A whole training step compiled for eight CPU devices at toy size, and the command around it."""

import dataclasses
import json

import pytest
from rich.console import Console

from benchmarks import hlo
from benchmarks.scale import __main__ as scale
from benchmarks.scale import counts, steps
from benchmarks.scale.cases import SCALES
from benchmarks.scale.job import Job
from benchmarks.scale.kept import Kept
from benchmarks.scale.spent import PARTS
from examples.moonlight.model import config as moonlight_config
from examples.moonlight.model.execution import grouped, trips

pytestmark = pytest.mark.one_stack

TOY = dataclasses.replace(
    moonlight_config.PRESETS["tiny"],
    vocab_size=256,
    hidden_size=32,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    first_k_dense_replace=0,
)
JOB = Job("cpu-8", "toy", layers=2, context=16, batch=16)
STACKED, MICRO = 2, 2


@pytest.fixture(scope="module", name="texts")
def _texts(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module", name="row")
def _row(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moonlight_config.PRESETS, "toy", TOY)
        patch.setattr(grouped, "TILE", 8)  # a tile of 512 rows is more than the toy has
        return steps.row(JOB, texts)


def test_a_device_holds_its_shards_and_no_more(row):
    """Parameters over fsdp and experts, momentum over all devices; no copy for the results."""
    sizes, whole = row["bytes"], 4 * row["expected"]["parameters"]
    assert whole / 8 < sizes["arguments"] < whole
    assert sizes["outputs"] < 1000  # what is measured: the state is updated where it lies
    assert row["fits"] and row["memory"] == SCALES["cpu-8"].memory


def test_flops_are_those_of_the_formula_and_what_is_computed_twice(row):
    model, formula = row["flops"]["model"], row["expected"]["model"]
    # Run densely, a device's four experts would multiply all rows, and make it 2.6.
    assert 1 < model / formula < 2.2
    assert row["flops"]["newton_schulz"] >= row["expected"]["newton_schulz"] > 0


def test_only_the_rounds_of_the_dispatch_have_no_length(row):
    assert row["assumed_once"]
    # JAX 0.12 puts a level into the scope for the call.
    assert all(
        loop.replace("/eval_jaxpr", "").endswith("shard_map/while") for loop in row["assumed_once"]
    )


def test_tokens_travel_to_their_experts_and_back(row):
    """There and back, and for gradients: tokens again, gradients of outputs, those of tokens."""
    local = TOY.n_routed_experts // 2
    room = trips.room(JOB.context, TOY.num_experts_per_tok, 2, local)
    elements = 2 * room.slots * TOY.hidden_size
    times = sum(
        one["times"]
        for one in row["listed"]
        if one["phase"] == "dispatch" and one["elements"] == elements
    )
    assert times == 5 * STACKED * MICRO
    # Integers beside them, for each pair its expert and its weight, and gradients of weights.
    assert 1 < row["wire"]["dispatch"] / (times * elements * 4 / 2) < 1.1


def test_nothing_gathers_or_sums_the_embedding(row):
    table = TOY.vocab_size * TOY.hidden_size
    whole = [one for one in row["listed"] if one["elements"] == table]
    # The head's part, which its block of logits needs: gathered once, its gradient summed.
    gathers = [one for one in whole if one["phase"].startswith("weights")]
    assert sum(one["times"] for one in gathers) <= MICRO
    assert {one["opcode"] for one in whole} <= {"all-gather", "reduce-scatter"}
    assert 0 < row["wire"]["embedding"] < row["wire"]["dispatch"]


def test_a_kept_program_is_read_again(row, texts):
    text, sizes = Kept.of(JOB, texts).read()
    assert sizes == row["bytes"]
    assert counts.count(text).items() <= row.items()


def test_phases():
    def phase(opcode, scope, size=1e6):
        return counts.phase_of(hlo.Collective(opcode, "f32", 0, size, 8, 1, scope))

    assert phase("all-to-all", "a/muon.return/all_to_all") == "muon exchange"
    assert phase("all-gather", "a/muon.split/x", 8) == "muon exchange"
    assert phase("all-gather", "a/muon.gather/x") == "muon gather"
    assert phase("all-gather", "a/adamw.gather/x") == "adamw gather"
    assert phase("all-to-all", "jvp()/shard_map/while/body/all_to_all") == "dispatch"
    assert phase("all-to-all", "while/body/closed_call/jvp()/shard_map/all_to_all") == "embedding"
    assert phase("all-gather", "jvp()/x") == "weights forward"
    assert phase("all-gather", "transpose(jvp())/rematted_computation/x") == "weights backward"
    assert phase("all-reduce", "transpose(jvp())/x") == "gradients"
    assert phase("all-reduce", "reduce_max", 8) == phase("collective-permute", "x") == "other"


# --- the command


def test_the_command_keeps_rows_and_names_what_failed(row, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "scale.json"
    too_large = {key: row[key] for key in ("preset", "context", "batch", "mesh", "memory")}
    said = "Used 20.1G of 15.7G hbm"
    too_large |= {"target": "v5e-8", "layers": 27, "fits": False, "compiler": said}

    def measure(name, args):
        if name == "v5e-64":
            raise scale.WorkerError("v5e-64: exit status 1\nKeyError")
        return too_large if name == "v5e-8" else row | {"target": name}

    monkeypatch.setattr(scale, "measure", measure)
    monkeypatch.setattr(scale.targets, "missing", lambda target: None)
    names = ("cpu-8", "v5e-8", "v5e-64")
    record = scale.main(scale.Args(targets=names, output=output))
    printed = capsys.readouterr().out
    loops = [f"counted as 1: {'/'.join(x.split('/')[-3:])}" for x in row["assumed_once"]]
    for text in (said, "fits", "KeyError", "compiled by libtpu", "compiled by jaxlib", *loops):
        assert text in printed
    assert list(record["left_out"]) == ["v5e-64"]
    scale.main(scale.Args(targets=("cpu-8", "h100-8"), output=output))
    kept = [one["target"] for one in json.loads(output.read_text())["rows"]]
    assert kept == ["v5e-8", "cpu-8", "h100-8"]


def test_the_parts_of_a_tpus_step_are_shown_in_80_columns(capsys):
    spent = {part: {"computed": 0.01, "waited": 0.005, "hidden": 0.001} for part in PARTS}
    spent["model"] = {"computed": 100.0, "waited": 50.0, "hidden": 3.0}
    row = {"target": "v5e-64", "seconds": spent, "flops": {"model": 197e12}}
    scale.show_seconds(Console(width=80), row)
    printed = capsys.readouterr().out
    others = len(PARTS) - 1
    assert f"{0.015 * others / (150 + 0.015 * others):.3%}" in printed
    assert "would take 1.0 s" in printed and f"{1 - 1 / (1 + 0.015 * others):.2%}" in printed
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80


def test_a_worker_that_fails_says_why():
    args = scale.Args(batch=12)
    with pytest.raises(scale.WorkerError, match=r"(?s)cpu-8: exit status 1.*--batch 12: the 8 dev"):
        scale.measure("cpu-8", args)


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="unknown: nowhere; known: cpu-8"):
        scale.main(scale.Args(targets=("nowhere",)))


def test_what_a_compiler_says_of_a_program_that_is_too_large():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 38.46G of 15.75G hbm. Exceeded hbm capacity by 22.71G.\n\nTotal hbm usage >= ..."
    )
    said = "Used 38.46G of 15.75G hbm. Exceeded hbm capacity by 22.71G"
    assert steps.out_of_memory(message) == said
    said = "the total memory required for HLO temporaries (15.77G) exceeds available HBM (15.75G)"
    message = f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {said}."
    assert steps.out_of_memory(message) == said
    assert steps.out_of_memory("INTERNAL: something else") is None


def test_the_share_of_newton_schulz_at_the_papers_batch():
    row = {
        "flops": {"model": 1000.0, "newton_schulz": 20.0},
        "expected": {"newton_schulz": 10.0},
        "batch": 2048,
        "context": 8192,
    }
    found = scale.shares(row)
    assert found == {"busiest": 20 / 1020, "even": 10 / 1010, "paper": 10 / 2010}
