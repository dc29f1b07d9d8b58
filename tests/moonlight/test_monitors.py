"""The stability monitors against NumPy, and MuonClip in the training step of a toy model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx

from examples.moonlight.model.dense import Dense
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.run_folder import metrics
from examples.moonlight.train import train
from examples.moonlight.training import monitors
from examples.moonlight.training.attention import attention_heads
from examples.moonlight.training.muonclip import logits_by_module
from examples.moonlight.training.results import STABILITY
from examples.moonlight.training.stability_plot import draw_stability
from examples.moonlight.training.steps import TrainState, make_train_steps
from muon_jax import GroupedQuery, muon, qk_clip, routing_report
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

RATE = 1e-6  # so small that the logits of a step are those of the weights before it
NEVER = 1e30


class Run:
    """Three steps on the same two micro-batches, of a model with inflated queries.

    QK-Clip's threshold is part of the state, so that one program serves all.
    """

    def __init__(self):
        clip = optax.inject_hyperparams(qk_clip)(attention_heads(toy.CONFIG), NEVER)
        self.optimizers = {"muon": muon(RATE), "muonclip": optax.chain(muon(RATE), clip)}
        model = Moonlight(toy.CONFIG, rngs=nnx.Rngs(0), execution=Execution(monitor=True))
        for layer in (*model.first_layers, model.layers):
            layer.self_attn.q_proj.kernel[...] *= 3e4
        self.graphdef, self.params, self.bias = nnx.split(model, nnx.Param, RouterBias)
        tokens_abt = np.random.default_rng(0).integers(0, 300, (2, 2, 17)).astype(np.int32)
        self.tokens_sabt = np.stack([tokens_abt] * 3)
        self.programs = {}

    def __call__(self, name: str, threshold: float = NEVER, count: int = 3):
        optimizer = self.optimizers[name]
        if name not in self.programs:
            schedule = optax.constant_schedule(RATE)
            self.programs[name] = jax.jit(
                make_train_steps(
                    self.graphdef, optimizer, schedule, bias_rate=0.0, monitor=name == "muonclip"
                )
            )
        state = TrainState(self.params, self.bias, optimizer.init(self.params))
        if name == "muonclip":
            state.opt_state[1].hyperparams["threshold"] = jnp.float32(threshold)
        return self.programs[name](state, self.tokens_sabt, 0, count)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def test_muonclip_brings_every_head_to_the_threshold(run):
    """Three heads of four lie above it; a step later they have it, and the fourth its own."""
    *_, first = run("muonclip", count=1)
    before_lh = np.asarray(first.stats.max_logit_lh)
    threshold = float(np.sort(before_lh.ravel())[:2].mean())
    assert np.sum(before_lh > threshold) == 3
    for count in (2, 3):
        *_, watched = run("muonclip", threshold, count)
        expected_lh = np.minimum(before_lh, threshold)
        np.testing.assert_allclose(watched.stats.max_logit_lh, expected_lh, rtol=1e-2)
    *_, unclipped = run("muonclip", count=2)
    np.testing.assert_allclose(unclipped.stats.max_logit_lh, before_lh, rtol=1e-2)


@pytest.mark.bits
def test_below_the_threshold_muonclip_is_muon(run):
    plain, plain_metrics, watched = run("muon")
    clip, clip_metrics, _ = run("muonclip")
    assert watched is None
    np.testing.assert_array_equal(clip_metrics.loss, plain_metrics.loss)
    for ours, theirs in zip(*map(jax.tree.leaves, (clip.params, plain.params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def of_layers(tree: nnx.State, *names: str) -> list[np.ndarray]:
    """A parameter of the two toy layers, as NumPy; None where a layer has it not."""

    def find(node, path):
        for name in path:
            if name not in node:
                return None
            node = node[name]
        return np.asarray(node[...], np.float64)

    stacked = find(tree["layers"], names)
    alone = find(tree["first_layers"][0], names)
    return [alone, None if stacked is None else stacked[0]]


def entropy(matrix: np.ndarray) -> float:
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    share = energy / energy.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(share)))


@pytest.fixture(scope="module")
def record(run) -> monitors.Record:
    state, measured, watched = run("muonclip", 50.0, count=2)
    svd = monitors.svd_entropies(state.params)
    record = monitors.make_record(watched, svd, float(measured.grad_norm[1]))
    return json.loads(json.dumps({"kind": metrics.MONITOR, "step": 2, **record}))


def test_a_record_is_of_the_last_step(run, record):
    before, first, _ = run("muonclip", 50.0, count=1)
    after, measured, watched = run("muonclip", 50.0, count=2)
    assert record["grad_norm"] == float(measured.grad_norm[1]) != float(first.grad_norm[0])
    assert np.max(record["max_logit"]) == float(measured.max_attention_logit[1])
    assert np.shape(record["max_logit"]) == np.shape(record["hot_share"]) == (2, 2)
    assert np.max(record["max_violation"]) == float(measured.max_violation[1])
    assert np.sum(record["load"]) == 2 * 2 * 16 * toy.CONFIG.num_experts_per_tok
    np.testing.assert_allclose(record["mlp_rms"], watched.stats.mlp_rms_l)
    assert "dropped_share" not in record

    for kind in ("self_attn/q_proj", "mlp/router", "mlp/down_proj", "mlp/shared_experts/up_proj"):
        names = (*kind.split("/"), "kernel")
        new, old = of_layers(after.params, *names), of_layers(before.params, *names)
        for layer in range(2):
            weight, update = record["weight_rms"][kind][layer], record["update_rms"][kind][layer]
            if new[layer] is None:
                assert weight is None and update is None
                continue
            np.testing.assert_allclose(weight, np.sqrt(np.mean(new[layer] ** 2)), rtol=1e-5)
            # The weights are of size 0.02, and float32 knows their change of 1e-7 to few digits.
            moved = np.sqrt(np.mean((new[layer] - old[layer]) ** 2)) / RATE
            np.testing.assert_allclose(update, moved, rtol=0.05)
    assert isinstance(record["weight_rms"]["embed"], float)


def test_svd_entropy_of_the_papers_groups(run, record):
    state, *_ = run("muonclip", 50.0, count=2)
    groups = {
        "AttnQO": [("self_attn", name, "kernel") for name in ("q_proj", "o_proj")],
        "AttnKV": [("self_attn", name, "kernel") for name in ("kv_a_proj", "kv_b_proj")],
        "Experts": [("mlp", "experts", f"{name}_proj") for name in ("gate", "up", "down")],
        "Router": [("mlp", "router", "kernel")],
        "Dense": [("mlp", f"{name}_proj", "kernel") for name in ("gate", "up", "down")],
        "SharedExperts": [
            ("mlp", "shared_experts", f"{name}_proj", "kernel") for name in ("gate", "up", "down")
        ],
    }
    assert record["svd_entropy"].keys() == groups.keys()
    for group, members in groups.items():
        found = [leaf for names in members for leaf in of_layers(state.params, *names)]
        values = [
            entropy(matrix)
            for leaf in found
            if leaf is not None
            for matrix in leaf.reshape(-1, *leaf.shape[-2:])
        ]
        np.testing.assert_allclose(record["svd_entropy"][group], np.mean(values), rtol=1e-4)


def test_every_matrix_of_muon_is_in_one_group(run):
    for row in routing_report(run.params).rows:
        kind = row.path.removeprefix("first_layers/0/").removeprefix("layers/")
        kind = kind.removesuffix("/kernel")
        assert (monitors.group_of(kind) is not None) == (row.optimizer == "muon"), row.path
    assert monitors.group_of("self_attn/k_proj") == "AttnKV"


def test_the_record_for_tensorboard_is_scalars(record):
    scalars = monitors.board_scalars(record)
    assert all(type(value) is float and np.isfinite(value) for value in scalars.values())
    assert scalars["max_logit/layer_01"] == max(record["max_logit"][1])
    assert "max_violation/layer_01" in scalars and "max_violation/layer_00" not in scalars
    kv = record["weight_rms"]["self_attn/kv_b_proj"]
    np.testing.assert_allclose(
        scalars["weight_rms/self_attn.kv_b_proj"], np.sqrt(np.mean(np.square(kv)))
    )


def test_records_are_drawn(record, tmp_path: Path):
    draw_stability(tmp_path / "all.png", [record, record | {"step": 4}], title="toy")
    of_dense_model = {k: v for k, v in record.items() if k not in ("load", "max_violation")}
    draw_stability(tmp_path / "dense.png", [of_dense_model], title="toy")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "dense.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no monitor record to draw: train with --monitor-every"):
        draw_stability(tmp_path / "none.png", [], title="toy")


def test_a_lone_record_fills_its_panels(record, tmp_path: Path, monkeypatch):
    """Over steps it would be a dot in each of nine panels."""
    monkeypatch.setattr(plt, "close", lambda _: None)
    draw_stability(tmp_path / "one.png", [record], title="toy", threshold=5.0)
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    layers = len(record["max_logit"])
    by_layer, by_group = figure.axes[:3], figure.axes[3:6]
    for axes in by_layer:
        drawn = [line for line in axes.lines if line.get_marker() in ("o", "s")]
        assert drawn and all(len(line.get_xdata()) == layers for line in drawn)
        low, high = axes.get_ylim()
        assert all(low <= y <= high for line in drawn for y in line.get_ydata())
    assert [len(axes.patches) for axes in by_group] == [6, 8, 8]
    assert len(figure.axes) == 8  # the loads, and their scale


def test_records_behind_the_checkpoint_are_cut_off(record, tmp_path: Path):
    log = metrics.MetricsLog(tmp_path, after_step=0)
    for step in (1, 2, 3, 4):
        log.write(metrics.TRAIN, step, {"loss": 1.0})
        if step % 2 == 0:
            values = {k: v for k, v in record.items() if k not in ("kind", "step")}
            log.write(metrics.MONITOR, step, values, monitors.board_scalars(record))
    log.close()
    metrics.MetricsLog(tmp_path, after_step=3).close()
    path = tmp_path / metrics.FILE
    assert metrics.read_metrics(path, metrics.MONITOR) == [record]
    assert [r["step"] for r in metrics.read_metrics(path, metrics.TRAIN)] == [1, 2, 3]


def test_a_dense_model_has_grouped_queries():
    heads = attention_heads(toy.DENSE)
    assert heads == GroupedQuery(heads=4, kv_heads=2, head_dim=4)
    params = nnx.state(nnx.eval_shape(lambda: Dense(toy.DENSE, rngs=nnx.Rngs(0))), nnx.Param)
    qk_clip(heads).init(params)
    largest = logits_by_module(params, jnp.ones((2, 4)))
    assert {name: x.shape for name, x in largest.items()} == {"layers/self_attn": (2, 4)}


def test_a_run_of_muonclip_with_monitors(tmp_path: Path):
    """Records where they are asked for, among the other lines, and a picture at the end."""
    args = toy.arguments(
        tmp_path, optimizer="muonclip", qk_clip_threshold=0.01, monitor_every=2, steps=4
    )
    results = train(args, toy.CONFIG)
    assert results["settings"]["optimizer"] == "muonclip"
    records = metrics.read_metrics(args.output_dir / metrics.FILE, metrics.MONITOR)
    steps = metrics.read_metrics(args.output_dir / metrics.FILE, metrics.TRAIN)
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        step = steps[record["step"] - 1]
        assert record["grad_norm"] == step["grad_norm"]
        assert np.max(record["max_logit"]) == step["max_attention_logit"]
    # Clipped by then, and moved on by at most what a step does to logits of the threshold's size.
    assert steps[-1]["max_attention_logit"] < steps[0]["max_attention_logit"]
    assert (args.output_dir / STABILITY).stat().st_size > 10_000
