"""A run's architecture, its size by formula, and what Muon pays for which matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.moonlight.model.language_model import next_token_loss
from examples.moonlight.model.moonlight import Moonlight
from examples.scaling_law import models
from examples.scaling_law.models import flops_of, make_model, parameters_of
from examples.scaling_law.protocol import TOKENS_PER_PARAMETER, VOCABULARY, Run
from muon_jax import routing_report

# float32 sums of 128 products in another order; measured 2.4e-7.
MLP_TOLERANCE = 1e-6

FAMILIES = ("dense", "two_layer", "moe")


def make_run(layers: int = 3, **changes) -> Run:
    defaults = {"tokens": 10_000, "batch": 2, "learning_rate": 1e-3, "optimizer": "muon"}
    return Run(part="study", layers=layers, **defaults | changes)


def abstract(run: Run):
    return nnx.eval_shape(lambda: make_model(run, jax.random.key(0)))


def step_flops(*shapes: tuple[int, int]) -> int:
    """Of one step of Newton-Schulz on each of `[m, n]`, m <= n."""
    return sum(4 * m**2 * n + 2 * m**3 for m, n in shapes)


# --- architecture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers, head_dim", [(2, 16), (5, 16), (3, 64)])
def test_width_and_heads_follow_from_the_layers(family, layers, head_dim):
    model = abstract(make_run(layers, head_dim=head_dim, family=family, sequence_length=96))
    config = model.config
    assert config.hidden_size == layers * head_dim
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, layers)
    assert (config.vocab_size, config.max_position_embeddings) == (256, 96)
    assert model.embed.embedding.shape == (256, layers * head_dim)
    if family != "moe":
        kernel = model.layers.self_attn.k_proj.kernel
        assert kernel.shape == (layers, layers * head_dim, layers * head_dim)


def test_a_swiglu_has_about_the_parameters_of_two_layers():
    for layers in range(1, 11):
        inner = models.dense_config(make_run(layers)).intermediate_size
        hidden = 16 * layers
        assert inner % 8 == 0
        assert 8 * hidden**2 <= 3 * hidden * inner < 8 * hidden**2 + 3 * hidden * 8


def test_the_table_1_mlp_has_two_layers_and_muon_gets_them():
    model = abstract(make_run(family="two_layer"))
    assert isinstance(model, models.TwoLayerDense)
    params = nnx.state(model, nnx.Param)
    rows = {row.path: row for row in routing_report(params).rows if "/mlp/" in row.path}
    shapes = {path: (row.shape, row.optimizer) for path, row in rows.items()}
    assert shapes == {
        "layers/mlp/up_proj/kernel": ((3, 48, 192), "muon"),
        "layers/mlp/down_proj/kernel": ((3, 192, 48), "muon"),
    }


def test_two_layers_compute_what_numpy_does():
    mlp = models.TwoLayerMLP(32, 128, stddev=0.5, rngs=nnx.Rngs(0))
    act_nd = np.random.default_rng(0).standard_normal((5, 32))
    up, down = (np.asarray(p.kernel[...], np.float64) for p in (mlp.up_proj, mlp.down_proj))
    inner = act_nd @ up
    expected = (inner / (1 + np.exp(-inner))) @ down
    found = np.asarray(mlp(jnp.asarray(act_nd, jnp.float32)))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < MLP_TOLERANCE


def test_experts_are_moonlights():
    model = abstract(make_run(family="moe"))
    assert isinstance(model, Moonlight)
    config = model.config
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (
        8,
        2,
        1,
    )
    # For two of equal weight it would be sqrt(2).
    assert 1.3 < config.routed_scaling_factor < 2**0.5
    assert len(model.first_layers) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_has_a_loss_in_either_dtype(family, dtype):
    model = abstract(make_run(2, family=family, compute_dtype=dtype, watch=1))
    assert model.execution.dtype == jnp.dtype(dtype)
    tokens_bt = jax.ShapeDtypeStruct((2, 129), jnp.int32)
    loss, stats = nnx.eval_shape(next_token_loss, model, tokens_bt)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert stats.attention_rms_l.shape == stats.mlp_rms_l.shape == (2,)
    assert (stats.load_le is None) == (family != "moe")


def test_nothing_is_measured_on_the_way_unless_asked():
    assert not abstract(make_run()).execution.monitor


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, head_dim", [(2, 16), (3, 16), (7, 16), (10, 64)])
@pytest.mark.parametrize("family", ["dense", "two_layer"])
def test_sizes_are_those_of_the_formula(layers, head_dim, family):
    run = make_run(layers, head_dim=head_dim, family=family)
    d, inner = layers * head_dim, models.dense_config(run).intermediate_size
    matrices = 2 if family == "two_layer" else 3
    # Attention, the MLP, two norms; the last norm; embedding and head.
    body = layers * (4 * d**2 + matrices * d * inner + 2 * d) + d
    assert parameters_of(run) == (body + 2 * VOCABULARY * d, body, body, 0)


def test_a_token_passes_through_two_of_eight_experts():
    d = 48
    counts = parameters_of(make_run(3, family="moe"))
    # Three matrices [48, 48] of each of the six others, in the two layers that have experts.
    assert counts.body - counts.active == 2 * 6 * 3 * d**2
    assert counts.router_bias == 2 * 8


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 1},
        {"batch": 64},
        {"seed": 5},
        {"learning_rate": 1.0},
        {"optimizer": "adamw"},
        {"part": "tuning"},
        {"sequence_length": 32},
        {"compute_dtype": "bfloat16"},
        {"watch": 3},
    ],
    ids=str,
)
def test_the_training_does_not_change_the_size(change):
    assert parameters_of(make_run().replace(**change)) == parameters_of(make_run())


@pytest.mark.parametrize("layers, head_dim", [(2, 16), (5, 16), (4, 64)])
def test_compute_optimal_is_20_tokens_per_parameter(layers, head_dim):
    body = parameters_of(make_run(layers, head_dim=head_dim)).body
    assert TOKENS_PER_PARAMETER == 20
    assert models.compute_optimal_tokens(layers, head_dim) == 20 * body


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_muon_pays_for_newton_schulz(family):
    muon = flops_of(make_run(family=family))
    adamw = flops_of(make_run(family=family, optimizer="adamw"))
    assert adamw.newton_schulz == 0 < muon.newton_schulz
    assert muon[:2] == adamw[:2]


def test_a_run_costs_its_tokens():
    run = make_run()
    counts, d = parameters_of(run), 48
    flops = flops_of(run)
    assert flops.body == 6 * counts.body * run.trained_tokens
    rest = 6 * d * VOCABULARY + 6 * 3 * d * run.sequence_length
    assert flops.whole - flops.body == rest * run.trained_tokens


def test_experts_cost_the_two_that_a_token_uses():
    run = make_run(family="moe")
    counts, d, inner = parameters_of(run), 48, 16
    flops = flops_of(run)
    assert flops.body == 6 * counts.active * run.trained_tokens
    # Queries and keys are 24 wide, values 16; forward and twice backward on half of 128 keys.
    attention = 3 * 3 * 3 * 2 * (24 + inner) * run.sequence_length // 2
    rest = 6 * d * VOCABULARY + attention
    assert flops.whole - flops.body == rest * run.trained_tokens


@pytest.mark.parametrize("schedule, steps", [("standard", 5), ("deepseek_v4", 10)])
def test_newton_schulz_is_paid_for_every_matrix_at_every_step(schedule, steps):
    d, inner = 48, 128
    dense = 3 * step_flops(*[(d, d)] * 4, *[(d, inner)] * 3)
    two_layer = 3 * step_flops(*[(d, d)] * 4, *[(d, 4 * d)] * 2)
    # Queries 48 -> 72, the latent 48 -> 24 + 8 -> 48 + 48, the output; then the router, eight
    # experts and a shared one.
    attention = step_flops((d, 72), (32, d), (24, 96), (d, d))
    experts = step_flops((8, d), *[(d, d)] * 3 * 9)
    moe = 3 * attention + step_flops(*[(d, inner)] * 3) + 2 * experts
    for family, expected in zip(FAMILIES, (dense, two_layer, moe), strict=True):
        run = make_run(family=family, ns_coeffs=schedule)
        assert flops_of(run).newton_schulz == steps * run.steps * expected


@pytest.mark.parametrize("per_group", [1, 2])
def test_heads_of_their_own_cost_less(per_group):
    joint = make_run(4)
    d, width, groups = 64, 16 * per_group, 4 // per_group
    # Queries, keys and values, and the output, turned.
    saved = 4 * 4 * (step_flops((d, d)) - groups * step_flops((width, d)))
    found = flops_of(joint).newton_schulz, flops_of(joint.replace(heads_per_group=per_group))
    assert found[0] - found[1].newton_schulz == 5 * joint.steps * saved


@pytest.mark.parametrize("leaves", [("embed",), ("lm_head",), ("embed", "lm_head")], ids=str)
def test_more_leaves_for_muon_cost_more(leaves):
    run = make_run()
    more = run.replace(muon_too=leaves)
    extra = 5 * run.steps * len(leaves) * step_flops((48, VOCABULARY))
    assert flops_of(more).newton_schulz - flops_of(run).newton_schulz == extra
    assert flops_of(more)[:2] == flops_of(run)[:2]


@pytest.mark.parametrize("leaves", [(), ("embed",), ("lm_head",), ("embed", "lm_head")], ids=str)
def test_muon_gets_the_leaves_that_are_named_and_keeps_its_own(leaves):
    run = make_run(muon_too=leaves)
    params = nnx.state(abstract(run), nnx.Param)
    leaves_of = models.muon_leaves(run)
    rows = routing_report(params, muon_weight_dimension_numbers=leaves_of).rows
    muon = {row.path.split("/")[0] for row in rows if row.optimizer == "muon"}
    assert muon == {"layers", *leaves}
    assert sum(row.optimizer == "muon" for row in rows) == 7 + len(leaves)


def test_a_leaf_that_is_not_there_raises():
    with pytest.raises(ValueError, match=r"\^head/.*finds no path"):
        flops_of(make_run(muon_too=("head",)))
