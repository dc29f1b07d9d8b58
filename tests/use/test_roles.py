"""Each role, from the smallest programs that show it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from muon_jax import by_path, by_use
from tests.use.use_programs import S, arrays, data, ids, mean_square, read

D_IN, D_OUT = (0,), (1,)


def test_contracted_is_fan_in_and_free_is_fan_out_whichever_way_a_weight_lies():
    params = arrays(a=(4, 6), b=(8, 6), head=(8, 3))
    found = read(
        lambda p, x: mean_square(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"].T) @ p["head"]),
        params,
        data(5, 4),
    )
    assert found == {"a": ((0,), (1,)), "b": ((1,), (0,)), "head": "head"}


def test_gains_biases_tables_and_vectors_go_to_adamw():
    params = arrays(
        table=(9, 4), positions=(5, 4), gain=(4,), bias=(1, 5, 4), w=(4, 4), score=(4,), out=(4, 1)
    )

    def loss(p, ids):
        x = p["table"][ids] + p["positions"]
        x = jnp.tanh(x * p["gain"] + p["bias"]) @ p["w"]
        return mean_square(x @ p["score"]) + mean_square(x @ p["out"])

    with jax.numpy_rank_promotion("allow"):
        found = read(loss, params, ids(2, 5))
    assert found == {
        "table": "embedding",
        "positions": "elementwise",
        "gain": "vector",
        "bias": "elementwise",
        "w": ((0,), (1,)),
        "score": "vector",
        "out": "vector",
    }


def one_hot(ids, size):
    return jax.nn.one_hot(ids, size)


@pytest.mark.parametrize(
    "rows",
    [
        lambda table, ids: table[ids],
        lambda table, ids: jnp.take(table, ids, axis=0),
        lambda table, ids: one_hot(ids, 9) @ table,
        lambda table, ids: (ids[..., None] == jnp.arange(9)).astype(jnp.float32) @ table,
        lambda table, ids: jnp.where(ids[..., None] == jnp.arange(9), 1.0, 0.0) @ table,
        lambda table, ids: jnp.eye(9)[ids] @ table,
        lambda table, ids: jnp.einsum("btv,vd->btd", one_hot(ids, 9), table),
        lambda table, ids: jax.vmap(jax.vmap(lambda i: table[i]))(ids),
        lambda table, ids: lax.map(lambda i: table[i], ids.reshape(-1)).reshape(2, 5, 4),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_rows_by_index_are_an_embedding_however_they_are_taken(rows, tied):
    params = arrays(table=(9, 4), w=(4, 4), head=(4, 9))

    def loss(p, ids):
        x = jnp.tanh(rows(p["table"], ids) @ p["w"])
        head = p["table"].T if tied else p["head"]
        return mean_square(x @ head) + 0.0 * p["head"].sum()

    with jax.numpy_rank_promotion("allow"):
        declared = by_path({"head": None}) if tied else None
        found = read(loss, params, ids(2, 5), declared=declared)
    assert found["table"] == "embedding"
    assert found["w"] == ((0,), (1,))


def test_a_product_with_zeros_and_ones_of_a_comparison_is_a_doubt():
    def loss(p, ids):
        bag = (ids[..., None] == jnp.arange(9)[None, None]).astype(jnp.float32).max(1)
        bag = jnp.where(bag > 0, 1.0, 0.0)
        return mean_square(jnp.tanh(bag @ p["table"]) @ p["head"])

    with pytest.raises(ValueError, match=r"table, shape .*zeros and ones from a comparison"):
        by_use(loss, arrays(table=(9, 4), head=(4, 3)), ids(2, 5))


def test_the_head_is_what_no_matrix_follows_and_a_router_reaches_others():
    params = arrays(embed=(9, 4), router=(4, 3), up=(3, 4, 8), down=(3, 8, 4), head=(4, 9))

    def loss(p, ids):
        x = p["embed"][ids]
        gates = jax.nn.softmax(x @ p["router"])
        y = jnp.einsum("nef,efd->ned", jnp.tanh(jnp.einsum("nd,edf->nef", x, p["up"])), p["down"])
        x = x + jnp.einsum("ned,ne->nd", y, gates)
        return mean_square(x @ p["head"]) + mean_square(gates)

    assert read(loss, params, ids(5)) == {
        "embed": "embedding",
        "router": ((0,), (1,)),
        "up": ((1,), (2,)),
        "down": ((1,), (2,)),
        "head": "head",
    }


def test_a_last_matrix_of_one_column_counts_as_a_matrix_after_the_others():
    params = arrays(dense=(4, 4), score=(4, 1))
    found = read(
        lambda p, x: mean_square(jnp.tanh(x @ p["dense"]) @ p["score"]), params, data(5, 4)
    )
    assert found == {"dense": ((0,), (1,)), "score": "vector"}


def test_what_no_gradient_passes_does_not_come_after():
    params = arrays(w=(4, 4), head=(4, 4))

    def loss(p, x):
        logits = jnp.tanh(x @ p["w"]) @ p["head"]
        again = jnp.tanh((x + lax.stop_gradient(logits)) @ p["w"]) @ p["head"]
        return mean_square(again) + mean_square(logits)

    assert read(loss, params, data(5, 4)) == {"w": ((0,), (1,)), "head": "head"}


def test_self_conditioning_is_said_in_a_hint():
    params = arrays(w=(4, 4), head=(4, 4))

    def loss(p, x):
        logits = jnp.tanh(x @ p["w"]) @ p["head"]
        return mean_square(jnp.tanh((x + logits) @ p["w"]) @ p["head"])

    roles = by_use(loss, params, data(5, 4))
    assert "also straight to the loss" in str(roles)


# --- Convolutions ---------------------------------------------------------------------------------


def convolve(x, kernel, **options):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def test_window_and_input_are_fan_in_and_groups_are_blocks():
    params = arrays(
        first=(3, 3, 2, 8),
        grouped=(3, 3, 4, 8),
        depthwise=(3, 3, 1, 8),
        head=(8, 3),
    )

    def loss(p, x):
        x = jnp.tanh(convolve(x, p["first"]))
        x = jnp.tanh(convolve(x, p["grouped"], feature_group_count=2))
        x = jnp.tanh(convolve(x, p["depthwise"], feature_group_count=8))
        return mean_square(x.mean((1, 2)) @ p["head"])

    assert read(loss, params, data(2, 8, 8, 2)) == {
        "first": ((0, 1, 2), (3,)),
        "grouped": ((0, 1, 2), 3, (4, 4)),
        "depthwise": "elementwise",
        "head": "head",
    }


def test_transposed_convolutions_are_read_by_their_use():
    params = arrays(plain=(3, 3, 2, 8), turned=(3, 3, 4, 8), head=(4, 3))

    def loss(p, x):
        axes = ("NHWC", "HWIO", "NHWC")
        x = jnp.tanh(lax.conv_transpose(x, p["plain"], (2, 2), "SAME", dimension_numbers=axes))
        x = lax.conv_transpose(
            x, p["turned"], (2, 2), "SAME", dimension_numbers=axes, transpose_kernel=True
        )
        return mean_square(jnp.tanh(x).mean((1, 2)) @ p["head"])

    found = read(loss, params, data(2, 4, 4, 2))
    assert found["plain"] == ((0, 1, 2), (3,))
    assert found["turned"] == ((0, 1, 3), (2,))


# --- Stacks ---------------------------------------------------------------------------------------


def scanned(p, x, axis=0):
    def layer(x, wb):
        w, b = wb
        return jnp.tanh(x @ w + b[None]), None

    w, b = (jnp.moveaxis(p[name], axis, 0) for name in ("w", "b"))
    return lax.scan(layer, x, (w, b))[0]


def looped(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i] + p["b"][i][None]), x)


def carried(p, x):
    def body(state):
        i, w, x = state
        return i + 1, w, jnp.tanh(x @ w[i])

    x = lax.while_loop(lambda s: s[0] < 3, body, (0, p["w"], x))[2]
    return x + p["b"][0][None]


def unrolled(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = jnp.tanh(x @ w + b[None])
    return x


STACKS = {
    "scan": scanned,
    "scan, remat": jax.checkpoint(scanned),
    "fori_loop": looped,
    "while, carried": carried,
    "Python loop": unrolled,
    "in pairs": lambda p, x: (
        lax.scan(
            lambda x, w: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None), x, p["w"].reshape(2, 2, 4, 4)
        )[0]
        + p["b"][0][None]
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_what_a_loop_cuts_is_a_stack(name):
    layers = 4 if name == "in pairs" else 3
    params = arrays(w=(layers, 4, 4), b=(layers, 4), head=(4, 3))
    found = read(lambda p, x: mean_square(STACKS[name](p, x) @ p["head"]), params, data(5, 4))
    assert found == {"w": ((1,), (2,)), "b": "elementwise", "head": "head"}


def test_a_stack_may_lie_along_any_axis():
    params = arrays(w=(4, 3, 4), b=(4, 3), head=(4, 3))
    found = read(lambda p, x: mean_square(scanned(p, x, axis=1) @ p["head"]), params, data(5, 4))
    assert found == {"w": ((0,), (2,)), "b": "elementwise", "head": "head"}


def test_a_scan_of_one_round_does_not_come_after_itself():
    params = arrays(w=(1, 4, 4), b=(1, 4))
    found = read(lambda p, x: mean_square(scanned(p, x)), params, data(5, 4))
    assert found["w"] == "head"


# --- Mixtures of experts --------------------------------------------------------------------------

E, D, F, N = 3, 4, 8, 6


def gates(p, x):
    return jax.nn.softmax(x @ p["router"])


def dense_einsum(p, x):
    h = jnp.tanh(jnp.einsum("nd,edf->nef", x, p["wi"]))
    return jnp.einsum("ned,ne->nd", jnp.einsum("nef,efd->ned", h, p["wo"]), gates(p, x))


def dispatch(p, x):
    g, index = lax.top_k(gates(p, x), 1)
    mask = jax.nn.one_hot(index[:, 0], E)
    place = jax.nn.one_hot((jnp.cumsum(mask, 0) * mask).sum(-1).astype(jnp.int32) - 1, 4)
    mask = mask[:, :, None] * place[:, None, :]
    h = jnp.einsum("nec,nd->ecd", mask, x)
    h = jnp.einsum("ecf,efd->ecd", jnp.tanh(jnp.einsum("ecd,edf->ecf", h, p["wi"])), p["wo"])
    return jnp.einsum("nec,ecd->nd", mask, h) * g


def ragged(p, x):
    g, index = lax.top_k(gates(p, x), 1)
    order = jnp.argsort(index[:, 0])
    sizes = jnp.bincount(index[:, 0], length=E)
    h = jnp.tanh(lax.ragged_dot(x[order], p["wi"], sizes))
    h = lax.ragged_dot(h, p["wo"], sizes)
    return h[jnp.argsort(order)] * g


def per_token(p, x):
    g, index = lax.top_k(gates(p, x), 1)
    index = index[:, 0]
    h = jnp.tanh(jnp.einsum("nd,ndf->nf", x, p["wi"][index]))
    return jnp.einsum("nf,nfd->nd", h, p["wo"][index]) * g


def scan_experts(p, x):
    def step(y, ws):
        wi, wo, g = ws
        return y + g[:, None] * (jnp.tanh(x @ wi) @ wo), None

    return lax.scan(step, jnp.zeros_like(x), (p["wi"], p["wo"], gates(p, x).T))[0]


def vmap_experts(p, x):
    y = jax.vmap(lambda wi, wo: jnp.tanh(x @ wi) @ wo)(p["wi"], p["wo"])
    return jnp.einsum("end,ne->nd", y, gates(p, x))


def one_hot_weights(p, x):
    g, index = lax.top_k(gates(p, x), 1)
    hot = jax.nn.one_hot(index[:, 0], E)
    h = jnp.tanh(jnp.einsum("nd,ndf->nf", x, jnp.einsum("ne,edf->ndf", hot, p["wi"])))
    return jnp.einsum("nf,nfd->nd", h, jnp.einsum("ne,efd->nfd", hot, p["wo"])) * g


def python_experts(p, x):
    g = gates(p, x)
    return sum(g[:, e, None] * (jnp.tanh(x @ p["wi"][e]) @ p["wo"][e]) for e in range(E))


def tile_by_tile(p, x):
    """Each tile of tokens goes to the expert that its first token chose."""
    g, index = lax.top_k(gates(p, x), 1)

    def tile(_, tokens):
        x, index = tokens
        return None, jnp.tanh(x @ p["wi"][index[0]]) @ p["wo"][index[0]]

    tiles = (x.reshape(3, 2, D), index.reshape(3, 2))
    y = lax.scan(tile, None, tiles)[1].reshape(N, D)
    return jnp.einsum("nkd,nk->nd", y[:, None], g)


MIXTURES = (
    tile_by_tile,
    dense_einsum, dispatch, ragged, per_token, scan_experts, vmap_experts, one_hot_weights,
    python_experts,
)  # fmt: skip


@pytest.mark.parametrize("moe", MIXTURES)
@pytest.mark.parametrize("layers", [None, 2])
def test_experts_are_a_stack_however_they_are_written(moe, layers):
    stack = () if layers is None else (layers,)
    params = {
        "ffn": arrays(router=(*stack, D, E), wi=(*stack, E, D, F), wo=(*stack, E, F, D)),
        "head": S((D, 5), jnp.float32),
    }

    def loss(p, x):
        if layers is None:
            x = x + moe(p["ffn"], x)
        else:
            x = lax.scan(lambda x, q: (x + moe(q, x), None), x, p["ffn"])[0]
        return mean_square(x @ p["head"])

    n = len(stack)
    assert read(loss, params, data(N, D)) == {
        "ffn/router": ((n,), (n + 1,)),
        "ffn/wi": ((n + 1,), (n + 2,)),
        "ffn/wo": ((n + 1,), (n + 2,)),
        "head": "head",
    }


def test_experts_added_up_inside_a_product_or_as_weights_are_a_doubt():
    params = arrays(router=(D, E), wi=(E, D, F), wo=(E, F, D), head=(D, 5))

    def wide(p, x):
        h = jnp.tanh(jnp.einsum("nd,edf->nef", x, p["wi"])) * gates(p, x)[:, :, None]
        return mean_square((x + jnp.einsum("nef,efd->nd", h, p["wo"])) @ p["head"])

    def soft(p, x):
        wi = jnp.einsum("ne,edf->ndf", gates(p, x), p["wi"])
        wo = jnp.einsum("ne,efd->nfd", gates(p, x), p["wo"])
        h = jnp.tanh(jnp.einsum("nd,ndf->nf", x, wi))
        return mean_square((x + jnp.einsum("nf,nfd->nd", h, wo)) @ p["head"])

    for loss in (wide, soft):
        with pytest.raises(ValueError, match=r"(?s)2 parameter.*wi, shape.*wo, shape"):
            by_use(loss, params, data(N, D))
