"""The model against a float64 twin, its expert routes against each other, counts and balance."""

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.moonlight.model.config import PRESETS, MoonlightConfig, gate_scale
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import MoE, RouterBias
from examples.moonlight.model.language_model import next_token_loss
from examples.moonlight.model.layers import Embed
from examples.moonlight.model.moonlight import (
    Moonlight,
    max_violation,
    parameter_counts,
    update_router_bias,
)
from tests.moonlight import moonlight_reference as reference

# Largest difference of logits, which reach 5; measured 4.8e-6.
FORWARD_TOLERANCE = 2e-5
# Every known mistake moves some logit by this; measured 1.0 (no gate scale) to 7.1.
MISTAKE_SHOWS = 0.5
# Directional derivative of the loss, over the gradient's norm; measured 3.0e-6.
GRADIENT_TOLERANCE = 1e-5
# Largest difference of a layer of experts' output, which reaches 7; measured 2.4e-6.
ROUTE_TOLERANCE = 1e-5
# Difference of gradients that should be the same, over the largest entry; measured 1.0e-6.
SAME_GRADIENT_TOLERANCE = 1e-5
# Relative difference of the loss in bfloat16, which sends some tokens elsewhere; measured 8.1e-3.
BFLOAT16_LOSS_TOLERANCE = 0.03

# Every width differs from every other, so that no exchange of two goes unnoticed.
TOY = MoonlightConfig(
    vocab_size=61,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    intermediate_size=40,
    moe_intermediate_size=20,
    n_routed_experts=7,
    num_experts_per_tok=3,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    rope_theta=100.0,
    max_position_embeddings=16,
)
ROUTES = ("dense", "ragged")


def tokens(rows: int = 2, time: int = 13, vocab: int = TOY.vocab_size, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (rows, time)), jnp.int32)


def hard_model(
    route: str = "dense", dtype=jnp.float32, config: MoonlightConfig = TOY, **run
) -> Moonlight:
    """Weights that hide nothing: std 0.1 or more, random gains, a bias that changes choices.

    The default initialization makes every branch so small that a wrong rope or scale changes no
    digit. The latent columns of kv_a_proj are small, so that the latent norm's epsilon counts.
    """
    execution = Execution(experts=route, dtype=dtype, **run)
    model = nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0), execution=execution))
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape = variable.shape
        if isinstance(variable, RouterBias):
            value = 0.3 * rng.standard_normal(shape)
        elif path[-1] == "scale":
            value = rng.uniform(0.5, 1.5, shape)
        elif path[0] == "embed":
            value = rng.standard_normal(shape)
        else:
            value = 0.2 * rng.standard_normal(shape)
        if path[-2] == "kv_a_proj":
            value[..., : config.kv_lora_rank] *= 3e-3
        variable.set_value(jnp.asarray(value, jnp.float32))
    return model


# Compiled whole: op by op, every operation on every shape would compile on its own.
forward = nnx.jit(lambda model, rows: model(rows))
loss_and_grads = nnx.jit(nnx.value_and_grad(next_token_loss, has_aux=True))


@pytest.fixture(name="tiny", scope="module")
def _tiny() -> Moonlight:
    """The model as it is initialized; no test changes it."""
    return nnx.jit(lambda: Moonlight(MoonlightConfig.preset("tiny"), rngs=nnx.Rngs(0)))()


def balance(model: Moonlight, load_le: jax.Array, rate: float) -> None:
    bias = model.layers.mlp.router.bias
    bias[...] = update_router_bias(bias[...], load_le, rate)


def one_layer(model: Moonlight):
    """The first layer of the stack."""
    graphdef, state = nnx.split(model.layers)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))


def to_float64(module: nnx.Module):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(module)))


# --- sizes ----------------------------------------------------------------------------------------


def test_the_published_model_has_the_published_number_of_parameters():
    counts = parameter_counts(MoonlightConfig.preset("moonlight-16b-a3b"))
    assert counts.total == 15_960_108_544
    assert counts.body == 15_289_019_904
    assert counts.active == 2_243_685_888
    assert counts.router_bias == 1_664


def test_the_published_model_has_the_published_matrices():
    """5,207 for Muon, and the shapes of facts known from the published files."""
    model = nnx.eval_shape(
        lambda: Moonlight(MoonlightConfig.preset("moonlight-16b-a3b"), rngs=nnx.Rngs(0))
    )
    body = {
        path: variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[0] not in ("embed", "lm_head")
    }
    matrices = sum(math.prod(s[:-2]) for path, s in body.items() if path[-1] != "scale")
    assert matrices == 5_207
    assert body["layers", "self_attn", "q_proj", "kernel"] == (26, 2048, 3072)
    assert body["layers", "self_attn", "kv_a_proj", "kernel"] == (26, 2048, 576)
    assert body["layers", "self_attn", "kv_b_proj", "kernel"] == (26, 512, 4096)
    assert body["layers", "self_attn", "o_proj", "kernel"] == (26, 2048, 2048)
    assert body["layers", "mlp", "shared_experts", "up_proj", "kernel"] == (26, 2048, 2816)
    assert body["layers", "mlp", "experts", "down_proj"] == (26, 64, 1408, 2048)
    assert body["first_layers", 0, "mlp", "gate_proj", "kernel"] == (2048, 11_264)


def test_a_model_may_lack_shared_experts_or_all_experts():
    def shapes(**changes):
        config = dataclasses.replace(TOY, **changes)
        model = nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0)))
        return {path: x.shape for path, x in nnx.to_flat_state(nnx.state(model))}

    whole, alone = shapes(), shapes(n_shared_experts=0)
    assert alone == {path: x for path, x in whole.items() if "shared_experts" not in path}
    layers = TOY.num_hidden_layers
    dense = shapes(first_k_dense_replace=layers)
    assert dense == shapes(first_k_dense_replace=layers + 1)
    # One stack, as of other dense models.
    assert dense["layers", "mlp", "up_proj", "kernel"] == (
        layers,
        TOY.hidden_size,
        TOY.intermediate_size,
    )
    assert not {"first_layers", "experts", "router"} & {name for path in dense for name in path}


@pytest.mark.parametrize("name, low, high", [("small", 100e6, 200e6), ("tiny", 1e6, 5e6)])
def test_the_other_presets_have_the_promised_size(name, low, high):
    assert low < parameter_counts(MoonlightConfig.preset(name)).total < high


def test_names_ranks_and_dtypes_tell_muon_what_is_what(tiny):
    for path, variable in nnx.to_flat_state(nnx.state(tiny)):
        assert variable.dtype == jnp.float32
        rank = variable.ndim - (path[0] == "layers")
        if isinstance(variable, RouterBias):
            assert path[-2:] == ("router", "bias") and rank == 1
        elif path[0] == "embed":
            assert path == ("embed", "embedding") and rank == 2
        elif "experts" in path:
            assert path[-1] in ("gate_proj", "up_proj", "down_proj") and rank == 3
        elif rank == 1:
            assert path[-1] == "scale" and np.all(np.asarray(variable[...]) == 1)
        else:
            assert path[-1] == "kernel" and rank == 2
        if rank > 1:
            # Five standard errors of a sample deviation.
            margin = 5 / math.sqrt(2 * variable.size)
            assert np.std(np.asarray(variable[...])) == pytest.approx(0.02, rel=margin)


@pytest.mark.parametrize("experts, top_k, printed", [(64, 6, 2.446), (8, 2, 1.409), (16, 4, 1.991)])
def test_gate_scale_reproduces_the_printed_figures(experts, top_k, printed):
    assert round(gate_scale(experts, top_k), 3) == printed


def test_presets_carry_the_gate_scale_of_their_experts():
    for config in PRESETS.values():
        simulated = gate_scale(config.n_routed_experts, config.num_experts_per_tok)
        assert config.routed_scaling_factor == round(simulated, 3)


@pytest.mark.parametrize("top_k", [0, 9])
def test_gate_scale_refuses_an_impossible_choice(top_k):
    with pytest.raises(ValueError, match="top_k must be between 1 and experts"):
        gate_scale(8, top_k)


# --- the forward and backward pass against the float64 twin ---------------------------------------


def logit_error(rules: reference.Conventions, route: str = "dense") -> float:
    model = hard_model(route)
    logits, stats = forward(model, tokens())
    expected, load, largest = reference.forward(to_float64(model), TOY, np.asarray(tokens()), rules)
    if rules == reference.PUBLISHED:
        np.testing.assert_array_equal(stats.load_le, load)
        np.testing.assert_allclose(stats.max_logit_lh, largest, rtol=1e-4)
    return float(np.abs(np.asarray(logits) - expected).max())


@pytest.mark.parametrize("route", ROUTES)
def test_logits_and_statistics_equal_the_reference(route):
    assert logit_error(reference.PUBLISHED, route) < FORWARD_TOLERANCE


@pytest.mark.parametrize("mistake", reference.KNOWN_MISTAKES)
def test_the_comparison_notices_a_known_mistake(mistake):
    assert logit_error(reference.KNOWN_MISTAKES[mistake]) > MISTAKE_SHOWS


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_equal_the_reference_s_directional_derivatives(route):
    """Central differences of the float64 loss along one random direction per parameter."""
    model, rows = hard_model(route), tokens()
    (loss, _), grads = loss_and_grads(model, rows)
    params = to_float64(model)
    assert float(loss) == pytest.approx(
        reference.next_token_loss(params, TOY, np.asarray(rows)), rel=1e-5
    )
    rng, step = np.random.default_rng(2), 1e-7
    for path, grad in nnx.to_flat_state(grads):
        grad = np.asarray(grad[...], np.float64)
        direction = rng.standard_normal(grad.shape) + grad / np.abs(grad).max()
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(params)
            leaf = moved
            for key in path[:-1]:
                leaf = leaf[key]
            leaf[path[-1]] += sign * step * direction
            losses.append(reference.next_token_loss(moved, TOY, np.asarray(rows)))
        expected = (losses[0] - losses[1]) / (2 * step)
        error = abs(float((grad * direction).sum()) - expected)
        assert error < GRADIENT_TOLERANCE * np.linalg.norm(grad), path


@pytest.mark.parametrize("placed", ["mixed", "one choice for all", "experts without tokens"])
def test_both_routes_equal_a_slow_loop_over_tokens(placed):
    act = jnp.asarray(np.random.default_rng(3).standard_normal((29, TOY.hidden_size)), jnp.float32)
    outputs = {}
    for route in ROUTES:
        moe = one_layer(hard_model(route)).mlp
        assert isinstance(moe, MoE)
        if placed != "mixed":
            favoured = 3 if placed == "one choice for all" else 5
            moe.router.bias[...] = jnp.where(jnp.arange(TOY.n_routed_experts) < favoured, 5.0, -5.0)
        expected, load = reference.moe(np.asarray(act, np.float64), to_float64(moe), TOY)
        out, load_e, _ = jax.jit(lambda m, x: m(x))(moe, act)
        np.testing.assert_array_equal(load_e, load)
        np.testing.assert_allclose(out, expected, atol=ROUTE_TOLERANCE)
        outputs[route] = out
    np.testing.assert_allclose(outputs["dense"], outputs["ragged"], atol=ROUTE_TOLERANCE)


def test_both_routes_have_the_same_gradients():
    grads = [loss_and_grads(hard_model(route), tokens())[1] for route in ROUTES]
    dense, ragged = (jax.tree.leaves(g) for g in grads)
    for a, b in zip(dense, ragged, strict=True):
        np.testing.assert_allclose(a, b, atol=SAME_GRADIENT_TOLERANCE * float(jnp.abs(a).max()))


# --- behaviour ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_the_future_and_other_sequences_do_not_change_a_logit(route):
    model, rows = hard_model(route), tokens()
    changed = rows.at[0, 7:].set((rows[0, 7:] + 1) % TOY.vocab_size)
    before, after = (np.asarray(forward(model, t)[0]) for t in (rows, changed))
    np.testing.assert_allclose(before[0, :7], after[0, :7], atol=1e-5)
    np.testing.assert_allclose(before[1], after[1], atol=1e-5)
    assert (np.abs(before[0, 7:] - after[0, 7:]).max(axis=-1) > 1e-2).all()


def test_loss_at_initialization_is_that_of_guessing(tiny):
    config = tiny.config
    loss, stats = nnx.jit(next_token_loss)(tiny, tokens(4, 129, config.vocab_size))
    # Random logits of variance s^2 = hidden * 0.02^2 cost s^2 / 2 more than equal ones.
    expected = math.log(config.vocab_size) + config.hidden_size * 0.02**2 / 2
    assert float(loss) == pytest.approx(expected, abs=0.02)
    assert stats.load_le.shape == (3, 8)
    assert (stats.load_le.sum(axis=1) == 4 * 128 * 2).all()


def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients():
    model, exact = hard_model(dtype=jnp.bfloat16), hard_model()
    (loss, _), grads = loss_and_grads(model, tokens())
    assert forward(model, tokens())[0].dtype == loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((nnx.state(model), grads))} == {
        jnp.dtype("float32")
    }
    (exact_loss, _), _ = loss_and_grads(exact, tokens())
    assert loss != exact_loss
    assert float(loss) == pytest.approx(float(exact_loss), rel=BFLOAT16_LOSS_TOLERANCE)


def test_in_bfloat16_a_frequent_token_s_gradients_are_added_in_float32():
    """In bfloat16, a sum of ones ends at 256."""
    execution = Execution(dtype=jnp.bfloat16)
    embed = Embed(2, 1, stddev=1.0, rngs=nnx.Rngs(0), execution=execution)
    graphdef, state = nnx.split(embed)

    def total(state: nnx.State) -> jax.Array:
        return nnx.merge(graphdef, state)(jnp.zeros(1000, jnp.int32)).astype(jnp.float32).sum()

    grads = jax.tree.leaves(jax.grad(total)(state))
    assert [g.tolist() for g in grads] == [[[1000.0], [0.0]]]


def equations(jaxpr) -> list:
    """Of a program and all programs in it."""
    found = list(jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += equations(inner)
    return found


def matmul_dtypes(jaxpr) -> list[jnp.dtype]:
    names = ("dot_general", "ragged_dot_general")
    return [e.invars[0].aval.dtype for e in equations(jaxpr) if e.primitive.name in names]


@pytest.mark.parametrize("route", ROUTES)
def test_in_bfloat16_only_the_router_multiplies_in_float32(route):
    model = hard_model(route, jnp.bfloat16)
    dtypes = matmul_dtypes(jax.make_jaxpr(lambda t: model(t)[0])(tokens()).jaxpr)
    assert dtypes.count(jnp.dtype("float32")) == 1  # in the loop over layers
    assert set(dtypes) == {jnp.dtype("float32"), jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "run", [{"remat": True, "attention_block": 5, "loss_block": 7}, {"unroll": True, "remat": True}]
)
def test_blocks_and_rematerialization_change_nothing(run):
    rows = tokens(2, 14)
    plain, changed = (
        loss_and_grads(hard_model("ragged", monitor=True, **options), rows) for options in ({}, run)
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, atol=SAME_GRADIENT_TOLERANCE * float(jnp.abs(a).max()))


def test_a_recomputed_layer_keeps_only_its_input():
    """The logits of a block, and the head's, never exist for all tokens at once."""
    rows = tokens(2, 17)

    def sizes(**run) -> set[tuple[int, ...]]:
        program = jax.make_jaxpr(nnx.value_and_grad(next_token_loss, has_aux=True))(
            hard_model(**run), rows
        )
        return {v.aval.shape for eqn in equations(program.jaxpr) for v in eqn.outvars}

    whole, blocks = sizes(), sizes(attention_block=4, loss_block=8)
    for shape in ((2, 3, 16, 16), (32, TOY.vocab_size)):
        assert shape in whole and shape not in blocks
    assert {(2, 3, 4, 4), (8, TOY.vocab_size)} <= blocks


def test_monitored_statistics_are_those_of_the_arrays():
    model, rows = hard_model(monitor=True), tokens()
    model.first_layers[0].self_attn.q_proj.kernel[...] *= 40

    @nnx.jit
    def measure(model: Moonlight, rows: jax.Array):
        layer = model.first_layers[0]
        act = layer.input_layernorm(model.embed(rows.reshape(-1)))
        return model(rows)[1], layer.self_attn(act, rows.shape[0])

    stats, (out, attention) = measure(model, rows)
    assert attention.hot_share_h.min() > 0 and attention.hot_share_h.max() < 1
    np.testing.assert_allclose(stats.hot_share_lh[0], attention.hot_share_h)
    assert attention.max_logit_h.min() > 100
    np.testing.assert_allclose(stats.attention_rms_l[0], np.sqrt(np.mean(out**2)), rtol=1e-5)
    unwatched = jax.eval_shape(lambda rows: hard_model()(rows)[1], rows)
    assert unwatched.hot_share_lh is None and unwatched.attention_rms_l is None


def test_a_cache_gives_the_logits_of_the_whole_text():
    """Rows of different lengths, prefilled in two chunks with filling, then token by token."""
    model, rows = hard_model(), tokens(2, 13)
    whole, _ = forward(model, rows)
    length_b = jnp.asarray([7, 4])
    decode = nnx.jit(lambda m, t, c, s: m.decode(t, c, s))
    cache = model.init_cache(2, 16)
    for start in (0, 4):
        act_nd, cache = decode(model, rows[:, start : start + 4], cache, jnp.full(2, start))
    logits = model.logits(act_nd).reshape(2, 4, -1)
    np.testing.assert_allclose(logits[0, 2], whole[0, 6], atol=FORWARD_TOLERANCE)
    # Row 1 ends at 4: its second chunk was filling, which what follows replaces.
    for step in range(6):
        position_b = length_b + step
        act_nd, cache = decode(model, rows[jnp.arange(2), position_b][:, None], cache, position_b)
        expected = whole[jnp.arange(2), position_b]
        np.testing.assert_allclose(model.logits(act_nd), expected, atol=FORWARD_TOLERANCE)
    assert cache.latent_lbsz.shape == (3, 2, 16, TOY.kv_lora_rank)
    assert cache.k_rope_lbsr.shape == (3, 2, 16, TOY.qk_rope_head_dim)


def test_a_capacity_drops_the_last_tokens_of_a_full_expert_and_counts_them():
    rows = tokens(2, 13)
    exact, _ = forward(hard_model("ragged"), rows)
    loose, stats = forward(hard_model("ragged", expert_capacity=7.0), rows)
    np.testing.assert_allclose(loose, exact, atol=FORWARD_TOLERANCE)
    np.testing.assert_array_equal(stats.dropped_l, 0)

    act = jnp.asarray(np.random.default_rng(3).standard_normal((28, TOY.hidden_size)), jnp.float32)
    moe, whole = (one_layer(hard_model("ragged", expert_capacity=c)).mlp for c in (0.5, None))
    run = nnx.jit(lambda moe: (moe(act), moe.router(act).expert_nk))
    (out, load_e, dropped), expert_nk = run(moe)
    slots = math.ceil(0.5 * 28 * TOY.num_experts_per_tok / TOY.n_routed_experts)
    assert dropped == jnp.maximum(load_e - slots, 0).sum() > 0
    expert_nk = np.asarray(expert_nk)
    first = [expert_nk[:n].reshape(-1).tolist() for n in range(1, 29)]
    kept = [all(seen.count(e) <= slots for e in expert_nk[n]) for n, seen in enumerate(first)]
    same = np.isclose(out, run(whole)[0][0], atol=ROUTE_TOLERANCE).all(axis=1)
    np.testing.assert_array_equal(same, kept)


@pytest.mark.parametrize(
    ("axis_type", "route"),
    [(jax.sharding.AxisType.Auto, "dense"), (jax.sharding.AxisType.Explicit, "ragged")],
)
def test_a_mesh_changes_nothing(axis_type, route):
    """Both kinds of axes work with everything replicated, Auto ones with a sharded batch too."""
    (expected, _), _ = loss_and_grads(hard_model(route), tokens())
    explicit = axis_type == jax.sharding.AxisType.Explicit
    devices = jax.devices()[: 1 if explicit else 2]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(axis_type,), devices=devices)
    with jax.set_mesh(mesh):
        model = hard_model(route)
        rows = jax.device_put(tokens(), jax.P(None if explicit else "data"))
        (loss, stats), _ = loss_and_grads(model, rows)
        balance(model, stats.load_le, 1e-3)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


# --- balance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_router_bias_moves_by_moonlight_s_rule(transform):
    start = jnp.asarray([[0.0, 1, 2, 3], [0.5, 0, 0, 0]])
    # Means 4 and 3. e = (-6, 2, 4, 0) and (-1, 1, 2, -2), so the mean signs are 1/4 and 0.
    load = jnp.asarray([[10, 2, 0, 4], [4, 2, 1, 5]], jnp.int32)
    moved = transform(update_router_bias)(start, load, 0.5)
    expected = 0.5 * np.array([[-1.25, 0.75, 0.75, -0.25], [-1, 1, 1, -1]])
    np.testing.assert_allclose(moved - start, expected, atol=1e-6)
    np.testing.assert_array_equal(transform(update_router_bias)(start, load, 0.0), start)
    np.testing.assert_array_equal(update_router_bias(start, jnp.ones((2, 4)), 1.0), start)


def test_router_bias_update_refuses_another_model_s_loads():
    with pytest.raises(ValueError, match=r"load_le must have the shape \(2, 7\), got \(7,\)"):
        update_router_bias(jnp.zeros((2, 7)), jnp.ones((7,)), 1e-3)


def test_router_bias_updates_balance_the_load():
    model, rows = hard_model(), tokens(16, 16)
    forward = nnx.jit(lambda m: m(rows)[1].load_le)
    before = max_violation(forward(model))
    for _ in range(60):
        balance(model, forward(model), 1e-2)
    after = max_violation(forward(model))
    assert (before > 0.4).all() and (after < 0.1).all(), (before, after)


def test_router_bias_has_no_gradient_and_is_no_parameter():
    model = hard_model()
    _, grads = loss_and_grads(model, tokens())
    paths = [path for path, _ in nnx.to_flat_state(grads)]
    assert paths and not any(path[-1] == "bias" for path in paths)
    assert not any(path[-1] == "bias" for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    bias_grads = nnx.grad(next_token_loss, argnums=nnx.DiffState(0, RouterBias), has_aux=True)
    for leaf in jax.tree.leaves(nnx.jit(bias_grads)(model, tokens())[0]):
        np.testing.assert_array_equal(leaf, 0)


def test_max_violation_is_the_excess_of_the_fullest_expert():
    load = jnp.asarray([[4, 4, 4, 4], [10, 2, 0, 4], [16, 0, 0, 0]])
    np.testing.assert_allclose(max_violation(load), [0, 1.5, 3])


# --- refusals -------------------------------------------------------------------------------------


def test_an_unknown_preset_raises_and_names_the_presets():
    with pytest.raises(
        ValueError, match="'huge'; the presets are moonlight-16b-a3b, small, mini, tiny"
    ):
        MoonlightConfig.preset("huge")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"vocab_size": 61.0}, "vocab_size must be an integer >= 1, got 61.0"),
        ({"num_attention_heads": True}, "num_attention_heads must be an integer >= 1, got True"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer >= 0, got -1"),
        ({"rope_theta": 0.0}, "rope_theta must be a positive finite number, got 0.0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive finite number, got nan"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim must be even"),
        ({"num_experts_per_tok": 8}, r"num_experts_per_tok \(8\) must not exceed n_routed_experts"),
    ],
)
def test_an_impossible_configuration_raises(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOY, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": "sparse"}, r"experts must be one of \('dense', 'ragged'\), got 'sparse'"),
        ({"attention_block": 0}, "attention_block must be a positive integer or None, got 0"),
        ({"loss_block": 2.5}, "loss_block must be a positive integer or None, got 2.5"),
        ({"experts": "ragged", "expert_capacity": 0.0}, "expert_capacity must be a positive"),
        ({"expert_capacity": 1.0}, "the dense route sends none: choose experts"),
    ],
)
def test_an_impossible_execution_raises(change, message):
    with pytest.raises(ValueError, match=message):
        Execution(**change)


def test_every_token_may_use_every_expert_and_no_layer_be_dense():
    config = dataclasses.replace(TOY, num_experts_per_tok=7, first_k_dense_replace=0)
    _, stats = forward(hard_model(config=config), tokens(2, 5))
    np.testing.assert_array_equal(stats.load_le, np.full((3, 7), 10))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (jnp.zeros((4,), jnp.int32), r"integer array \[batch, time\], got int32\[4\]"),
        (jnp.zeros((2, 4), jnp.float32), r"integer array \[batch, time\], got float32\[2, 4\]"),
        (jnp.zeros((1, 17), jnp.int32), "17 tokens, and max_position_embeddings is 16"),
    ],
)
def test_wrong_tokens_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        hard_model()(wrong)


def test_a_batch_sharded_over_explicit_axes_raises():
    axis_types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=axis_types, devices=jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"mesh axes of AxisType\.Auto"):
        forward(hard_model(), jax.device_put(tokens(), jax.P("data")))
