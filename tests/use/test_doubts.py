"""What a program does not decide raises, naming the leaf and what was seen; so does misuse."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import Primitive

import muon_jax
from muon_jax import MuonDimensionNumbers, by_path, by_use, muon, routing_report
from muon_jax._routing.route_leaves import route_leaves
from tests.use.use_programs import S, arrays, data, mean_square, read, verdicts

D = 4


def head(p, x):
    return mean_square(jnp.tanh(x) @ p["head"])


def hypernetwork(p, x):
    w = jnp.einsum("nd,dk->nk", x, p["maker"]).reshape(-1, D, D)
    return head(p, jnp.einsum("nd,ndf->nf", x, p["w"][None] + w))


def by_hand(p, x):
    return head(p, (x[:, :, None] * p["w"][None]).sum(1))


def modulated(p, x):
    w = p["w"][None] * jax.nn.sigmoid(x)[:, :, None]
    return head(p, jnp.einsum("nd,ndf->nf", x, w))


def dropped(p, x):
    w = p["w"] * (x[:D] > 0)
    return head(p, x @ w)


def trained_at_test_time(p, x):
    def step(w, x):
        error = x @ w - x
        return w - 0.1 * jnp.outer(x, error), x @ w

    return head(p, lax.scan(step, p["w"], x)[1])


def fast_weights(p, x):
    gradient = jax.grad(lambda w: mean_square(x @ w - x))(p["w"])
    return head(p, x @ (p["w"] - 0.1 * gradient))


def in_tiles(p, x):
    y = sum(x[:, i : i + 2] @ p["w"][i : i + 2] for i in (0, 2))
    return head(p, y)


def scanned_tiles(p, x):
    xs = jnp.moveaxis(x.reshape(-1, 2, 2), 1, 0)
    y = lax.scan(lambda y, t: (y + t[0] @ t[1], None), x * 0, (xs, p["w"].reshape(2, 2, D)))[0]
    return head(p, y)


def column_by_column(p, x):
    return head(p, jnp.stack([x @ p["w"][:, i] for i in range(D)], axis=1))


def carried_around(p, x):
    def step(w, x):
        return jnp.concatenate([w[1:], w[:1]]), x @ w

    return head(p, lax.scan(step, p["w"], x)[1])


def symmetric(p, x):
    return head(p, x @ (p["w"] + p["w"].T))


def decomposed(p, x):
    return head(p, x @ jnp.linalg.qr(p["w"])[0])


def transformed(p, x):
    return head(p, x @ jnp.fft.fft(p["w"]).real)


def sorted_(p, x):
    return head(p, x @ jnp.sort(p["w"], axis=0))


def scattered(p, x):
    return head(p, x @ jnp.zeros((D, D)).at[jnp.array([2, 0, 1, 3])].set(p["w"]))


def summed(p, x):
    return head(p, x + p["w"].sum(0)[None])


def diagonal(p, x):
    return head(p, jnp.einsum("bi,ii->bi", x, p["w"]))


def experts_side_by_side(p, x):
    h = jnp.tanh(jnp.einsum("nd,def->nef", x, p["w"].reshape(D, 2, 2)))
    y = jnp.einsum("ned,ne->nd", jnp.einsum("nef,efd->ned", h, p["e"]), x[:, :2])
    return head(p, y)


def both_ways(p, x):
    return head(p, jnp.tanh(x @ p["w"]) @ p["w"].T)


def on_a_vector_of_parameters(p, x):
    return head(p, x + (p["v"] @ p["w"])[None])


TRAPS = {
    "hypernetwork": (hypernetwork, "by hand"),
    "by hand": (by_hand, "by hand"),
    "modulated": (modulated, "by hand"),
    "dropped": (dropped, "by hand"),
    "test-time training": (trained_at_test_time, "by hand|maybe a product|loop"),
    "fast weights": (fast_weights, "by hand"),
    "in tiles": (in_tiles, "pieces of axis 0"),
    "scanned tiles": (scanned_tiles, "axis 0 is used in tiles"),
    "column by column": (column_by_column, "column by column"),
    "carried around": (carried_around, "changes place|different ways|joined|pieces"),
    "symmetric": (symmetric, "different ways"),
    "decomposed": (decomposed, "householder_product|geqrf|qr"),
    "transformed": (transformed, "passes fft"),
    "sorted": (sorted_, "is sorted"),
    "scattered": (scattered, "written into another array by scatter"),
    "summed": (summed, "used, but in no product"),
    "diagonal": (diagonal, "used, but in no product|by hand|maybe a product"),
    "experts side by side": (experts_side_by_side, "stored side by side"),
    "both ways": (both_ways, "different ways"),
    "on a vector": (on_a_vector_of_parameters, "vector of parameters only"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_raises_and_names_the_leaf(name):
    loss, seen = TRAPS[name]
    params = arrays(w=(D, D), head=(D, 3), maker=(D, D * D), v=(D,), e=(2, 2, D))
    with pytest.raises(ValueError, match=rf"w, shape \(4, 4\): .*({seen})"):
        by_use(loss, params, data(6, D), declared=by_path({"^(maker|e)$": None}))


@pytest.mark.parametrize("how", ["set", "add", "multiply", "min", "max"])
def test_a_parameter_that_is_written_into_raises(how):
    def loss(p, x):
        return head(p, x @ getattr(p["w"].at[jnp.array([0, 2])], how)(2.0))

    with pytest.raises(ValueError, match=r"w, shape .*is written into another array by scatter"):
        by_use(loss, arrays(w=(D, D), head=(D, 3)), data(6, D))


def test_products_of_parameters_raise_for_both_and_low_rank_terms_on_activations_do_not():
    params = arrays(w=(D, D), a=(D, 2), b=(2, D), head=(D, 3))
    with pytest.raises(ValueError, match=r"(?s)2 parameter.*a, .*another parameter.*b, "):
        by_use(lambda p, x: head(p, x @ (p["w"] + p["a"] @ p["b"])), params, data(6, D))
    found = read(lambda p, x: head(p, x @ p["w"] + x @ p["a"] @ p["b"]), params, data(6, D))
    assert found == {**dict.fromkeys("wab", ((0,), (1,))), "head": "head"}


def test_parameters_that_scale_each_other_raise():
    params = arrays(w=(D, D), mask=(D, D), head=(D, 3))
    with pytest.raises(ValueError, match="2 parameter"):
        by_use(lambda p, x: head(p, x @ (p["w"] * p["mask"])), params, data(6, D))


def test_a_batch_closed_over_is_told_to_be_passed():
    x = jnp.ones((6, D))
    with pytest.raises(ValueError, match="pass the batch as an argument"):
        by_use(lambda p: head(p, x @ p["w"]), arrays(w=(D, D), head=(D, 3)))


def test_what_is_no_trouble():
    """Norms, standardised and quantised weights, decay in the loss, custom rules, a permutation."""

    @jax.custom_vjp
    def twice(w, x):
        return 2 * x @ w

    twice.defvjp(lambda w, x: (twice(w, x), (w, x)), lambda kept, g: (kept[0], g))

    def loss(p, x):
        a = p["a"] * (p["gain"] / jnp.linalg.norm(p["a"], axis=0))[None]
        b = (p["b"] - p["b"].mean(0, keepdims=True)) / jnp.std(p["b"], axis=0, keepdims=True)
        c = p["c"] + lax.stop_gradient(jnp.round(p["c"]) - p["c"])
        e = p["e"][:, jnp.array([2, 0, 1, 3])]
        x = jnp.tanh(jnp.tanh(jnp.tanh(x @ a) @ b) @ c)
        x = jnp.tanh(jnp.tanh(twice(p["d"], x)) @ e)
        return head(p, x) + 0.1 * (p["a"] ** 2).sum()

    params = arrays(**dict.fromkeys("abcde", (D, D)), gain=(D,), head=(D, 3))
    assert read(loss, params, data(6, D)) == {
        **dict.fromkeys("abcde", ((0,), (1,))),
        "gain": "vector",
        "head": "head",
    }


def test_a_ravelled_tree_warns():
    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["v"][:16].reshape(D, D)) @ p["v"][16:].reshape(D, 3))

    with pytest.warns(UserWarning, match="v holds matrices in a single axis"):
        assert read(loss, arrays(v=(28,)), data(6, D)) == {"v": "vector"}


def test_metrics_beside_the_loss_say_nothing():
    def loss(p, x):
        y = jnp.tanh(x @ p["w"])
        return head(p, y), {"rank": jnp.linalg.svd(p["w"])[1], "wide": y @ p["w"].T}

    params = arrays(w=(D, D), head=(D, 3))
    assert read(loss, params, data(6, D)) == {"w": ((0,), (1,)), "head": "head"}


# --- Unknown primitives ---------------------------------------------------------------------------

strange_p = Primitive("strange")
strange_p.def_abstract_eval(lambda x: x)
strange_p.def_impl(lambda x: x)


def strange(x):
    return strange_p.bind(x)


PLACES = {
    "at the top": lambda w, x: x @ strange(w),
    "in a jit": lambda w, x: x @ jax.jit(strange)(w),
    "in a remat": lambda w, x: jax.checkpoint(lambda w, x: x @ strange(w))(w, x),
    "in a scan": lambda w, x: lax.scan(lambda x, _: (x @ strange(w), None), x, length=2)[0],
    "on scanned slices": lambda w, x: lax.scan(lambda x, row: (x + strange(row)[None], None), x, w)[
        0
    ],
    "in a while": lambda w, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ strange(w)), (0, x)
    )[1],
    "in a branch": lambda w, x: lax.cond(x.sum() > 0, lambda x: x @ strange(w), lambda x: x @ w, x),
    "behind a reshape": lambda w, x: x @ strange(w.reshape(2, 2, D)).reshape(D, D),
    "on a norm of it": lambda w, x: x @ (w / strange(jnp.linalg.norm(w, axis=0))[None]),
    "added to activations": lambda w, x: strange(x[:, None] + w[None]).sum(1),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_primitive_raises_by_name(place):
    params = arrays(w=(D, D), head=(D, 3))
    with pytest.raises(ValueError, match=r"w, shape \(4, 4\): .*passes strange"):
        by_use(lambda p, x: head(p, PLACES[place](p["w"], x)), params, data(6, D))


def test_an_unknown_primitive_on_activations_hides_nothing():
    params = arrays(w=(D, D), head=(D, 3))
    found = read(lambda p, x: head(p, strange(x @ p["w"])), params, data(6, D))
    assert found == {"w": ((0,), (1,)), "head": "head"}


# --- The user's word, and misuse ------------------------------------------------------------------


def test_all_doubts_come_at_once_with_the_line_that_settles_them():
    params = {
        "a": arrays(w=(D, D)),
        "b": arrays(w=(D, D), unused=(D, D)),
        "head": S((D, 3), jnp.float32),
    }

    def loss(p, x):
        x = (x[:, :, None] * p["a"]["w"][None]).sum(1)
        return head(p, x @ jnp.sort(p["b"]["w"], axis=0))

    with pytest.raises(ValueError, match=r"(?s)3 parameter.*a/w.*b/unused.*b/w") as error:
        by_use(loss, params, data(6, D))
    line = str(error.value).splitlines()[-1]
    rules = line[line.index("muon_jax.by_path") : -1].replace("muon_jax.", "")
    names = {"by_path": by_path, "MuonDimensionNumbers": MuonDimensionNumbers}
    declared = eval(rules, names)
    roles = by_use(loss, params, data(6, D), declared=declared)
    assert verdicts(roles) == {
        "a/w": (-2, -1),
        "b/unused": (-2, -1),
        "b/w": (-2, -1),
        "head": "head",
    }


def test_the_line_to_write_says_what_was_seen():
    def loss(p, x, i):
        y = jax.lax.conv_general_dilated(
            x + p["e"][i] @ p["e"], p["c"] * p["d"], (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        y = jax.nn.one_hot(i, 9).sum(1, keepdims=True) @ p["t"] + y
        y = jnp.einsum("btd,dhw->bthw", y, p["q"]).reshape(2, 5, -1)
        return mean_square((jnp.tanh(y) * p["v"][None, None]).sum(-1)) + 0 * p["idle"].sum()

    params = arrays(
        e=(D, D), c=(3, D, D), d=(3, D, D), t=(9, D), q=(D, 2, 3), v=(6,), idle=(D, D)
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not decide") as error:
        by_use(loss, params, data(2, 5, D), S((2, 5), jnp.int32))
    code = str(error.value).split("declared=")[1].removesuffix(")")
    rules = dict(eval(code, {"muon_jax": muon_jax}).rules)
    said = {n: s for p, s in rules.items() for n in params if re.search(p, n)}
    window = MuonDimensionNumbers((0, 1), 2)
    unused = MuonDimensionNumbers(-2, -1)
    assert said == {"c": window, "d": window, "e": None, "q": None, "t": None, "idle": unused}


def test_the_line_to_write_folds_no_stack():
    """Experts that all take part in one wide product look like heads."""

    def loss(p, x):
        for layer in p["layers"]:
            h = jax.nn.relu(jnp.einsum("nd,edf->nef", x, layer["wi"]))
            x = x + jnp.einsum("nef,efd->nd", h, layer["wo"])
        return head(p, x)

    layer = arrays(wi=(3, D, 6), wo=(3, 6, D))
    params = {"layers": [layer, layer], **arrays(head=(D, 5))}
    with pytest.raises(ValueError, match=r"layers/0/wi, layers/1/wi, shape") as error:
        by_use(loss, params, data(7, D))
    code = str(error.value).split("declared=")[1].removesuffix(")")
    declared = eval(code, {"muon_jax": muon_jax})
    roles = by_use(loss, params, data(7, D), declared=declared)
    routes, _ = route_leaves(params, roles)
    matrices = {route.path[-1]: route.views[0].matrices for route in routes if route.views}
    assert matrices == {"wi": (3, D, 6), "wo": (3, 6, D)}


def test_what_is_no_array_in_the_batch_is_told_to_be_closed_over():
    params = arrays(w=(D, 3))
    with pytest.raises(TypeError, match=r"holds 'train' at 1, of type str.*Close over"):
        by_use(lambda p, x, mode: mean_square(x @ p["w"]), params, data(6, D), "train")
    with pytest.raises(TypeError, match=r"decides by a value of the batch.*\[True\].*Close over"):
        by_use(lambda p, x, on: mean_square(x @ p["w"] if on else x), params, data(6, D), True)
    with pytest.raises(TypeError, match=r"decides by a value of the batch.*\[2\]"):
        by_use(lambda p, x, n: mean_square(x @ p["w"]) * len(range(n)), params, data(6, D), 2)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        by_use(lambda p, x: mean_square(x @ p["w"] if x.sum() > 0 else x), params, data(6, D))


def test_the_users_word_comes_first():
    params = arrays(w=(D, D), head=(D, 3))
    declared = by_path({"head": MuonDimensionNumbers(0, 1), "w": None})
    roles = by_use(lambda p, x: head(p, x @ p["w"]), params, data(6, D), declared=declared)
    assert verdicts(roles) == {"w": "declared", "head": (0, 1)}


@pytest.mark.parametrize(
    ("outcome", "error", "match"),
    [
        (lambda y: y, ValueError, r"must return a scalar; got shape \(6, 3\)"),
        (lambda y: y[0, :1], ValueError, r"got shape \(1,\)"),
        (lambda y: {"loss": y.sum()}, TypeError, "got dict"),
        (lambda y: (y.sum(), 1, 2), TypeError, "got tuple"),
        (lambda y: [y.sum(), 1], TypeError, "got list"),
        (lambda y: (y, y.sum()), ValueError, r"got shape \(6, 3\)"),
        (lambda y: None, TypeError, "got NoneType"),
        (lambda y: y.sum().astype(int), TypeError, "real and floating-point"),
        (lambda y: y.sum() + 1j, TypeError, "real and floating-point"),
    ],
)
def test_a_loss_is_a_scalar_or_a_pair(outcome, error, match):
    with pytest.raises(error, match=match):
        by_use(lambda p, x: outcome(x @ p["w"]), arrays(w=(D, 3)), data(6, D))


def test_arguments_of_another_kind_raise(untyped):
    params = arrays(w=(D, 3))
    with pytest.raises(TypeError, match=r"declared must be what muon_jax\.by_path returns"):
        by_use(head, params, declared={"w": None})
    with pytest.raises(TypeError, match="takes the loss, a function, first"):
        by_use(params, head)
    with pytest.raises(TypeError, match="int32"):
        by_use(lambda p, x: x.sum(), {"w": S((3,), jnp.int32)}, data(6, D))
    with pytest.raises(ValueError, match="finds no path"):
        by_use(head, params, declared=by_path({"nothing": None}))
    with pytest.raises(ValueError, match="both a reduction and an output axis"):
        by_use(
            lambda p, x: mean_square(x @ p["w"]),
            params,
            data(6, D),
            declared=by_path({"w": MuonDimensionNumbers(0, 0)}),
        )


def test_roles_belong_to_the_tree_that_they_were_read_from():
    params = arrays(w=(D, D), head=(D, 3))
    roles = by_use(lambda p, x: head(p, x @ p["w"]), params, data(6, D))
    with pytest.raises(ValueError, match="know no parameter other"):
        routing_report(arrays(other=(D, D)), muon_weight_dimension_numbers=roles)
    with pytest.raises(ValueError, match=r"w has shape \(4, 5\), and had \(4, 4\)"):
        routing_report(arrays(w=(D, 5), head=(D, 3)), muon_weight_dimension_numbers=roles)


def test_the_report_says_the_use_and_where_names_differ():
    params = {
        "first": {"kernel": S((D, D), jnp.float32)},
        "second": {"kernel": S((D, 3), jnp.float32)},
    }

    def loss(p, x):
        return mean_square(jnp.tanh(x @ p["first"]["kernel"]) @ p["second"]["kernel"])

    roles = by_use(loss, params, data(6, D))
    report = routing_report(params, muon_weight_dimension_numbers=roles)
    reasons = {row.path: row.reason for row in report.rows}
    assert "contracted over axis 0" in reasons["first/kernel"]
    assert "no matrix after it [the names say: muon" in reasons["second/kernel"]
    state = muon(1e-3, muon_weight_dimension_numbers=roles).init(
        jax.tree.map(lambda s: jnp.ones(s.shape), params)
    )
    assert state is not None
