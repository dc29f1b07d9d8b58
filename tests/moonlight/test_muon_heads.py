"""Muon by heads in the example: the update of each head, on one device and on a mesh."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.training.job import make_job
from examples.moonlight.training.learner import Learner, make_learner
from muon_jax import map_matrices, orthogonalize
from tests.moonlight import toy

pytestmark = pytest.mark.one_stack

C = toy.CONFIG
# The axis of each projection's heads, in a stack of layers, and the width of one.
HEADS = {
    "q_proj": (2, C.qk_nope_head_dim + C.qk_rope_head_dim),
    "kv_b_proj": (2, C.qk_nope_head_dim + C.v_head_dim),
    "o_proj": (1, C.v_head_dim),
}

GRADIENT = 2.0**-10  # of a weight: too small to be clipped


def learner_of(folder: Path, config: ModelConfig = C, **changes) -> Learner:
    return make_learner(make_job(toy.arguments(folder, **changes), config), None)


def weights_and_updates(learner: Learner) -> tuple[dict, dict]:
    """The weights of the layers' attention, and their first updates, from gradients like them."""
    state = learner.start(Console())

    def step(params: nnx.State, opt_state):
        grads = jax.tree.map(lambda p: GRADIENT * p, params)
        return learner.optimizer.update(grads, opt_state, params)[0]

    updates = jax.jit(step)(state.params, state.opt_state)
    return tuple(
        {name: np.asarray(tree["layers"]["self_attn"][name]["kernel"]) for name in HEADS}
        for tree in map(nnx.to_pure_dict, (state.params, updates))
    )


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


def test_each_head_is_orthogonalized_by_itself(folder: Path):
    learner = learner_of(folder, muon_heads="per_head")
    weights, updates = weights_and_updates(learner)
    rate = float(learner.job.plan.learning_rate(0))
    for name, (axis, width) in HEADS.items():
        for head in range(C.num_attention_heads):
            part, update = (
                jnp.asarray(x[name]).take(jnp.arange(head * width, (head + 1) * width), axis)
                for x in (weights, updates)
            )
            scale = 0.2 * max(part.shape[1:]) ** 0.5
            # Nesterov's first direction, so that both are rounded alike to bfloat16.
            direction = orthogonalize(0.95 * (GRADIENT * part) + GRADIENT * part)
            expected = -rate * (scale * direction.astype(jnp.float32) + 0.1 * part)
            np.testing.assert_allclose(update, expected, atol=3e-2 * rate * scale, err_msg=name)


def test_a_mesh_whose_tensor_axis_cuts_heads_apart_changes_nothing(folder: Path):
    changes = {"muon_heads": "per_head", "batch_size": 8}
    there = learner_of(folder, mesh="data=2,expert=2,tensor=2", **changes)
    _, ours = weights_and_updates(there)
    _, theirs = weights_and_updates(learner_of(folder, **changes))
    for name in HEADS:
        bound = 1e-2 * np.abs(theirs[name]).max()
        np.testing.assert_allclose(ours[name], theirs[name], atol=bound, err_msg=name)
    report = there.sharding_report()
    assert report is not None
    shapes = {row.shape for row in report.rows}
    assert {(HEADS[name][1], C.hidden_size) for name in ("q_proj", "o_proj")} <= shapes


def test_groups_that_a_mesh_cuts_are_put_together(folder: Path):
    """Each device has one of four heads, and two heads form a matrix."""
    config = dataclasses.replace(C, num_attention_heads=4)
    changes = {"muon_heads": "groups", "muon_heads_per_group": 2, "batch_size": 8}
    there = learner_of(folder, config, mesh="data=2,tensor=4", **changes)
    _, ours = weights_and_updates(there)
    _, theirs = weights_and_updates(learner_of(folder, config, **changes))
    for name in HEADS:
        bound = 1e-2 * np.abs(theirs[name]).max()
        np.testing.assert_allclose(ours[name], theirs[name], atol=bound, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "queries", "keys"),
    [
        ({"muon_heads": "per_head"}, (8, 16, 4), (4, 16, 4)),
        ({"muon_heads": "groups", "muon_heads_per_group": 4}, (2, 16, 16), (2, 16, 8)),
    ],
)
def test_a_dense_model_s_keys_go_along_with_their_queries(
    folder: Path, changes: dict, queries: tuple[int, ...], keys: tuple[int, ...]
):
    """Of two layers, the matrices `[count, fan_in, fan_out]`."""
    learner = learner_of(folder, toy.DENSE, **changes)
    views = jax.eval_shape(
        lambda tree: map_matrices(
            lambda x: x,
            tree,
            tree,
            muon_weight_dimension_numbers=learner.roles,
            heads=learner.job.heads,
        ),
        learner.abstract.params,
    )
    shapes = {path.split("/")[-2]: view.shape for path, [view] in views.items()}
    assert shapes["q_proj"] == queries
    assert shapes["k_proj"] == shapes["v_proj"] == keys
    count, fan_in, fan_out = queries
    assert shapes["o_proj"] == (count, fan_out, fan_in)


def test_groups_that_cut_key_heads_apart_are_refused(folder: Path):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    config = dataclasses.replace(toy.DENSE, **heads)
    args = toy.arguments(folder, muon_heads="groups", muon_heads_per_group=3)
    with pytest.raises(ValueError, match=r"^--muon-heads-per-group 3: .* share 1\.5 of 3 key"):
        make_job(args, config)


@pytest.mark.bits
def test_a_group_of_all_heads_is_the_joint_matrix(folder: Path):
    _, groups = weights_and_updates(learner_of(folder, muon_heads="groups", muon_heads_per_group=2))
    _, joint = weights_and_updates(learner_of(folder))
    for name in HEADS:
        np.testing.assert_array_equal(groups[name], joint[name])
