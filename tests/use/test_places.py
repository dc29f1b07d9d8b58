"""Heads in loops, ensembles, relations, tiles and rows: what looks like a stack, or like heads."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from muon_jax import by_use
from tests.use.use_programs import arrays, data, ids, mean_square, read

D, H, W, F, E, B, T, L = 16, 4, 8, 24, 3, 2, 7, 3


def attention(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", q, k))
    return jnp.einsum("bhts,bshw->bthw", weights, v)


def one_head(x, q, k, v, o):
    return (jax.nn.softmax((x @ q) @ (x @ k).swapaxes(1, 2)) @ (x @ v)) @ o


def mapped(x, p):
    return lax.map(lambda ws: one_head(x, *ws), tuple(p[name] for name in "qkvo")).sum(0)


def scanned(x, p):
    ws = tuple(p[name] for name in "qkvo")
    return lax.scan(lambda y, w: (y + one_head(x, *w), None), jnp.zeros_like(x), ws)[0]


def looped(x, p):
    return sum(one_head(x, *(p[name][i] for name in "qkvo")) for i in range(H))


def finish(p, x):
    return mean_square(jnp.tanh(x) @ p["head"])


def layers_of(heads, how):
    """Layers that repeat, in a scan or in Python, around a loop over heads."""

    def scan(p, x):
        ws = {name: p[name] for name in "qkvo"}
        return finish(p, lax.scan(lambda x, w: (x + heads(x, w), None), x, ws)[0])

    def python(p, x):
        for i in range(L):
            x = x + heads(x, {name: p[name][i] for name in "qkvo"})
        return finish(p, x)

    def shared(p, x):
        for _ in range(L):
            x = x + heads(x, p)
        return finish(p, x)

    def universal(p, x):
        ws = {name: p[name] for name in "qkvo"}
        return finish(p, lax.scan(lambda x, _: (x + heads(x, ws), None), x, length=L)[0])

    lead = (L,) if how in ("scan", "python") else ()
    params = arrays(**dict.fromkeys("qkv", (*lead, H, D, W)), o=(*lead, H, W, D), head=(D, 5))
    return locals()[how], params, len(lead)


@pytest.mark.parametrize("how", ["scan", "python", "shared", "universal"])
@pytest.mark.parametrize("heads", [mapped, scanned, looped])
def test_heads_in_a_loop_raise_where_the_layer_repeats(heads, how):
    loss, params, axis = layers_of(heads, how)
    with pytest.raises(ValueError, match=rf"(?s)4 parameter.*k, .*axis {axis} is taken place by"):
        by_use(loss, params, data(B, T, D))


@pytest.mark.parametrize("how", ["scan", "python", "shared", "universal"])
def test_layers_stay_a_stack_where_they_repeat(how):
    def block(x, w):
        y = (x @ w["q"]) @ (x @ w["k"]).swapaxes(1, 2)
        return x + (jax.nn.softmax(y) @ (x @ w["v"])) @ w["o"]

    def layers(x, p):
        return lax.scan(lambda x, w: (block(x, w), None), x, p)[0]

    def loss(p, x):
        ws = {name: p[name] for name in "qkvo"}
        if how == "python":
            for i in range(L):
                x = block(x, {name: w[i] for name, w in ws.items()})
        elif how == "universal":
            x = lax.scan(lambda x, _: (layers(x, ws), None), x, length=2)[0]
        else:
            for _ in range(2 if how == "shared" else 1):
                x = layers(x, ws)
        return finish(p, x)

    params = arrays(**dict.fromkeys("qkv", (L, D, W)), o=(L, W, D), head=(D, 5))
    found = read(loss, params, data(B, T, D))
    assert found == {**dict.fromkeys("qkvo", ((1,), (2,))), "head": "head"}


def test_a_short_convolution_between_hides_no_heads():
    def short(x, w):
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x, w, (1,), [(3, 0)], dimension_numbers=numbers, feature_group_count=W
        )

    def loss(p, x):
        heads = []
        for i in range(H):
            q, k, v = (short(x @ p[name][i], p["c" + name][i]) for name in "qkv")
            heads.append(jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v)
        return finish(p, jnp.concatenate(heads, -1) @ p["o"])

    shapes = {**dict.fromkeys("qkv", (H, D, W)), **dict.fromkeys(("cq", "ck", "cv"), (H, 4, 1, W))}
    params = arrays(**shapes, o=(H * W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"(?s)6 parameter.*  q, .*heads\?"):
        by_use(loss, params, data(B, T, D))


@pytest.mark.parametrize("width", ["heads", "one head"])
def test_members_of_an_ensemble_are_no_heads(width):
    def member(p, x):
        if width == "one head":
            return one_head(x, *(p[name] for name in "qkvo")) @ p["head"]
        q, k, v = (jnp.einsum("btd,dhw->bthw", x, p[name]) for name in "qkv")
        return jnp.einsum("bthw,hwd->btd", attention(q, k, v), p["o"]) @ p["head"]

    def loss(p, x):
        return mean_square(jax.vmap(member, (0, None))(p, x))

    many = (H,) if width == "heads" else ()
    shapes = {**dict.fromkeys("qkv", (E, D, *many, W)), "o": (E, *many, W, D), "head": (E, D, 5)}
    with pytest.raises(ValueError, match=r"(?s)k, .*a stack.*o, .*a stack.*  q, .*a stack"):
        by_use(loss, arrays(**shapes), data(B, T, D))


def test_members_that_are_averaged_are_no_heads():
    def loss(p, x):
        q, k, v = (jnp.einsum("btd,edhw->ebthw", x, p[name]) for name in "qkv")
        y = jax.vmap(attention)(q, k, v).mean(0)
        return finish(p, y.reshape(B, T, -1) @ p["o"])

    params = arrays(**dict.fromkeys("qkv", (E, D, H, W)), o=(H * W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"(?s)3 parameter.*or a stack"):
        by_use(loss, params, data(B, T, D))


def test_relations_of_a_graph_are_no_heads():
    def loss(p, x, edges):
        h = jnp.einsum("sd,rdf->rsf", x, p["a"])
        x = jnp.tanh(jnp.einsum("rts,rsf->rtf", edges, h).sum(0))
        return mean_square(x @ p["head"])

    with pytest.raises(ValueError, match=r"  a, .*axis 0 runs along an axis of the batch"):
        by_use(loss, arrays(a=(E, D, F), head=(F, 5)), data(T, D), data(E, T, T))


def joined(p, x):
    return x @ jnp.concatenate([p["w"][i] for i in range(4)], 0)


def tiles(p, x):
    xs = x.reshape(B, 4, 4).swapaxes(0, 1)
    return lax.scan(lambda y, t: (y + t[0] @ t[1], None), jnp.zeros((B, F)), (xs, p["w"]))[0]


def sliced(p, x):
    return sum(x[:, 4 * i : 4 * i + 4] @ p["w"][i] for i in range(4))


PIECES = {
    "joined": (joined, "pieces of it are joined"),
    "tiles": (tiles, "activations too"),
    "sliced": (sliced, "activations too"),
}


@pytest.mark.parametrize("name", PIECES)
def test_one_matrix_in_pieces_is_no_stack(name):
    product, seen = PIECES[name]

    def loss(p, x):
        return finish(p, jnp.tanh(product(p, jnp.tanh(x @ p["i"]))) @ p["o"])

    params = arrays(i=(D, 16), w=(4, 4, F), o=(F, D), head=(D, 5))
    with pytest.raises(ValueError, match=rf"  w, .*{seen}"):
        by_use(loss, params, data(B, D))


def test_a_convolution_as_shifted_products_is_no_stack():
    def loss(p, x):
        y = sum(x[:, i : i + T - 2] @ p["w"][i] for i in range(3))
        return finish(p, jnp.tanh(y) @ p["o"])

    with pytest.raises(ValueError, match=r"  w, .*in pieces of an axis"):
        by_use(loss, arrays(w=(3, D, F), o=(F, D), head=(D, 5)), data(B, T, D))


@pytest.mark.parametrize("how", ["python", "scan"])
def test_a_product_row_by_row_is_not_elementwise(how):
    def loss(p, x):
        if how == "python":
            y = sum(x[:, i : i + 1] * p["w"][i][None] for i in range(3))
        else:
            zero = jnp.zeros((B, F))
            y = lax.scan(lambda y, t: (y + t[1][:, None] * t[0][None], None), zero, (p["w"], x.T))[
                0
            ]
        return finish(p, jnp.tanh(y) @ p["o"])

    with pytest.raises(ValueError, match=r"  w, .*row by row, which adds up"):
        by_use(loss, arrays(w=(3, F), o=(F, D), head=(D, 5)), data(B, 3))


@pytest.mark.parametrize("gate", ["softmax", "chosen"])
def test_a_bias_for_each_expert_is_no_matrix(gate):
    def loss(p, x):
        weights = jax.nn.softmax(x @ p["r"])
        if gate == "chosen":
            top, i = lax.top_k(weights, 2)
            weights = (jax.nn.one_hot(i, E) * top[..., None]).sum(1)
        y = jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["a"]))
        y = jnp.einsum("bef,efd->bed", y, p["b"])
        return finish(p, jnp.einsum("bed,be->bd", y, weights) + weights @ p["bias"])

    params = arrays(r=(D, E), a=(E, D, F), b=(E, F, D), bias=(E, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"(?s)1 parameter.*  bias, .*rows"):
        by_use(loss, params, data(B, D))


def test_tables_by_codebook_are_embeddings():
    def loss(p, codes):
        x = sum(p["e"][i][codes[:, i]] for i in range(4))
        return finish(p, x @ p["w"])

    params = arrays(e=(4, 50, D), w=(D, D), head=(D, 5))
    found = read(loss, params, ids(B, 4))
    assert found == {"e": "embedding", "w": ((0,), (1,)), "head": "head"}
