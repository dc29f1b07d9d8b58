"""Which leaf is a matrix, along which axes; what cannot be known raises and says what to write."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from optax.contrib import MuonDimensionNumbers as Dims

import muon_jax
from muon_jax import FusedBlocks, by_path, muon, routing_report
from muon_jax._common.paths import flatten_with_names, show
from muon_jax._routing.route_leaves import route_leaves


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nest(path, leaf):
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def matrices(path, shape, beside=(), **options):
    """The matrices of one leaf; empty for AdamW. `beside` are paths and shapes of others."""
    params = {path: struct(*shape)} | {other: struct(*axes) for other, axes in beside}
    params = params if beside else nest(path, struct(*shape))
    routes, _ = route_leaves(params, **options)
    (route,) = (route for route in routes if show(route.path) == path)
    return [view.matrices for view in route.views] if route.views else []


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("embed/embedding", (100, 8)),
        ("Embed_0/embedding", (100, 8)),
        ("token_embedder/embedding", (100, 8)),
        ("model/embed_tokens/weight", (100, 8)),
        ("wte/weight", (100, 8)),
        ("pos_embedding", (1, 16, 8)),
        ("lm_head/kernel", (8, 100)),
        ("head/kernel", (8, 10)),
        ("logits_dense/kernel", (8, 100)),
        ("unembed", (8, 100)),
        ("LayerNorm_0/scale", (8,)),
        ("layers/norm/scale", (4, 8)),
        ("layers/input_layernorm/weight", (4, 8)),
        ("kv_a_layernorm/scale", (8,)),
        ("blocks/ln_1/weight", (4, 8)),
        ("attn/query/bias", (4, 16)),
        ("layers/attn/query/bias", (2, 4, 16)),
        ("attn/bq", (4, 16)),
        ("classification_head/kernel", (8, 100)),
        ("lm_head/linear/kernel", (8, 100)),
        ("heads/0/weight", (8, 100)),
        ("tok_emb", (100, 8)),
        ("positional_encoding", (64, 8)),
        ("cls_token", (1, 1, 8)),
        ("attn/sinks", (2, 8)),
        ("router/e_score_correction_bias", (8, 8)),
        ("temperature", ()),
        ("anything", (8,)),
        ("dw_conv/kernel", (3, 1, 8)),
        ("Conv_0/kernel", (3, 3, 1, 8)),
        ("mixer/conv1d/weight", (4, 8)),
        ("proj/kernel", (1, 8)),
        ("proj/kernel", (8, 1)),
        ("layers/0/experts/up", (4, 8, 1)),
        ("proj/kernel", (0, 8)),
    ],
)
def test_goes_to_adamw(path, shape):
    assert matrices(path, shape) == []


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("mlp/up/kernel", (8, 32), (1, 8, 32)),
        ("anything", (8, 32), (1, 8, 32)),
        ("head/mlp/kernel", (8, 32), (1, 8, 32)),
        ("multi_head_attention/o_proj/kernel", (8, 8), (1, 8, 8)),
        ("shared_experts/up_proj/kernel", (8, 32), (1, 8, 32)),
        ("router/kernel", (8, 4), (1, 8, 4)),
        ("b/kernel", (8, 4), (1, 8, 4)),
        ("scale/w", (8, 4), (1, 8, 4)),
        ("layers/attn/q_proj/kernel", (3, 8, 24), (3, 8, 24)),
        ("Conv_0/kernel", (3, 3, 4, 8), (1, 36, 8)),
        ("convert/kernel", (64, 64), (1, 64, 64)),
        ("conv_proj/kernel", (64, 64), (1, 64, 64)),
        ("layers/conv/kernel", (2, 3, 4, 8), (2, 12, 8)),
        ("lora/b", (8, 64), (1, 8, 64)),
        ("stem/conv_in/kernel", (5, 4, 8), (1, 20, 8)),
        ("experts/gate_proj", (6, 8, 32), (6, 8, 32)),
        ("layers/2/mlp/experts/down_proj", (6, 32, 8), (6, 32, 8)),
        ("layers/mlp/experts/down_proj", (2, 6, 32, 8), (12, 32, 8)),
        ("layers/mlp/shared_experts/up/kernel", (2, 8, 32), (2, 8, 32)),
        ("MoeBlock_0/wo", (6, 32, 8), (6, 32, 8)),
        ("blocks/mlp/kernel", (3, 8, 32), (3, 8, 32)),
    ],
)
def test_is_a_matrix_along_the_right_axes(path, shape, expected):
    assert matrices(path, shape) == [expected]


ATTENTION = {
    "query/kernel": (8, 4, 6),
    "key/kernel": (8, 2, 6),
    "value/kernel": (8, 2, 6),
    "out/kernel": (4, 6, 8),
}
JOINT = {"query": (1, 8, 24), "key": (1, 8, 12), "value": (1, 8, 12), "out": (1, 24, 8)}
EACH = {"query": (4, 8, 6), "key": (2, 8, 6), "value": (2, 8, 6), "out": (4, 6, 8)}


@pytest.mark.parametrize("module", ["attn", "moe_block/attn", "layers/0/attn", "layers/attn"])
@pytest.mark.parametrize(("heads", "expected"), [("joint", JOINT), ("per_head", EACH)])
def test_attention_is_read_where_its_projections_agree(module, heads, expected):
    layers = (3,) if module == "layers/attn" else ()
    params = {f"{module}/{name}": struct(*layers, *shape) for name, shape in ATTENTION.items()}
    params[f"{module}/query/bias"] = struct(*layers, 4, 6)
    routes, _ = route_leaves(params, heads=heads)
    assert {show(r.path).split("/")[-2]: r.views[0].matrices for r in routes if r.views} == {
        name: (batch * (3 if layers else 1), fan_in, fan_out)
        for name, (batch, fan_in, fan_out) in expected.items()
    }


def test_a_dense_kernel_needs_no_evidence_in_any_heads():
    assert matrices("mlp/up/kernel", (8, 32), heads="per_head") == [(1, 8, 32)]


def test_flat_trees_hold_whole_paths_in_one_key():
    flat = {
        "model.embed_tokens.weight": struct(20, 8),
        "model.layers.0.mlp.up_proj.weight": struct(8, 32),
        "layers/0/experts/up_proj": struct(4, 8, 32),
        "stack/attn/query/kernel": struct(3, 8, 2, 4),
        "stack/attn/out/kernel": struct(3, 2, 4, 8),
    }
    assert groups(flat) == {
        "model.embed_tokens.weight": "adam",
        "model.layers.0.mlp.up_proj.weight": "muon",
        "layers/0/experts/up_proj": "muon",
        "stack/attn/query/kernel": "muon",
        "stack/attn/out/kernel": "muon",
    }


@pytest.mark.parametrize(
    ("path", "shape", "why"),
    [
        ("mixer/kernel", (2, 3, 4), "its names are not in the table"),
        ("layers/0/mixer/kernel", (2, 3, 4), "its names are not in the table"),
        ("layers/attn/qkv/kernel", (2, 8, 3, 4, 6), "its names are not in the table"),
        ("layers/attn/query/kernel", (2, 8, 24), "or a stack of plain matrices under 'layers'"),
        ("h/attn/c_attn/kernel", (8, 3, 8), "its names are not in the table"),
        ("moe_block/attn/mixer/kernel", (8, 2, 4), "its names are not in the table"),
        ("conv/weight", (8, 4, 3), "only Flax's convolution layout"),
    ],
)
def test_what_cannot_be_known_raises(path, shape, why):
    with pytest.raises(ValueError, match=why) as error:
        matrices(path, shape)
    assert path in str(error.value)
    assert str(shape) in str(error.value)
    assert "by_path" in str(error.value)


def stack_groups(**leaves):
    params = {}
    for path, shape in leaves.items():
        params[path.replace("__", "/")] = struct(*shape)
    routes, _ = route_leaves(params)
    return {show(r.path).split("/", 1)[1]: r.views[0].matrices if r.views else () for r in routes}


def test_a_stack_is_believed_with_evidence():
    assert stack_groups(
        layers__mlp__w1=(3, 8, 32), layers__mlp__b1=(3, 32), layers__rms__w=(3, 8)
    ) == {"mlp/w1": (3, 8, 32), "mlp/b1": (), "rms/w": ()}
    assert stack_groups(
        layers__norm__scale=(2, 8), layers__experts__up=(2, 4, 8, 16), layers__q_proj=(2, 8, 8)
    ) == {"norm/scale": (), "experts/up": (8, 8, 16), "q_proj": (2, 8, 8)}
    # A plain module called "blocks", holding one block.
    assert stack_groups(
        blocks__attn__wq=(8, 2, 4), blocks__attn__wo=(2, 4, 8), blocks__mlp__up=(8, 32)
    ) == {"attn/wq": (1, 8, 8), "attn/wo": (1, 8, 8), "mlp/up": (1, 8, 32)}


def test_a_stack_along_another_axis_raises():
    # MaxText's default: the layers lie along axis 1.
    with pytest.raises(ValueError, match="2 parameter"):
        stack_groups(layers__mlp__wi=(8, 3, 32), layers__mlp__wo_mlp=(32, 3, 8))


def test_square_experts_without_a_stack_are_matrices():
    shared = {f"shared_experts__{name}": (8, 8) for name in ("up", "gate", "down")}
    assert set(stack_groups(**shared).values()) == {(1, 8, 8)}


def test_the_router_of_an_moe_module_is_no_stack():
    assert stack_groups(
        MoeBlock_0__gate__kernel=(8, 4), MoeBlock_0__wi=(4, 8, 32), MoeBlock_0__wo=(4, 32, 8)
    ) == {"gate/kernel": (1, 8, 4), "wi": (4, 8, 32), "wo": (4, 32, 8)}


def test_fused_names_are_marked_in_the_report():
    report = routing_report({"attn": {"c_attn": {"kernel": struct(8, 24)}}})
    assert report.rows[0].reason == "linear kernel, maybe fused blocks"


def test_all_unknown_leaves_are_named_at_once():
    params = {f"mixer_{i}": struct(2, 3, 4) for i in range(12)}
    with pytest.raises(ValueError, match=r"(?s)12 parameter\(s\).*mixer_0.*mixer_1.*\.\.\."):
        route_leaves(params)


@pytest.mark.parametrize("params", [jnp.ones((2, 3, 4)), {"a,b(c)": jnp.ones((2, 3, 4))}])
def test_the_remedy_in_the_error_is_the_code_to_write(params):
    with pytest.raises(ValueError, match="cannot be known") as error:
        muon(1e-3).init(params)
    code = re.search(r"muon_weight_dimension_numbers=(.*)\)\n", str(error.value)).group(1)
    muon(
        1e-3, muon_weight_dimension_numbers=eval(code, {"optax": optax, "muon_jax": muon_jax})
    ).init(params)


def test_the_line_that_the_error_says_to_write_works():
    params = {"mixer": jnp.ones((2, 3, 4))}
    rules = by_path({"mixer": Dims(reduction_axis=-2, output_axis=-1)})
    assert matrices("mixer", (2, 3, 4), dimension_numbers=rules) == [(2, 3, 4)]
    muon(1e-3, muon_weight_dimension_numbers=rules).init(params)
    with pytest.raises(ValueError, match="mixer"):
        muon(1e-3).init(params)


# --- the user's word ------------------------------------------------------------------------


def groups(params, dimension_numbers=None):
    routes, _ = route_leaves(params, dimension_numbers)
    return {show(route.path): route.optimizer for route in routes}


PARAMS = {
    "embed": {"embedding": struct(20, 8)},
    "proj": {"kernel": struct(8, 8), "bias": struct(8)},
    "mixer": struct(2, 3, 4),
}


def test_by_path_speaks_of_some_leaves_and_leaves_the_rest_to_the_table():
    rules = by_path({"embed": Dims(0, 1), "mixer": None})
    assert groups(PARAMS, rules) == {
        "embed/embedding": "muon",
        "mixer": "adam",
        "proj/bias": "adam",
        "proj/kernel": "muon",
    }


def test_the_first_pattern_found_decides():
    rules = by_path({"proj/kernel": None, "proj|mixer": Dims(-2, -1), "bias": None})
    with pytest.raises(ValueError, match="'bias' finds no path that earlier patterns left"):
        groups(PARAMS, rules)
    rules = by_path({"kernel": None, "bias": None, "proj|mixer": Dims(-2, -1)})
    assert groups(PARAMS, rules)["proj/kernel"] == "adam"


def test_a_tree_speaks_of_every_leaf_and_may_be_a_prefix():
    tree = {"embed": None, "proj": {"kernel": Dims(1, 0), "bias": None}, "mixer": Dims(1, 2)}
    assert groups(PARAMS, tree) == {
        "embed/embedding": "adam",
        "mixer": "muon",
        "proj/bias": "adam",
        "proj/kernel": "muon",
    }
    assert groups(PARAMS, lambda params: tree) == groups(PARAMS, tree)
    stack = {"experts": {"up": struct(3, 8, 4), "down": struct(3, 4, 8)}}
    assert set(groups(stack, {"experts": Dims(1, 2)}).values()) == {"muon"}
    assert groups(stack["experts"]["up"], Dims(1, 2)) == {"(the whole tree)": "muon"}


def test_reduction_and_output_axes_are_fan_in_and_fan_out():
    assert matrices("w", (8, 3), dimension_numbers=Dims(1, 0)) == [(1, 3, 8)]
    assert matrices("w", (2, 3, 4, 5), dimension_numbers=Dims((1, 3), 0)) == [(4, 15, 2)]


def test_a_declared_vector_shaped_matrix_stays_with_muon():
    assert matrices("w", (1, 8), dimension_numbers=Dims()) == [(1, 1, 8)]


@pytest.mark.parametrize(
    ("numbers", "error", "why"),
    [
        (by_path({"nowhere": None}), ValueError, "'nowhere' finds no path"),
        ({"embed": None, "proj": None}, ValueError, "says nothing of mixer"),
        ({"embed": None, "proj": None, "mixer": None, "x": Dims()}, ValueError, "speaks of x"),
        ({"embed": None, "proj": None, "mixer": "muon"}, TypeError, "has 'muon' at mixer"),
        (by_path({"mixer": Dims(0, 3)}), ValueError, "mixer, shape .*output_axis=3"),
        (by_path({"mixer": Dims(0, -3)}), ValueError, "mixer.*axis 0 is both"),
        (by_path({"mixer": Dims((0, 0), 1)}), ValueError, "mixer.*names an axis twice"),
        (by_path({"mixer": Dims((), 1)}), ValueError, "mixer.*does not name axes"),
        (by_path({"bias": Dims()}), ValueError, "proj/bias.*fewer than two axes"),
        (Dims, TypeError, "muon_weight_dimension_numbers is MuonDimensionNumbers itself; call it"),
        (by_path, TypeError, "muon_weight_dimension_numbers is by_path itself; call it"),
        (lambda params: None, TypeError, "a function, returned None, which would give all"),
        (by_path({"mixer": Dims("in", "out")}), TypeError, "mixer, .*reduction_axis='in' must be"),
        (by_path({"mixer": Dims(1, ("out",))}), TypeError, r"mixer, .*output_axis=\('out',\) must"),
        (by_path({"mixer": Dims(1.0, 2)}), TypeError, "mixer, .*axis=1.0 must be .* from -3 to 2"),
        (by_path({"mixer": Dims(None, 2)}), TypeError, "mixer, .*reduction_axis=None must be"),
    ],
)
def test_dimension_numbers_that_do_not_fit_raise(untyped, numbers, error, why):
    with pytest.raises(error, match=why):
        route_leaves(PARAMS, numbers)


@pytest.mark.parametrize(
    ("rules", "error", "why"),
    [
        ({"(": None}, ValueError, "no regular expression"),
        ({"a": (0, 1)}, TypeError, "use MuonDimensionNumbers, FusedBlocks, or None"),
        ({1: None}, ValueError, "1 is no regular expression"),
        ({b"a": None}, ValueError, "b'a' is no regular expression"),
        (["a"], TypeError, "takes a mapping from patterns to axes"),
    ],
)
def test_by_path_rejects(untyped, rules, error, why):
    with pytest.raises(error, match=why):
        by_path(rules)


@pytest.mark.parametrize(
    "empty", [{}, [], (), None, {"a": {}, "b": [None]}, FrozenDict({}), nnx.State({})]
)
def test_an_empty_tree_raises(empty):
    with pytest.raises(ValueError, match=r"without leaves.*nnx\.state"):
        muon(1e-3).init(empty)


def test_a_masked_tree_is_no_empty_tree():
    routes, _ = route_leaves({"a": optax.MaskedNode()})
    assert routes == []


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


def test_the_variables_of_a_linen_model_given_whole_raise():
    variables = BatchNormed().init(jax.random.key(0), jnp.ones((2, 3)))
    muon(1e-3).init(variables["params"])
    muon(1e-3).init({"params": variables["params"]})
    for given in (variables, {"model": variables}, FrozenDict(variables), [variables]):
        with pytest.raises(ValueError, match=r'batch_stats beside .*Pass variables\["params"\]'):
            muon(1e-3).init(given)
    # The user's own way to leave them alone.
    parted = optax.partition(
        {"train": muon(1e-3), "keep": optax.set_to_zero()},
        {"params": "train", "batch_stats": "keep"},
    )
    parted.init(variables)


class NnxBatchNormed(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def test_the_state_of_an_nnx_model_given_whole_raises():
    model = NnxBatchNormed(nnx.Rngs(0))
    for given in (model, nnx.state(model)):
        with pytest.raises(ValueError, match=r"hold norm/mean, an nnx.BatchStat.*nnx.Param"):
            muon(1e-3).init(given)
    nnx.Optimizer(model, muon(1e-3), wrt=nnx.Param)


def test_a_function_may_return_rules():
    rules = by_path({"mixer": Dims(1, 2)})
    assert groups(PARAMS, lambda params: rules) == groups(PARAMS, rules)


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (jax.random.key(0), "key<fry>, and an optimizer updates floating-point"),
        (jnp.ones((4, 4), jnp.float8_e4m3fn), "float8_e4m3fn, which is too narrow.*float32"),
        (jnp.ones(4, jnp.float8_e5m2), "float8_e5m2, which is too narrow"),
    ],
)
def test_leaves_of_other_dtypes_raise(leaf, why):
    params = {"w": jnp.ones((2, 2)), "layer": {"x": leaf}}
    for call in (muon(1e-3).init, jax.jit(muon(1e-3).init), routing_report):
        with pytest.raises(TypeError, match=f"layer/x has dtype {why}"):
            call(params)


def test_leaves_that_are_no_arrays_raise():
    with pytest.raises(TypeError, match="layer/0 is 'relu', of type str, and no array"):
        muon(1e-3).init({"layer": ["relu", jnp.ones((2, 2))]})
    with pytest.raises(TypeError, match=r"act is .*, and no array. Keep it out"):
        muon(1e-3).init({"act": jnp.tanh})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integer_leaves_raise(dtype):
    with pytest.raises(TypeError, match=f"steps/count has dtype {jnp.dtype(dtype)}.*nnx.Param"):
        muon(1e-3).init({"w": jnp.ones((2, 2)), "steps": {"count": jnp.zeros((), dtype)}})


def test_unknown_heads_raise(untyped):
    with pytest.raises(ValueError, match=r"or .per_head., or declare (.*); got .each."):
        route_leaves(PARAMS, by_path({"mixer": None}), heads="each")


# --- real modules ---------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        scan = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(11, name="lm_head")(x)


def test_linen_model_with_scanned_layers():
    shapes = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    routes, _ = route_leaves(shapes["params"])
    muon_leaves = {show(r.path): r.views[0].matrices for r in routes if r.views}
    assert muon_leaves == {
        "layers/Dense_0/kernel": (3, 32, 8),
        "layers/Dense_1/kernel": (3, 8, 32),
        "layers/MultiHeadDotProductAttention_0/key/kernel": (3, 8, 8),
        "layers/MultiHeadDotProductAttention_0/out/kernel": (3, 8, 8),
        "layers/MultiHeadDotProductAttention_0/query/kernel": (3, 8, 8),
        "layers/MultiHeadDotProductAttention_0/value/kernel": (3, 8, 8),
    }


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.lm_head = nnx.Linear(8, 11, rngs=rngs)


def test_nnx_paths_are_the_same_with_and_without_value():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    with_value, _ = route_leaves(state)
    without, _ = route_leaves(nnx.as_pure(state))
    assert with_value == without
    assert {show(r.path) for r in with_value if r.views} == {
        "attn/key/kernel",
        "attn/out/kernel",
        "attn/query/kernel",
        "attn/value/kernel",
        "conv/kernel",
        "layers/0/kernel",
        "layers/1/kernel",
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: jax.Array
    value: jax.Array


def test_a_field_called_value_beside_others_keeps_its_name():
    leaves, _ = flatten_with_names({"attn": Attention(jnp.ones((8, 2, 4)), jnp.ones((8, 2, 4)))})
    assert [path for path, _ in leaves] == [("attn", "query"), ("attn", "value")]


def test_only_an_attribute_value_is_dropped_from_paths():
    assert [path for path, _ in flatten_with_names({"attn": {"value": 1.0}})[0]] == [
        ("attn", "value")
    ]


def test_flax_trees_of_specs_match_by_path_in_init_and_update():
    model = NnxModel(nnx.Rngs(0))
    specs = {
        "embed": Dims(0, 1),
        "layers": Dims(0, 1),
        "attn": None,
        "norm": None,
        "conv": None,
        "lm_head": None,
    }
    bias_free = by_path({"layers/.*/bias": None, "layers|embed": Dims(0, 1)})
    with pytest.raises(ValueError, match=r"layers/0/bias.*fewer than two axes"):
        nnx.Optimizer(model, muon(1e-3, muon_weight_dimension_numbers=specs), wrt=nnx.Param)
    tx = muon(1e-3, muon_weight_dimension_numbers=bias_free)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
    optimizer.update(model, nnx.state(model, nnx.Param))
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a != b).any()), before["embed"], after["embed"])
    )


# --- fused blocks and the report ------------------------------------------------------------


def test_fused_blocks_are_separate_matrices():
    qkv = by_path({"qkv": FusedBlocks((8, 4, 4))})
    assert matrices("qkv", (8, 16), dimension_numbers=qkv) == [(1, 8, 8), (1, 8, 4), (1, 8, 4)]
    gate_up = by_path({"gate_up": FusedBlocks((6, 6), axis=-1, dimension_numbers=Dims(1, 2))})
    assert matrices("gate_up", (3, 8, 12), dimension_numbers=gate_up) == [(3, 8, 6), (3, 8, 6)]


def test_blocks_of_a_stack_need_its_axes():
    """Without, the stack would be read as the fan-in, and each layer's row as a matrix."""
    plain = by_path({"qkv": FusedBlocks((4, 4))})
    with pytest.raises(ValueError, match=r"qkv, shape \(4, 8, 8\): .*which of its 3 axes") as error:
        matrices("qkv", (4, 8, 8), dimension_numbers=plain)
    code = re.search(r"write (FusedBlocks\(.*\))\.$", str(error.value)).group(1)
    names = {"FusedBlocks": FusedBlocks, "MuonDimensionNumbers": Dims}
    written = by_path({"qkv": eval(code, names)})
    assert matrices("qkv", (4, 8, 8), dimension_numbers=written) == [(4, 8, 4), (4, 8, 4)]
    assert matrices("qkv", (8, 8), dimension_numbers=plain) == [(1, 8, 4), (1, 8, 4)]


def test_blocks_lie_along_the_output_axis_unless_another_is_named():
    rows = by_path({"w": FusedBlocks((2, 6), dimension_numbers=Dims(2, 1))})
    assert matrices("w", (3, 8, 5), dimension_numbers=rows) == [(3, 5, 2), (3, 5, 6)]
    joint = by_path({"w": FusedBlocks((2, 6), dimension_numbers=Dims(0, (1, 2)))})
    with pytest.raises(ValueError, match=r"w, shape .*FusedBlocks.axis must say which of .*\(1, 2"):
        matrices("w", (3, 8, 5), dimension_numbers=joint)


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (FusedBlocks((8, 4)), "add up to the length of axis 1, 16; they add up to 12"),
        (FusedBlocks(()), "must be positive"),
        (FusedBlocks((16, 0)), "must be positive"),
        (FusedBlocks((16,), axis=2), "does not name axes"),
    ],
)
def test_blocks_that_do_not_fill_the_axis_raise(blocks, why):
    with pytest.raises(ValueError, match=f"qkv, shape .*{why}"):
        matrices("qkv", (8, 16), dimension_numbers=by_path({"qkv": blocks}))


def test_blocks_on_a_batch_axis_raise():
    blocks = FusedBlocks((1, 1), axis=0, dimension_numbers=Dims(1, 2))
    with pytest.raises(ValueError, match=r"FusedBlocks.axis=0 is a batch axis"):
        matrices("qkv", (2, 8, 16), dimension_numbers=by_path({"qkv": blocks}))


def test_a_report_is_a_value_that_prints_as_a_table(capsys):
    params = {
        "embed": struct(9, 4),
        "experts": {"up": struct(3, 4, 16)},
        "qkv": struct(4, 12),
        "proj": {"kernel": struct(4, 4)},
        "gain": struct(4),
    }
    rules = by_path({"qkv": FusedBlocks((4, 8))})
    report = routing_report(params, muon_weight_dimension_numbers=rules)
    assert capsys.readouterr().out == ""
    assert repr(report) == str(report)  # what a notebook shows
    rows = {row.path: row for row in report.rows}
    assert rows["embed"].optimizer == "adam"
    assert rows["embed"].matrices == ()
    assert rows["experts/up"].matrices == ((3, 4, 16),)
    assert rows["experts/up"].scale == ("0.8",)
    assert rows["qkv"].matrices == ((1, 4, 4), (1, 4, 8))
    assert rows["qkv"].scale == ("0.4", "0.5657")
    assert rows["qkv"].reason == "declared"
    assert rows["proj/kernel"].reason == "linear kernel"
    text = str(report).splitlines()
    assert text[0].split() == ["path", "shape", "optimizer", "matrix", "batch", "scale", "because"]
    assert text[-1] == "muon: 6 matrices, 256 parameters (86.5%); adam: 40 parameters"


def test_report_marks_assumed_matrices():
    report = routing_report({"a": struct(4, 4)})
    assert report.rows[0].reason == "assumed matrix"


def test_report_agrees_with_the_optimizer_state():
    params = {"embed": jnp.ones((9, 4)), "proj": {"kernel": jnp.ones((4, 4))}}
    state = muon(1e-3).init(params)
    (momentum,) = jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu)
    assert momentum.shape == (4, 4)
    assert {row.path: row.optimizer for row in routing_report(params).rows} == {
        "embed": "adam",
        "proj/kernel": "muon",
    }
