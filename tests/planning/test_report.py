"""``python -m muon_jax report``: routing, plan, bytes and FLOPs of models that are not loaded."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.moonlight.huggingface import names as hf_names
from examples.moonlight.model.config import MoonlightConfig
from muon_jax import RoutingRow, ShardingRow
from muon_jax._common.alike import groups_of_alike, one_name
from muon_jax._planning.command import main
from tests.planning.models_on_disk import write_header, write_model

ROOT = Path(__file__).parents[2]
TINY = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.self_attn.q_proj.weight": (32, 16),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (32, 16),
    "model.layers.1.input_layernorm.weight": (16,),
    "lm_head.weight": (64, 16),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", TINY)


@pytest.fixture
def report(capsys):
    """Runs the command, and returns its JSON."""

    def run(path: Path, *words: str) -> dict:
        assert main(["report", str(path), "--json", *words]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys):
    """Runs the command, and returns the words that it ends with."""

    def run(path: Path, *words: str) -> str:
        assert main(["report", str(path), *words]) == 1
        printed = capsys.readouterr()
        assert not printed.out and "Traceback" not in printed.err
        return printed.err.removeprefix("error: ")

    return run


def row_of(found: dict, path: str) -> dict:
    [row] = [row for row in found["routing"] if row["path"] == path]
    return row


def leaf_of(found: dict, path: str) -> dict:
    [leaf] = [leaf for leaf in found["sharding"]["leaves"] if leaf["path"] == path]
    return leaf


@pytest.mark.one_stack
def test_moonlight_on_256_devices(tmp_path):
    """The published model's counts, from headers with nothing behind them, as a user asks."""
    config = MoonlightConfig.preset("moonlight-16b-a3b")
    shapes = {row.name: row.shape for row in hf_names.rows(config)}
    model = write_model(tmp_path / "Moonlight-16B-A3B", shapes, 3, "deepseek_v3")
    # By itself: the tests' checks of every annotation take ten times as long as the report.
    command = [sys.executable, "-m", "muon_jax", "report", model, "--mesh", "data=64,fsdp=4"]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    printed = ended.stdout.splitlines()
    assert (
        "15,960,108,544 parameters in 5,291 of 5,317 tensors, trained in float32, on" in printed[1]
    )
    assert any(line.startswith("muon: 5,207 matrices") and "(95.8%)" in line for line in printed)
    # Tensors are [out, in] on disk: queries map 2048 to 3072.
    assert "    2048x3072     27 x model.layers.{0..26}.self_attn.q_proj.weight" in printed
    page = (ROOT / "docs/planning.md").read_text()
    assert ended.stdout in page


def test_bytes_are_those_of_compiled_programs(tmp_path, report):
    """What `benchmarks.wire` counted in the step of four layers, compiled for eight TPU chips."""
    wire = json.loads((ROOT / "docs/results/wire.json").read_text())
    counted = {
        row["optimizer"]: row["bytes"]
        for row in wire["rows"]
        if row["case"] == "separate" and row["target"] == "v5e-8"
    }
    width = 768
    layer = {f"{name}_proj.weight": (width, width) for name in "qkvo"}
    layer |= {"up.weight": (4 * width, width), "down.weight": (width, 4 * width)}
    shapes = {f"{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    found = report(write_model(tmp_path / "four", shapes), "--mesh", "data=8")
    sent, muon = found["sent"], counted["muon_jax"]
    assert sent["to_owners"] == muon["exchange"]
    assert sent["muon_updates"] == muon["gather"]
    # There XLA's reduce-scatter counts as much as AdamW's gather: float32, seven eighths of it.
    assert sent["gradients"] == counted["adamw"]["gather"]
    assert sent["adamw"] == sent["gradients"] + counted["adamw"]["gather"]
    assert sent["total"] == sent["gradients"] + muon["exchange"] + muon["gather"]
    assert found["held"]["adamw_state"] == 2 * found["held"]["muon_state"]


def test_a_gradient_that_no_device_can_cut_is_summed_on_all(tmp_path, report):
    sent = report(write_model(tmp_path / "gain", {"norm.weight": (3,)}), "--mesh", "data=4")["sent"]
    assert sent["gradients"] == sent["total"] == 2 * (4 * 3) * 3 // 4  # an all-reduce on a ring


def test_an_axis_called_fsdp_shards_matrices(tiny, report):
    found = report(tiny, "--mesh", "data=2,fsdp=4", "--param-spec", "lm_head=-,fsdp")
    queries = leaf_of(found, "model.layers.0.self_attn.q_proj.weight")
    assert queries["param"] == ["fsdp"] and queries["replicas"] == 1
    assert leaf_of(found, "lm_head.weight")["param"] == [None, "fsdp"]
    assert leaf_of(found, "model.layers.0.input_layernorm.weight")["param"] == []
    # Matrices lie in quarters, the two norms whole.
    matrices, vectors = 2 * 64 * 16 + 2 * 32 * 16, 2 * 16
    assert found["held"]["parameters"] == 4 * (matrices // 4 + vectors)


def test_a_users_word_comes_first(tiny, report):
    q = "model.layers.0.self_attn.q_proj.weight"
    found = report(tiny, "--adam", r"layers\.1.*q_proj", "--muon", "q_proj", "--frozen", "norm")
    assert [row_of(found, q)[name] for name in ("optimizer", "reason")] == ["muon", "declared"]
    assert row_of(found, q)["matrices"] == [[1, 16, 32]]
    assert row_of(found, q.replace("0", "1"))["optimizer"] == "adam"
    assert {*found["left_out"].values()} == {"frozen", "a buffer, which no gradient reaches"}
    other_way = report(tiny, "--muon", "q_proj=0>1")
    assert row_of(other_way, q)["matrices"] == [[1, 32, 16]]


def test_dtypes_are_those_of_training(tiny, report):
    wide, narrow = report(tiny), report(tiny, "--dtype", "bfloat16")
    assert wide["held"]["parameters"] == 2 * narrow["held"]["parameters"]
    momentum = report(tiny, "--mu-dtype", "bfloat16")["held"]["muon_state"]
    assert wide["held"]["muon_state"] == 2 * momentum


def test_conv1d_of_gpt2_is_in_out(tmp_path, report):
    gpt2 = write_model(tmp_path / "gpt2", {"h.0.mlp.c_fc.weight": (16, 64)}, model_type="gpt2")
    assert report(gpt2)["routing"][0]["matrices"] == [[1, 16, 64]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Two steps of a run, in items; below its "state" the parameters and something else."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    params = {"layers": {"up": {"kernel": np.ones((2, 8, 16), np.float32)}}}
    for step in (9, 10):
        tree = {"params": params, "step": np.int32(step), "mu": params} if step == 10 else params
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / str(step) / "state", tree)
    return folder


def test_an_orbax_checkpoint(checkpoints, report):
    found = report(checkpoints)  # of the last step, what is called params
    assert found["kind"].endswith("checkpoints/10/state, its 'params'")
    assert row_of(found, "layers/up/kernel")["matrices"] == [[2, 8, 16]]
    for subtree in ("mu", "params"):
        assert report(checkpoints, "--subtree", subtree)["parameters"] == 2 * 8 * 16
    assert report(checkpoints / "9")["parameters"] == 2 * 8 * 16


def test_orbax_is_optional(checkpoints, tiny, report, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    report(tiny)
    assert "pip install orbax-checkpoint" in refused(checkpoints)


def test_text(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["muon_jax", "report", str(tiny), "--mesh", "data=4"])
    # runpy warns where another test has imported every module.
    monkeypatch.delitem(sys.modules, "muon_jax.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("muon_jax", run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for line in (
        "3,104 parameters in 6 of 7 tensors, trained in float32, on a mesh data=4",
        "  left out: model.layers.0.self_attn.rotary_emb.inv_freq, a buffer, which no gradient",
        "  16x32  2 x model.layers.{0..1}.self_attn.q_proj.weight",
        "muon: 2 matrices, 1,024 parameters (33.0%); adam: 2,080 parameters",
        "per device and step, on 4 devices:",
    ):
        assert line in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mesh", "8"], "--mesh 8: cannot read '8': write each axis with its length"),
        (["--mesh", "data=2,data=4"], "the axis data comes twice"),
        (["--mesh", "data=0"], "cannot read 'data=0'"),
        (["--adam", "("], "--adam (: '(' is no regular expression"),
        (["--adam", "nothing"], "'nothing' finds no path"),
        (["--muon", "q_proj=0>x"], "write the fan-in axes, '>' and the fan-out axes"),
        (["--muon", "norm"], "fewer than two axes"),
        (["--param-spec", "q_proj"], "write a pattern and, for each dimension, a mesh axis"),
        (["--param-spec", "nothing=-"], "no parameter that earlier patterns left"),
        (["--param-spec", "q_proj=model"], "the mesh has no axis 'model'"),
        (["--zero1-axes", "model"], "which the mesh lacks"),
        (["--frozen", "."], "holds no parameters that are trained"),
        (["--subtree", "params"], "--subtree is for Orbax checkpoints"),
    ],
)
def test_a_wrong_word_is_refused_in_words(tiny, refused, words, expected):
    assert expected in refused(tiny, *words)


def test_what_cannot_be_known_is_asked_for(tmp_path, refused):
    model = write_model(tmp_path / "conv", {"patches.weight": (32, 3, 14, 14)})
    assert "--muon 'REGEX=IN>OUT'" in refused(model)


def test_folders_that_are_no_models(tmp_path, tiny, refused, checkpoints):
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither a Hugging Face directory" in refused(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "are pickles" in refused(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("[1]")
    assert "no JSON object" in refused(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"quantization_config": {"bits": 4}}')
    assert "before quantization" in refused(tmp_path / "empty")
    write_header(tiny / "again.safetensors", TINY)
    assert "lies in again.safetensors and in model.safetensors" in refused(tiny)
    write_header(tiny / "again.safetensors", {"scales": (2,)}, "F8_E4M3")
    assert "F8_E4M3" in refused(tiny)
    (tiny / "again.safetensors").write_bytes(b"\xff" * 100)
    assert "fetch it again" in refused(tiny)
    (tiny / "again.safetensors").write_bytes((50).to_bytes(8, "little") + b"{")
    assert "ends within its header" in refused(tiny)
    (tiny / "again.safetensors").write_bytes((9).to_bytes(8, "little") + b'{"a": []}')
    assert "says of 'a': []" in refused(tiny)
    sharded = write_model(tmp_path / "sharded", TINY, 2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "lists model-00002-of-00002.safetensors, which is not in" in refused(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refused(sharded)
    write_header(sharded / "other.safetensors.index.json", {})
    assert "holds several models" in refused(sharded)
    assert "has no 'nothing' there; it has mu, params, step" in refused(
        checkpoints, "--subtree", "nothing"
    )
    (checkpoints.parent / "model").mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoints.parent / "a", {"w": 1.0})
    assert "holds several trees (a, checkpoints)" in refused(checkpoints.parent)


def test_names_that_differ_in_numbers_are_one():
    names = [f"layers.{i}.mlp.experts.{j}.w1" for i in (3, 4, 5) for j in (0, 2)]
    assert one_name(names) == "layers.{3..5}.mlp.experts.{0,2}.w1"
    assert one_name(names[1:]) == "layers.*.mlp.experts.*.w1"
    assert one_name(["Dense_0/kernel", "Dense_1/kernel"]) == "Dense_{0..1}/kernel"
    groups = groups_of_alike([("a/0/w1", 1), ("a/0/w3", 1), ("a/1/w1", 1), ("a/2/w1", 2)])
    assert groups == [(["a/0/w1", "a/1/w1"], 1), (["a/0/w3"], 1), (["a/2/w1"], 2)]


def test_json_has_every_field_of_its_values(tiny, report):
    found = report(tiny, "--mesh", "data=2")
    for value, kind in (
        (found["routing"][0], RoutingRow),
        (found["sharding"]["rows"][0], ShardingRow),
    ):
        assert value.keys() == {field.name for field in dataclasses.fields(kind)}
