"""Names propose, the shapes beside them decide; what raises says what to write for all of it."""

import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

import muon_jax
from muon_jax import by_path, muon, routing_report
from muon_jax._common.paths import show
from muon_jax._routing.remedies import pattern_for
from muon_jax._routing.route_leaves import route_leaves


def tree(**leaves):
    return {
        path.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in leaves.items()
    }


def found(params, rules=None, **options):
    """The matrices of each leaf; None for AdamW."""
    routes, _ = route_leaves(params, rules, **options)
    return {show(r.path): r.views[0].matrices if r.views else None for r in routes}


def message_of(params, **options):
    with pytest.raises(ValueError, match="cannot be known") as error:
        route_leaves(params, **options)
    return str(error.value)


def pasted(message):
    code = message.split("muon_weight_dimension_numbers=", 1)[1].split(")\nIf you give rules", 1)[0]
    return eval(code, {"muon_jax": muon_jax})


# --- attention ------------------------------------------------------------------------------


def test_cross_attention_reads_keys_and_values_of_another_width():
    params = tree(
        a__query__kernel=(8, 4, 6),
        a__key__kernel=(10, 2, 6),
        a__value__kernel=(10, 2, 6),
        a__out__kernel=(4, 6, 8),
    )
    assert found(params) == {
        "a/query/kernel": (1, 8, 24),
        "a/key/kernel": (1, 10, 12),
        "a/value/kernel": (1, 10, 12),
        "a/out/kernel": (1, 24, 8),
    }


def test_values_may_be_of_another_width_than_queries_and_keys():
    params = tree(a__wq=(8, 4, 6), a__wk=(8, 4, 6), a__wv=(8, 4, 3), a__wo=(4, 3, 8))
    assert found(params) == {
        "a/wq": (1, 8, 24),
        "a/wk": (1, 8, 24),
        "a/wv": (1, 8, 12),
        "a/wo": (1, 12, 8),
    }


def test_a_bias_of_the_heads_is_evidence():
    assert found(tree(a__query__kernel=(8, 4, 6), a__query__bias=(4, 6))) == {
        "a/query/kernel": (1, 8, 24),
        "a/query/bias": None,
    }
    assert found(tree(a__wq=(8, 4, 6), a__bq=(4, 6)))["a/wq"] == (1, 8, 24)
    assert found(tree(a__out__kernel=(4, 6, 8), a__out__bias=(8,)))["a/out/kernel"] == (1, 24, 8)
    # Twelve biases of twelve layers are none.
    message_of(tree(a__query__kernel=(3, 8, 8), a__query__bias=(3, 8)))
    message_of(tree(a__out__kernel=(3, 8, 8), a__out__bias=(3, 8)))


def test_latent_attention_needs_the_compressed_width_beside_it():
    params = tree(
        a__wq_a__kernel=(16, 6), a__wq_b__kernel=(6, 4, 5), a__wkv_b__kernel=(5, 4, 7),
        a__wkv_a__kernel=(16, 8), a__out__kernel=(4, 3, 16),
    )  # fmt: skip
    assert found(params)["a/wq_b/kernel"] == (1, 6, 20)
    assert found(params)["a/wkv_b/kernel"] == (1, 5, 28)
    assert found(params)["a/out/kernel"] == (1, 12, 16)
    assert found(params, heads="per_head")["a/wq_b/kernel"] == (4, 6, 5)
    del params["a/wq_a/kernel"], params["a/wkv_a/kernel"]
    assert "3 parameter(s)" in message_of(params)


@pytest.mark.parametrize(
    "shapes",
    [
        {"a__wq": (8, 4, 6)},
        {"a__wo": (4, 6, 8)},
        {"a__wq": (8, 8, 8), "a__wo": (8, 8, 8)},
        {"a__wq": (8, 4, 6), "a__wo": (4, 6, 9)},
        {"a__wq": (8, 4, 6), "b__wo": (4, 6, 8)},
        {"a__wk": (8, 4, 6), "a__wo": (4, 6, 8)},
    ],
)
def test_what_does_not_agree_raises(shapes):
    assert f"{len(shapes)} parameter(s)" in message_of(tree(**shapes))


def test_keys_that_do_not_divide_the_queries_raise_alone():
    message = message_of(tree(a__wq=(8, 4, 6), a__wk=(8, 3, 6), a__wv=(8, 4, 6), a__wo=(4, 6, 8)))
    assert "1 parameter(s)" in message
    assert "a/wk, shape (8, 3, 6)" in message


# --- stacks ---------------------------------------------------------------------------------


def test_plain_projections_in_a_stack_are_its_matrices():
    """Flax's names with three axes could be one attention, but its own projections say no."""
    names = ("query", "key", "value", "out")
    params = tree(**{f"layers__a__{name}__kernel": (3, 8, 8) for name in names})
    params |= tree(layers__mlp__up__kernel=(3, 8, 32))
    assert set(found(params).values()) == {(3, 8, 8), (3, 8, 32)}


def test_a_stack_as_long_as_a_width_is_doubted():
    params = tree(layers__wq=(64, 3, 64), layers__wi=(64, 3, 96), layers__ln=(64, 3))
    rules = pasted(message_of(params))
    assert found(params, rules) == {
        "layers/wq": (3, 64, 64),
        "layers/wi": (3, 64, 96),
        "layers/ln": None,
    }
    # Twelve layers of twelve heads are no doubt.
    attention = {
        "layers__a__query__kernel": (12, 48, 12, 4),
        "layers__a__out__kernel": (12, 12, 4, 48),
        "layers__ln": (12, 48),
    }
    assert found(tree(**attention))["layers/a/query/kernel"] == (12, 48, 48)


def test_vectors_beside_a_declared_stack_stay_vectors():
    params = tree(w1=(3, 8, 32), w2=(3, 32, 8), shift=(3, 8), embed=(50, 8))
    rules = by_path({"w": Dims(-2, -1)})
    assert found(params, rules)["shift"] is None
    # What goes to AdamW, or lies in no stack, is no evidence of one.
    other = tree(table=(50, 4, 2), shift=(50, 8))
    assert found(other, by_path({"table": None}))["shift"] == (1, 50, 8)
    assert found(other, by_path({"table": Dims(0, (1, 2))}))["shift"] == (1, 50, 8)


def test_a_router_beside_its_experts_is_no_vector():
    params = tree(ffn__w1=(4, 8, 32), ffn__w2=(4, 32, 8), ffn__router=(4, 8))
    assert found(params, pasted(message_of(params)))["ffn/router"] == (1, 4, 8)


# --- the error ------------------------------------------------------------------------------


def test_one_pattern_covers_all_convolutions_of_a_model():
    params = tree(
        **{
            f"features__block{i}__{j}__conv__weight": (64, 32, 3, 3)
            for i in range(4)
            for j in range(29)
        },
        features__norm__weight=(64,),
        classifier__weight=(10, 64),
    )
    message = message_of(params)
    assert "116 parameter(s)" in message
    assert "(116 of them)" in message
    assert len(message) < 1200
    rules = pasted(message)
    assert len(rules.rules) == 1
    routes = found(params, rules)
    assert routes["features/block3/28/conv/weight"] == (1, 288, 64)
    assert routes["classifier/weight"] is None


def test_while_something_raises_what_was_read_by_name_is_listed():
    attention = {"a__wq": (8, 4, 6), "a__wo": (4, 6, 8)}
    message = message_of(tree(**attention, b__mixer=(2, 3, 5), conv__kernel=(3, 3, 4, 8)))
    read = message.split("Read by name and shape")[1]
    assert re.search(r"a/wq, shape \(8, 4, 6\): attention", read)
    assert re.search(r"a/wo, shape \(4, 6, 8\): attention", read)
    assert re.search(r"conv/kernel, shape \(3, 3, 4, 8\): convolution", read)
    assert "Read by name" not in message_of(tree(b__mixer=(2, 3, 5)))


def test_each_kind_has_a_remedy_of_its_own():
    params = tree(
        embed__embedding=(100, 16),
        a__conv__weight=(32, 16, 3, 3),
        a__memory=(1, 4, 16),
        a__attn__q_einsum__w=(4, 16, 8),
        a__attn__attn_vec_einsum__w=(4, 8, 16),
        b__mixer=(2, 3, 5),
    )
    message = message_of(params)
    assert dict(pasted(message).rules) == {
        r"(^|[/.])conv/weight$": Dims((1, 2, 3), 0),
        r"(^|[/.])memory$": None,
        r"(^|[/.])q_einsum/w$": Dims(1, (0, 2)),
        r"(^|[/.])attn_vec_einsum/w$": Dims((0, 1), 2),
        r"(^|[/.])mixer$": Dims(-2, -1),
    }
    per_head = pasted(message_of(params, heads="per_head"))
    assert found(params, per_head, heads="per_head")["a/attn/q_einsum/w"] == (4, 16, 8)


def test_a_pattern_finds_its_paths_and_no_others():
    paths = ["a/conv1/kernel", "b/conv2/kernel"]
    assert pattern_for(paths, ["a/dense/kernel"]) == r"(^|[/.])conv\d+/kernel$"
    assert pattern_for(["a/0/w"], ["b/0/w"]) == r"^a/\d+/w$"
    # A generic name alone would find every layer that is added later.
    assert pattern_for(["x/a/kernel", "y/a/kernel"], []) == r"(^|[/.])a/kernel$"
    assert pattern_for(["b/a/w"], ["a/w"]) == r"^b/a/w$"
    assert pattern_for(["mixer"], []) == "^mixer$"
    # Only their numbers tell these apart.
    pattern = pattern_for(["a/0/w", "x.y"], ["a/1/w"])
    assert re.search(pattern, "a/0/w")
    assert re.search(pattern, "x.y")
    assert not re.search(pattern, "a/1/w")
    assert not re.search(pattern, "xzy")


# --- the warning ----------------------------------------------------------------------------


TABLES = {
    "rows": jnp.ones((400, 4)),
    "mixing": jnp.ones((4, 200)),
    "w": jnp.ones((8, 16)),
    "proj": {"kernel": jnp.ones((400, 4))},
}


@pytest.mark.parametrize("wrap", [lambda init: init, jax.jit])
def test_init_warns_once_of_assumed_matrices_that_look_like_tables(wrap):
    with pytest.warns(UserWarning, match="look like tables") as caught:
        state = wrap(muon(1e-3).init)(TABLES)
    (warning,) = caught
    assert "2 parameter(s)" in str(warning.message)
    assert "rows (400, 4)" in str(warning.message)
    assert "mixing (4, 200)" in str(warning.message)
    code = re.search(r"muon_weight_dimension_numbers=(.*?), or,", str(warning.message)).group(1)
    rules = eval(code, {"muon_jax": muon_jax})
    assert found(TABLES, rules) == {
        "rows": None,
        "mixing": None,
        "w": (1, 8, 16),
        "proj/kernel": (1, 400, 4),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        muon(1e-3, muon_weight_dimension_numbers=rules).init(TABLES)
        jax.eval_shape(muon(1e-3).update, TABLES, state, TABLES)


def test_the_report_marks_what_looks_like_a_table():
    rows = {row.path: row.reason for row in routing_report(TABLES).rows}
    assert rows["rows"] == "assumed matrix, maybe a table"
    assert rows["w"] == "assumed matrix"
    assert rows["proj/kernel"] == "linear kernel"
