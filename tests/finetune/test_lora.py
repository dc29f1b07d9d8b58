"""Adapters: PEFT's start, the gradient of a merged matrix, their places, dropout, merging."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples.finetune.lora.adapters import (
    DropoutKey,
    LoraConfig,
    adapted_modules,
    add_lora,
    folded,
    has_adapters,
    trainable,
)
from examples.finetune.lora.merge import merged
from examples.moonlight.hf_export import export_pretrained
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, ModelSharding, make_mesh
from examples.moonlight.model.experts import EXPERT_STACKS, Experts, RouterBias
from examples.moonlight.model.language_model import count_parameters, next_token_loss
from examples.moonlight.model.layers import Linear, scan_layers, stack_layers
from muon_jax import muon
from tests.finetune import lora_toy

# Sums in another order, over the largest entry; measured 8e-7 and, of gradients, 1.7e-6.
LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-5
LOSS_TOLERANCE = 2e-6
# What the adapters of these tests do to some logit, at least; measured 1.3.
ADAPTERS_SHOW = 0.5

TOKENS = np.random.default_rng(0).integers(0, 62, (8, 13)).astype(np.int32)


def config_for(family: str, **changes) -> LoraConfig:
    settings = {"rank": 4, "alpha": 2.0, "dropout": 0.0, "target_modules": lora_toy.ALL[family]}
    return LoraConfig(**settings | changes)


def assert_close(found, expected, tolerance: float) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        largest = float(np.abs(theirs).max())
        assert largest > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)


def split(model):
    """Factors, keys, base, biases: the narrower type first."""
    return nnx.split(model, nnx.LoRAParam, DropoutKey, nnx.Param, RouterBias)


# --- which modules, and how they start ------------------------------------------------------------

DENSE_NAMES = {
    *(f"layers.self_attn.{name}_proj" for name in "qkvo"),
    *(f"layers.mlp.{name}_proj" for name in ("gate", "up", "down")),
}
MOONLIGHT_NAMES = {
    *(
        f"{place}.self_attn.{name}_proj"
        for place in ("first_layers.0", "layers")
        for name in ("q", "kv_a", "kv_b", "o")
    ),
    *(
        f"{place}.{name}_proj"
        for place in ("first_layers.0.mlp", "layers.mlp.shared_experts")
        for name in ("gate", "up", "down")
    ),
}


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("dense", "all-linear", DENSE_NAMES),
        ("moonlight", "all-linear", MOONLIGHT_NAMES),
        ("moonlight", ("all-linear", "experts"), MOONLIGHT_NAMES | {"layers.mlp.experts"}),
        ("dense", ("v_proj", "mlp.up_proj"), {"layers.self_attn.v_proj", "layers.mlp.up_proj"}),
        (
            "moonlight",
            ["kv_a_proj_with_mqa", "shared_experts.up_proj"],
            {
                "first_layers.0.self_attn.kv_a_proj",
                "layers.self_attn.kv_a_proj",
                "layers.mlp.shared_experts.up_proj",
            },
        ),
    ],
)
def test_targets_by_architecture_and_by_name(family: str, targets, names: set[str]):
    def build():
        model = lora_toy.make_plain(lora_toy.FAMILIES[family])
        found.update(add_lora(model, config_for(family, target_modules=targets), nnx.Rngs(1)))
        return model

    found: set[str] = set()
    model = nnx.eval_shape(build)
    assert found == names == {path for path, _ in adapted_modules(model)}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "dense",
            ("q_proj", "qproj"),
            "named 'qproj'; there are all-linear, down_proj, gate",
        ),
        ("dense", "experts", "no module is named 'experts'"),
        ("dense", "lm_head", r"named 'lm_head' \(the head has no adapters"),
        ("moonlight", "router", r"named 'router' \(the router has no adapters"),
        ("moonlight", "mlp.gate", r"named 'mlp.gate' \(the router has no adapters"),
        ("moonlight", "embed_tokens", r"named 'embed_tokens' \(the embedding has"),
        ("moonlight", (), "target_modules is empty: name some of down_proj, experts"),
    ],
)
def test_names_that_fit_no_module_are_refused(family: str, targets, message: str):
    config = config_for(family, target_modules=targets)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(
            lambda: add_lora(lora_toy.make_plain(lora_toy.FAMILIES[family]), config, nnx.Rngs(1))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.5}, "rank must be a positive integer, got 2.5"),
        ({"alpha": -1.0}, "alpha must be a positive number, got -1.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


def test_adapters_are_refused_twice_and_experts_with_dropout():
    model = lora_toy.make_plain(lora_toy.MOONLIGHT)
    with pytest.raises(ValueError, match=r"dropout is 0.1, and experts are among the targets"):
        add_lora(model, config_for("moonlight", dropout=0.1), nnx.Rngs(1))
    assert not has_adapters(model)
    add_lora(model, config_for("moonlight"), nnx.Rngs(1))
    with pytest.raises(ValueError, match="has adapters already: merge them first"):
        add_lora(model, config_for("moonlight"), nnx.Rngs(1))


@pytest.mark.parametrize("family", lora_toy.FAMILIES)
def test_adapters_start_as_pefts_and_change_nothing(family: str):
    model = lora_toy.make_plain(lora_toy.FAMILIES[family])
    before, size = model(TOKENS)[0], count_parameters(model).total
    add_lora(model, config_for(family), nnx.Rngs(1))
    np.testing.assert_array_equal(model(TOKENS)[0], before)
    adapters = nnx.to_flat_state(split(model)[1])
    assert count_parameters(model).total == size + sum(leaf.size for _, leaf in adapters)
    seen = []
    for path, leaf in adapters:
        value = np.asarray(leaf[...])
        if path[-1].endswith("lora_b"):
            assert not value.any() and value.shape[-2] == 4
            continue
        bound = value.shape[-2] ** -0.5
        assert value.shape[-1] == 4
        # Of at least 80 uniform draws.
        assert 0.9 * bound < np.abs(value).max() <= bound
        assert abs(value.std() * 3**0.5 / bound - 1) < 0.2
        seen += list(value.reshape(-1, *value.shape[-2:]))
    for one, other in itertools.combinations(seen, 2):
        assert one.shape != other.shape or not np.array_equal(one, other)


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "experts"), [("dense", "dense"), ("moonlight", "ragged")])
def test_gradients_are_those_of_a_matrix_merged_by_hand(family: str, experts):
    config = config_for(family)
    model = lora_toy.make(lora_toy.FAMILIES[family], Execution(experts=experts), config)
    graphdef, factors, keys, base, bias = split(model)
    assert not jax.tree.leaves(keys)

    def with_adapters(factors):
        return next_token_loss(nnx.merge(graphdef, factors, keys, base, bias), TOKENS)[0]

    def by_hand(factors):
        model = nnx.merge(graphdef, factors, keys, base, bias)
        plain = lora_toy.make_plain(lora_toy.FAMILIES[family], Execution(experts=experts))
        nnx.update(plain, base, bias)
        plain_modules = dict(nnx.iter_modules(plain))
        for path, module in nnx.iter_modules(model):
            if isinstance(module, Linear) and module.lora_a is not None:
                product = jnp.einsum("...ir,...ro->...io", module.lora_a[...], module.lora_b[...])
                plain_modules[path].kernel[...] += 0.5 * product
            if isinstance(module, Experts):
                for name in EXPERT_STACKS:
                    a, b = (getattr(module, f"{name}_lora_{factor}")[...] for factor in "ab")
                    getattr(plain_modules[path], name)[...] += 0.5 * jnp.matmul(a, b)
        return next_token_loss(plain, TOKENS)[0]

    run = [
        jax.jit(jax.value_and_grad(fn), compiler_options=lora_toy.OPTIONS)(factors)
        for fn in (with_adapters, by_hand)
    ]
    assert abs(float(run[0][0] - run[1][0])) < LOSS_TOLERANCE
    assert_close(run[0][1], run[1][1], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("family", lora_toy.FAMILIES)
def test_merging_changes_no_digit_and_leaves_the_model_as_it_was(family: str):
    model = lora_toy.make(lora_toy.FAMILIES[family], lora=config_for(family))
    model.eval()
    logits = model(TOKENS)[0]
    plain = merged(model)
    assert has_adapters(model) and not has_adapters(plain)
    graphdef, _ = nnx.split(lora_toy.make_plain(lora_toy.FAMILIES[family]))
    assert nnx.graphdef(plain) == graphdef
    assert_close(plain(TOKENS)[0], logits, LOGITS_TOLERANCE)
    np.testing.assert_array_equal(model(TOKENS)[0], logits)
    base = nnx.merge(graphdef, *split(model)[3:])
    assert np.abs(base(TOKENS)[0] - logits).max() > ADAPTERS_SHOW
    # Whoever exports a model with adapters gets no base by accident.
    assert merged(plain).layers.self_attn.q_proj.kernel is not None


def test_an_export_refuses_adapters(tmp_path):
    model = lora_toy.make(lora_toy.MOONLIGHT, lora=config_for("moonlight"))
    _, params, bias = nnx.split(model, nnx.Param, RouterBias)
    with pytest.raises(ValueError, match=r"lora_a has no place in .* merge adapters into"):
        export_pretrained(tmp_path / "hf", lora_toy.MOONLIGHT, params, bias)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("dense", "k_proj"), ("moonlight", "kv_b_proj"), ("moonlight", "experts")],
)
def test_decoding_reads_adapters_whoever_reads_the_kernel(family: str, targets: str):
    config = config_for(family, target_modules=targets)
    model = lora_toy.make(lora_toy.FAMILIES[family], lora=config)
    whole = model(TOKENS)[0]
    act_nd, _ = model.decode(TOKENS, model.init_cache(8, 13), jnp.zeros(8, jnp.int32))
    assert_close(model.logits(act_nd).reshape(whole.shape), whole, LOGITS_TOLERANCE)


# --- dropout --------------------------------------------------------------------------------------


def masks(keys: nnx.State, graphdef: nnx.GraphDef, rest: nnx.State) -> np.ndarray:
    """What each layer of a stack, its factors the identity, keeps of ones: `[layers, n, in]`."""
    layers = nnx.merge(graphdef, keys, rest)

    def run(layer, carry, _):
        return carry, layer(jnp.ones((64, 16)))

    return np.asarray(scan_layers(layers, run, None, None, Execution())[1])


def test_masks_differ_by_layer_by_step_and_by_micro_batch():
    layers = stack_layers(lambda rngs: Linear(16, 16, stddev=0.0, rngs=rngs), 3, nnx.Rngs(0))
    eye = jnp.broadcast_to(jnp.eye(16), (3, 16, 16))
    layers.lora_a, layers.lora_b = nnx.LoRAParam(eye), nnx.LoRAParam(eye)
    key = jax.random.key_data(jax.random.split(jax.random.key(3), 3))
    layers.lora_key = DropoutKey(key)
    layers.lora_scale, layers.lora_dropout, layers.deterministic = 1.0, 0.25, False
    graphdef, keys, rest = nnx.split(layers, DropoutKey, ...)
    drawn = [
        masks(folded(folded(keys, step), micro), graphdef, rest)
        for step, micro in ((0, 0), (0, 1), (1, 0))
    ]
    kept = np.concatenate(drawn)
    assert {*np.unique(kept)} == {0.0, np.float32(1 / 0.75)}
    # The standard deviation of a mask's mean is 0.014.
    np.testing.assert_allclose((kept > 0).mean(axis=(1, 2)), 0.75, atol=0.06)
    for one, other in itertools.combinations(kept, 2):
        assert 0.2 < ((one > 0) != (other > 0)).mean() < 0.55
    np.testing.assert_array_equal(masks(folded(folded(keys, 1), 0), graphdef, rest), drawn[2])
    layers.eval()
    graphdef, keys, rest = nnx.split(layers, DropoutKey, ...)
    assert (masks(keys, graphdef, rest) == 1).all()


def test_a_model_drops_in_training_and_nowhere_else():
    model = lora_toy.make(lora_toy.DENSE, lora=config_for("dense", dropout=0.5))
    dropped = model(TOKENS)[0]
    with pytest.raises(ValueError, match=r"adapters of layers\S* drop inputs, as in training"):
        model.decode(TOKENS, model.init_cache(8, 13), jnp.zeros(8, jnp.int32))
    plain = merged(model)
    model.eval()
    kept = model(TOKENS)[0]
    assert np.abs(dropped - kept).max() > ADAPTERS_SHOW
    assert_close(plain(TOKENS)[0], kept, LOGITS_TOLERANCE)
    model.train()
    np.testing.assert_array_equal(model(TOKENS)[0], dropped)


def test_every_module_and_layer_has_a_key_of_its_own():
    model = lora_toy.make_plain(lora_toy.MOONLIGHT)
    add_lora(model, config_for("moonlight", dropout=0.1, target_modules="all-linear"), nnx.Rngs(1))
    keys = [np.asarray(leaf).reshape(-1, 2) for leaf in jax.tree.leaves(split(model)[2])]
    found = {tuple(key) for key in np.concatenate(keys)}
    # Seven modules in each of three layers, the MLP of two being the shared experts'.
    assert len(found) == len(np.concatenate(keys)) == 21


# --- training, on one device and on a mesh --------------------------------------------------------


def test_a_factor_lies_as_its_side_of_the_matrix():
    where = ModelSharding(make_mesh("fsdp=2,expert=2,tensor=2"))
    assert where.param_spec(("q_proj", "lora_a"), (2, 32, 4)) == P(None, "fsdp", None)
    assert where.param_spec(("q_proj", "lora_b"), (2, 4, 40)) == P(None, None, "tensor")
    assert where.param_spec(("down_proj", "lora_a"), (36, 4)) == P("tensor", None)
    assert where.param_spec(("down_proj", "lora_b"), (4, 32)) == P(None, "fsdp")
    pair = [("experts", f"gate_proj_lora_{factor}") for factor in "ab"]
    assert where.param_spec(pair[0], (2, 4, 32, 4)) == P(None, "expert", "fsdp", None)
    assert where.param_spec(pair[1], (2, 4, 4, 20)) == P(None, "expert", None, "tensor")


def loss_and_grads(family: str, execution: Execution, config: LoraConfig):
    where = execution.sharding
    model = lora_toy.make(lora_toy.FAMILIES[family], execution, config)
    graphdef, factors, *frozen = split(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(factors):
        assert leaf.sharding.is_equivalent_to(
            where.place(*where.param_spec(path, leaf.shape)), leaf.ndim
        )

    def loss_fn(factors, tokens_bt):
        return next_token_loss(nnx.merge(graphdef, factors, *frozen), tokens_bt)[0]

    tokens = jax.device_put(TOKENS, where.place(BATCH_AXES))
    run = jax.jit(jax.value_and_grad(loss_fn), compiler_options=lora_toy.OPTIONS)
    plain = merged(model)
    return run(factors, tokens), jax.tree.map(np.asarray, nnx.state(plain, nnx.Param))


@pytest.mark.parametrize(
    ("family", "mesh", "run"),
    [
        ("dense", "data=2,fsdp=2,tensor=2", {"remat": True}),
        ("moonlight", "fsdp=2,expert=2,tensor=2", {"experts": "ragged"}),
    ],
    ids=str,
)
def test_a_mesh_computes_what_one_device_does(family: str, mesh: str, run: dict):
    """Dropout included, which experts' pairs have not."""
    changes = {} if "experts" in run else {"dropout": 0.25}
    config = config_for(family, **changes)
    one = loss_and_grads(family, Execution(), config)
    there = loss_and_grads(
        family, Execution(sharding=ModelSharding(make_mesh(mesh)), **run), config
    )
    assert abs(float(one[0][0]) - float(there[0][0])) < LOSS_TOLERANCE
    assert_close(there, one, GRADIENT_TOLERANCE)


def test_only_factors_are_trained():
    model = lora_toy.make(lora_toy.MOONLIGHT, lora=config_for("moonlight"))
    graphdef, factors, *frozen = split(model)
    optimizer = muon(1e-2)
    state = optimizer.init(factors)
    paths = nnx.to_flat_state(factors).paths
    assert all(path[-1].endswith(("lora_a", "lora_b")) for path in paths)
    assert nnx.to_flat_state(nnx.state(model, trainable("lora"))).paths == paths

    @jax.jit
    def step(factors, state):
        def loss_fn(factors):
            return next_token_loss(nnx.merge(graphdef, factors, *frozen), TOKENS)[0]

        loss, grads = jax.value_and_grad(loss_fn)(factors)
        updates, state = optimizer.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    losses = []
    for _ in range(4):
        factors, state, loss = step(factors, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(ValueError, match=r'tuner_type must be "lora" or "full", got \'dora\''):
        trainable("dora")
