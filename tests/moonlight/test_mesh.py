"""Training on a mesh: the same losses as on one device, resumable across meshes, or refused."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import (
    BATCH_AXES,
    MESH_AXES,
    ModelSharding,
    make_mesh,
)
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import next_token_loss
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.run_folder import metrics
from examples.moonlight.train import train
from tests.moonlight import toy

CUBE, FLAT = "data=2,expert=2,tensor=2", "data=8"

# float32 sums in another order, of one batch; measured 1e-6, and 5e-7 of the largest entry.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 5e-6
# Twelve steps later; measured 4e-5 and 2e-6. Muon rounds its momentum to bfloat16.
MUON_TOLERANCE, ADAMW_TOLERANCE = 2e-4, 1e-5


# --- the mesh -------------------------------------------------------------------------------------


def test_a_mesh_has_every_axis():
    where = ModelSharding(make_mesh("tensor=4, data=2"))
    assert dict(where.mesh.shape) == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 4}
    assert str(where) == "data=2,tensor=4"
    assert str(ModelSharding()) == "one device"
    assert where.batch_shards == 2
    assert ModelSharding(make_mesh(CUBE)).batch_shards == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "model=8"}, "cannot read 'model=8'.*the axes are data, fsdp, expert, tensor"),
        ({"mesh": "data=4,data=2"}, "cannot read 'data=2'. Write the size of each axis once"),
        ({"mesh": "data=8,"}, "cannot read ''"),
        ({"mesh": "data"}, "cannot read 'data'"),
        ({"mesh": "data=-8"}, "cannot read 'data=-8'"),
        ({"mesh": "data=0"}, "cannot read 'data=0'"),
        ({"mesh": "data=4"}, "needs 4 devices, and JAX sees 8: choose sizes whose product is 8"),
        ({"mesh": "data=16"}, "XLA_FLAGS=--xla_force_host_platform_device_count=16"),
        ({"mesh": FLAT}, "data x fsdp x expert = 8 does not divide --batch-size = 2"),
        ({"mesh": FLAT, "batch_size": 8}, "the validation batch of 4 windows cannot be divided"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        train(toy.arguments(tmp_path, **changes), toy.CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mesh", "field", "value"),
    [
        ("data=2,tensor=4", "num_attention_heads", 2),
        ("expert=8", "n_routed_experts", 4),
        (CUBE, "intermediate_size", 9),
        (CUBE, "moe_intermediate_size", 9),
        ("fsdp=8", "hidden_size", 12),
    ],
)
def test_widths_that_do_not_divide_are_refused(mesh: str, field: str, value: int):
    config = dataclasses.replace(toy.CONFIG, **{field: value})
    with pytest.raises(ValueError, match=f"= . does not divide {field} = {value}; change one"):
        abstract_params(config, ModelSharding(make_mesh(mesh)))


def test_another_mesh_is_refused():
    for names, kind in ((("data",), AxisType.Auto), (MESH_AXES, AxisType.Explicit)):
        mesh = jax.make_mesh((8, 1, 1, 1)[: len(names)], names, axis_types=(kind,) * len(names))
        with pytest.raises(ValueError, match=r"must have the axes .* all AxisType\.Auto; got"):
            ModelSharding(mesh)


# --- what lies where ------------------------------------------------------------------------------


def abstract_params(config: MoonlightConfig, where: ModelSharding | None = None) -> nnx.State:
    execution = Execution(sharding=where or ModelSharding())
    model = nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0), execution=execution))
    return nnx.state(model, nnx.Param)


@pytest.mark.parametrize("mesh", [CUBE, "fsdp=2,expert=2,tensor=2"])
def test_every_parameter_has_its_place(mesh: str):
    params = abstract_params(MoonlightConfig.preset("moonlight-16b-a3b"))
    shardings = ModelSharding(make_mesh(mesh)).param_shardings(params)
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    whole, eighths = set(), set()
    for (path, _), param, where in zip(
        nnx.to_flat_state(params), jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
    ):
        parts = param.size // math.prod(where.shard_shape(param.shape))
        if parts == 1:
            whole.add(path[-2:])
        elif parts == 8:
            eighths.add(path[-2:])
    gains = {path[-2:] for path, _ in nnx.to_flat_state(params) if path[-1] == "scale"}
    if mesh == CUBE:
        assert whole == gains | {("kv_a_proj", "kernel"), ("router", "kernel")} and not eighths
    else:
        assert whole == gains
        assert eighths == {("experts", name) for name in ("gate_proj", "up_proj", "down_proj")}


def test_a_vocabulary_that_does_not_divide_is_replicated():
    where = ModelSharding(make_mesh(CUBE))
    assert where.param_spec(("embed", "embedding"), (301, 16)) == P(None, "fsdp")
    assert where.param_spec(("lm_head", "kernel"), (16, 301)) == P("fsdp", None)
    assert where.param_spec(("layers", "q_proj", "kernel"), (3, 16, 24)) == P(
        None, "fsdp", "tensor"
    )


def test_rows_of_a_batch_lie_where_the_mesh_has_them(monkeypatch):
    where = ModelSharding(make_mesh(CUBE))
    assert where.local_rows(8) == [*range(8)]  # of one process, all
    tokens = np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3)
    assert where.spread_rows(tokens, 8, axis=1) is tokens
    assert ModelSharding().local_rows(4) == [0, 1, 2, 3]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    spread = where.spread_rows(tokens, 8, axis=1)
    assert spread.sharding.spec == P(None, BATCH_AXES)
    np.testing.assert_array_equal(spread, tokens)
    np.testing.assert_array_equal(where.spread(tokens, None, BATCH_AXES), tokens)


def test_a_tpu_s_compiler_is_told_to_leave_sorted_products_alone():
    """Of a mesh of TPUs; other compilers do not know the option."""
    option = {"xla_tpu_enable_async_collective_fusion_while_loops": False}
    chip = SimpleNamespace(platform="tpu")
    chips: Any = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([[chip, chip]])))
    assert ModelSharding.compiler_options.fget(chips) == option
    assert ModelSharding(make_mesh(CUBE)).compiler_options == {}
    assert ModelSharding().compiler_options == {}


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="how mtp/kernel lies on a mesh: add it there"):
        ModelSharding().param_shardings({"mtp": {"kernel": jnp.ones(2)}})


# --- one batch ------------------------------------------------------------------------------------


# A vocabulary that eight devices divide.
WIDE = dataclasses.replace(toy.CONFIG, vocab_size=320, n_routed_experts=8)


def start(execution: Execution) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model, laid out; its router prefers two experts of one device to all others."""

    def draw() -> tuple[nnx.State, nnx.State]:
        model = Moonlight(WIDE, rngs=nnx.Rngs(0), execution=execution)
        model.layers.mlp.router.bias[...] += jnp.where(jnp.arange(8) < 2, 1.0, 0.0)[None]
        return nnx.split(model, nnx.Param, RouterBias)[1:]

    abstract = nnx.eval_shape(lambda: Moonlight(WIDE, rngs=nnx.Rngs(0), execution=execution))
    graphdef, params, bias = nnx.split(abstract, nnx.Param, RouterBias)
    where = execution.sharding
    shardings = where.param_shardings(params), jax.tree.map(lambda _: where.place(), bias)
    return graphdef, *jax.jit(draw, out_shardings=shardings)()


def loss_and_grads(execution: Execution) -> tuple[tuple, jax.stages.Compiled]:
    """Of a batch of eight, and the program."""
    where = execution.sharding
    graphdef, params, bias = start(execution)

    def loss_fn(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array):
        return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)

    shardings = where.param_shardings(params)
    # The embedding's gradient as ZeRO-1 wants it.
    table = where.place(("tensor", "data", "fsdp", "expert"))
    grads = jax.tree.map(
        lambda p, s: table if p.shape == (WIDE.vocab_size, WIDE.hidden_size) else s,
        params,
        shardings,
    )
    tokens = np.random.default_rng(0).integers(0, 320, (8, 17)).astype(np.int32)
    program = (
        jax.jit(
            jax.value_and_grad(loss_fn, has_aux=True),
            in_shardings=(shardings, where.place(), where.place(BATCH_AXES)),
            out_shardings=(where.place(), grads),
        )
        .lower(params, bias, tokens)
        .compile()
    )
    (loss, stats), grads = program(params, bias, tokens)
    return (params, loss, stats, grads), program


@pytest.fixture(scope="module", name="one_device")
def _one_device() -> tuple:
    return loss_and_grads(Execution(monitor=True))[0]


RAGGED = {"experts": "ragged", "remat": True, "attention_block": 6, "loss_block": 3}


@pytest.mark.parametrize(
    ("mesh", "run"),
    [
        (CUBE, {"attention_block": 4}),
        ("fsdp=2,expert=2,tensor=2", RAGGED),
        ("data=2,fsdp=2,expert=2", {"experts": "ragged", "expert_capacity": 8.0}),
    ],
    ids=str,
)
def test_a_batch_has_the_same_loss_and_gradients_on_every_mesh(
    mesh: str, run: dict, one_device: tuple
):
    """Even where the router sends most tokens to one device: they take several rounds."""
    params, loss, stats, grads = one_device
    execution = Execution(sharding=ModelSharding(make_mesh(mesh)), monitor=True, **run)
    (params_there, loss_there, stats_there, grads_there), program = loss_and_grads(execution)
    for ours, theirs in zip(
        jax.tree.leaves((params_there, stats_there.load_le)),
        jax.tree.leaves((params, stats.load_le)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert stats.load_le[0, :2].sum() == stats.load_le.sum()
    assert abs(float(loss_there) - float(loss)) <= LOSS_TOLERANCE
    for ours, theirs in zip(
        jax.tree.leaves((grads_there, stats_there._replace(dropped_l=None))),
        jax.tree.leaves((grads, stats)),
        strict=True,
    ):
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= GRADIENT_TOLERANCE * np.abs(theirs).max()
    if "expert_capacity" in run:
        np.testing.assert_array_equal(stats_there.dropped_l, 0)
    if run is RAGGED:
        assert "all-to-all" in program.as_text()
    if mesh == CUBE:
        assert_only_tokens_of_the_experts_group_are_gathered(program.as_text(), mesh)


def assert_only_tokens_of_the_experts_group_are_gathered(program: str, text: str) -> None:
    """No device holds weights, logits or tokens of others, but for the tokens of its experts."""
    gathered = {*re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)}
    c, tokens = WIDE, 8 * 16 // make_mesh(text).shape["data"]
    statistics = f"{c.num_hidden_layers},{c.num_attention_heads}"
    assert gathered - {statistics} == {f"{tokens},{c.hidden_size}"}


# --- runs -----------------------------------------------------------------------------------------

Runs = Callable[..., Path]


@pytest.fixture(scope="module", name="run_on")
def _run_on(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a finished toy run on a mesh, trained when it is first asked for."""
    folders: dict[tuple, Path] = {}

    def run_on(mesh: str | None, **changes) -> Path:
        key = (mesh, *changes.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("mesh")
            train(on(folders[key], mesh, **changes), toy.CONFIG)
        return folders[key]

    return run_on


def on(folder: Path, mesh: str | None, **changes):
    settings = {"batch_size": 8, "eval_windows": 8, "max_to_keep": 3, "mesh": mesh}
    return toy.arguments(folder, **settings | changes)


def records(folder: Path) -> list[dict]:
    lines = (folder / "run" / metrics.FILE).read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}
        for line in lines
    ]


def losses(folder: Path) -> np.ndarray:
    return np.array([x["loss"] if "loss" in x else x["val_loss"] for x in records(folder)])


def results(folder: Path) -> dict:
    return json.loads((folder / "run" / "results.json").read_text())


def killed_after(step: int, folder: Path, copy: Path) -> Path:
    """A copy of a run as a kill after this step would have left it."""
    shutil.copytree(folder, copy)
    (copy / "run" / "results.json").unlink()
    for checkpoint in (copy / "run" / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return copy


def test_a_run_has_the_same_losses_on_a_mesh(run_on: Runs):
    one, there = run_on(None), run_on(CUBE)
    np.testing.assert_allclose(losses(there), losses(one), atol=MUON_TOLERANCE)
    assert results(there)["meshes"] == {"1": CUBE}
    assert results(one)["meshes"] == {"1": "one device"}
    # Almost every leaf of the state divides by eight.
    whole = results(one)["optimizer_state_bytes_per_device"]
    assert results(there)["optimizer_state_bytes_per_device"] < 1.05 * whole / 8
    assert "even share" in (there / "run" / "sharding.txt").read_text()
    assert not (one / "run" / "sharding.txt").exists()


def test_adamw_runs_on_a_mesh(run_on: Runs):
    one, there = (run_on(mesh, optimizer="adamw", steps=6) for mesh in (None, CUBE))
    np.testing.assert_allclose(losses(there), losses(one), atol=ADAMW_TOLERANCE)
    # Its moments lie as the parameters do.
    whole = results(one)["optimizer_state_bytes_per_device"]
    assert whole / 4 < results(there)["optimizer_state_bytes_per_device"] < whole / 1.5


def test_a_run_resumed_on_its_mesh_has_the_same_bits(tmp_path: Path, run_on: Runs):
    folder = killed_after(8, run_on(CUBE), tmp_path / "killed")
    train(on(folder, CUBE, resume=True), toy.CONFIG)
    assert records(folder) == records(run_on(CUBE))


def test_a_run_moves_from_mesh_to_mesh(tmp_path: Path, run_on: Runs):
    folder = killed_after(4, run_on(CUBE), tmp_path / "first")
    train(on(folder, None, resume=True), toy.CONFIG)
    np.testing.assert_allclose(losses(folder), losses(run_on(None)), atol=MUON_TOLERANCE)
    assert results(folder)["meshes"] == {"1": CUBE, "5": "one device"}
