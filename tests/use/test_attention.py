"""Heads, fused blocks and their evidence, in attention written in many ways."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from muon_jax import GroupedQuery, MultiHead, by_use, muon, routing_report
from tests.use.use_programs import arrays, data, mean_square, read

D, H, W, KV = 12, 4, 6, 2


def softmax_attention(q, k, v):
    """Of `[b, t, heads, width]`, with as many key heads."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def rope(x):
    angle = jnp.arange(x.shape[1])[None, :, None, None] * 0.1
    a, b = jnp.split(x, 2, axis=-1)
    cos = jnp.broadcast_to(jnp.cos(angle), a.shape)
    sin = jnp.broadcast_to(jnp.sin(angle), a.shape)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def finish(p, x):
    return mean_square(x @ p["head"])


def three_axes(p, x, turn=lambda x: x):
    q, k, v = (jnp.einsum("btd,dhw->bthw", x, p[name]) for name in "qkv")
    return finish(
        p, x + jnp.einsum("bthw,hwd->btd", softmax_attention(turn(q), turn(k), v), p["o"])
    )


THREE = {**dict.fromkeys("qkv", ((0,), (1, 2))), "o": ((0, 1), (2,)), "head": "head"}
TWO = {**dict.fromkeys("qkvo", ((0,), (1,))), "head": "head"}


@pytest.mark.parametrize("turn", [lambda x: x, rope])
def test_heads_of_three_axes_are_one_matrix(turn):
    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    assert read(lambda p, x: three_axes(p, x, turn), params, data(2, 7, D)) == THREE


def test_per_head_splits_the_same_reading():
    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    roles = by_use(three_axes, params, data(2, 7, D))
    rows = {
        row.path: row.matrices
        for row in routing_report(
            params, muon_weight_dimension_numbers=roles, heads="per_head"
        ).rows
    }
    assert rows == {
        **dict.fromkeys("qkv", ((H, D, W),)),
        "o": ((H, W, D),),
        "head": (),
    }
    muon(1e-3, muon_weight_dimension_numbers=roles, heads="per_head")


def two_axes(p, x, turn=rope, kv=H):
    b, t, _ = x.shape
    q = turn((x @ p["q"]).reshape(b, t, H, W))
    k = turn((x @ p["k"]).reshape(b, t, kv, W))
    v = (x @ p["v"]).reshape(b, t, kv, W)
    k, v = (jnp.repeat(y, H // kv, axis=2) for y in (k, v))
    return finish(p, x + softmax_attention(q, k, v).reshape(b, t, H * W) @ p["o"])


@pytest.mark.parametrize("kv", [H, KV, 1])
def test_heads_of_two_axes_name_their_number(kv):
    params = arrays(q=(D, H * W), k=(D, kv * W), v=(D, kv * W), o=(H * W, D), head=(D, 5))

    def loss(p, x):
        return two_axes(p, x, kv=kv)

    assert read(loss, params, data(2, 7, D)) == TWO
    hints = {r.path[0]: r.hints for r in by_use(loss, params, data(2, 7, D)).readings}
    assert f"{H} heads of {W}" in hints["q"]
    # One key head shows no number of heads.
    proposed = {
        H: {"^$": MultiHead(H, W, "q", "k", "v", "o")},
        KV: {"^$": GroupedQuery(H, KV, W, "q", "k", "v", "o")},
    }
    assert by_use(loss, params, data(2, 7, D)).heads() == proposed.get(kv, {})
    if kv > 1:
        assert f"{kv} heads of {W}" in hints["k"]


def test_grouped_queries_of_three_and_four_axes():
    def loss(p, x):
        q = jnp.einsum("btd,dngw->btngw", x, p["q"])
        k, v = (jnp.einsum("btd,dnw->btnw", x, p[name]) for name in "kv")
        weights = jax.nn.softmax(jnp.einsum("bqngw,bknw->bngqk", q, k))
        y = jnp.einsum("bngqk,bknw->bqngw", weights, v)
        return finish(p, x + jnp.einsum("btngw,ngwd->btd", y, p["o"]))

    params = arrays(q=(D, KV, 2, W), k=(D, KV, W), v=(D, KV, W), o=(KV, 2, W, D), head=(D, 5))
    assert read(loss, params, data(2, 7, D)) == {
        "q": ((0,), (1, 2, 3)),
        "k": ((0,), (1, 2)),
        "v": ((0,), (1, 2)),
        "o": ((0, 1, 2), (3,)),
        "head": "head",
    }


FUSED = {
    "split": lambda p, x: jnp.split(x @ p["qkv"], 3, axis=-1),
    "3hd": lambda p, x: [
        (x @ p["qkv"]).reshape(2, 7, 3, H, W)[:, :, i].reshape(2, 7, H * W) for i in range(3)
    ],
    "weights split": lambda p, x: [x @ w for w in jnp.split(p["qkv"], 3, axis=-1)],
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_queries_keys_and_values_are_seen(name):
    def loss(p, x):
        q, k, v = (y.reshape(2, 7, H, W) for y in FUSED[name](p, x))
        return finish(p, x + softmax_attention(rope(q), rope(k), v).reshape(2, 7, H * W) @ p["o"])

    params = arrays(qkv=(D, 3 * H * W), o=(H * W, D), head=(D, 5))
    roles = by_use(loss, params, data(2, 7, D))
    assert read(loss, params, data(2, 7, D)) == {
        "qkv": ((0,), (1,)),
        "o": ((0,), (1,)),
        "head": "head",
    }
    (hints,) = (reading.hints for reading in roles.readings if reading.path == ("qkv",))
    assert any("fused" in hint.lower() for hint in hints)


def test_weights_concatenated_before_the_product_are_read_apart():
    def loss(p, x):
        qkv = x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
        q, k, v = (y.reshape(2, 7, H, W) for y in jnp.split(qkv, 3, axis=-1))
        return finish(p, x + softmax_attention(q, k, v).reshape(2, 7, H * W) @ p["o"])

    params = arrays(q=(D, H * W), k=(D, H * W), v=(D, H * W), o=(H * W, D), head=(D, 5))
    assert read(loss, params, data(2, 7, D)) == TWO


def test_a_gate_and_an_input_in_one_are_seen():
    def loss(p, x):
        gate, up = jnp.split(x @ p["in"], 2, axis=-1)
        return finish(p, x + (jax.nn.silu(gate) * up) @ p["out"])

    params = arrays(**{"in": (D, 32), "out": (16, D), "head": (D, 5)})
    roles = by_use(loss, params, data(7, D))
    assert "FusedBlocks((16, 16), axis=1)" in str(roles)


def test_latent_attention():
    """Queries and keys of two parts, one of them shared by the heads (DeepSeek-V2)."""
    nope, turned, value, latent = 4, 2, 6, 5

    def loss(p, x):
        b, t, _ = x.shape
        q = (x @ p["q"]).reshape(b, t, H, nope + turned)
        q = jnp.concatenate([q[..., :nope], rope(q[..., nope:])], axis=-1)
        kv = x @ p["kv_a"]
        k_turned = rope(kv[..., latent:].reshape(b, t, 1, turned))
        kv = (kv[..., :latent] @ p["kv_b"]).reshape(b, t, H, nope + value)
        k = jnp.concatenate(
            [kv[..., :nope], jnp.broadcast_to(k_turned, (b, t, H, turned))], axis=-1
        )
        y = softmax_attention(q, k, kv[..., nope:]).reshape(b, t, H * value)
        return finish(p, x + y @ p["o"])

    params = arrays(
        q=(D, H * (nope + turned)),
        kv_a=(D, latent + turned),
        kv_b=(latent, H * (nope + value)),
        o=(H * value, D),
        head=(D, 5),
    )
    assert read(loss, params, data(2, 7, D)) == {
        **dict.fromkeys(("q", "kv_a", "kv_b", "o"), ((0,), (1,))),
        "head": "head",
    }


def test_heads_are_proposed_by_module_and_latent_ones_are_printed():
    def attention(p, x):
        q = (x @ p["q_proj"]["kernel"]).reshape(2, 7, H, W)
        if "kv_b_proj" in p:
            both = (x @ p["kv_b_proj"]["kernel"]).reshape(2, 7, H, 2 * W)
            k, v = both[..., :W], both[..., W:]
        else:
            k, v = ((x @ p[n]["kernel"]).reshape(2, 7, -1, W) for n in ("k_proj", "v_proj"))
        k, v = (jnp.repeat(y, H // y.shape[2], axis=2) for y in (k, v))
        out = softmax_attention(rope(q), rope(k), v).reshape(2, 7, H * W)
        return x + out @ p["o_proj"]["kernel"]

    def loss(p, x):
        for name in ("0", "1", "2", "latent"):
            x = attention(p[name]["attn"], x)
        return finish(p, x)

    def module(**inputs):
        shapes = {"q_proj": (D, H * W), **inputs, "o_proj": (H * W, D)}
        return {"attn": {name: arrays(kernel=shape) for name, shape in shapes.items()}}

    params = {
        "0": module(k_proj=(D, H * W), v_proj=(D, H * W)),
        "1": module(k_proj=(D, H * W), v_proj=(D, H * W)),
        "2": module(k_proj=(D, KV * W), v_proj=(D, KV * W)),
        "latent": module(kv_b_proj=(D, 2 * H * W)),
        **arrays(head=(D, 5)),
    }
    roles = by_use(loss, params, data(2, 7, D))
    proposed = roles.heads()
    assert {*proposed.values()} == {GroupedQuery(H, KV, W), MultiHead(H, W)}
    report = routing_report(params, muon_weight_dimension_numbers=roles, heads=proposed)
    rows = {row.path: row.matrices for row in report.rows}
    assert rows["1/attn/k_proj/kernel"] == rows["1/attn/q_proj/kernel"] == ((H, D, W),)
    assert rows["2/attn/k_proj/kernel"] == ((KV, D, W),)
    assert rows["2/attn/o_proj/kernel"] == ((H, W, D),)
    assert rows["latent/attn/q_proj/kernel"] == ((1, D, H * W),)
    assert f"latent/attn: kv_b_proj becomes {H} heads of {2 * W}" in str(roles)


def test_keys_in_a_cache_are_followed():
    def loss(p, x, cache):
        q, k, v = (jnp.einsum("btd,dhw->bthw", x, p[name]) for name in "qkv")
        k = lax.dynamic_update_slice(cache, k, (0, 0, 0, 0))
        v = lax.dynamic_update_slice(cache, v, (0, 0, 0, 0))
        return finish(p, x + jnp.einsum("bthw,hwd->btd", softmax_attention(q, k, v), p["o"]))

    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    assert read(loss, params, data(2, 7, D), data(2, 9, H, W)) == THREE


# --- Doubts ---------------------------------------------------------------------------------------


def test_a_loop_over_heads_is_a_doubt():
    """What is taken head by head looks like a stack; layers follow each other, heads do not."""

    def python(p, x):
        y = 0.0
        for h in range(H):
            q, k, v = (x @ p[name][:, h] for name in "qkv")
            weights = jax.nn.softmax(q @ k.swapaxes(1, 2))
            y = y + (weights @ v) @ p["o"][h]
        return finish(p, x + y)

    def mapped(p, x):
        def one(ws):
            q, k, v, o = ws
            return (jax.nn.softmax((x @ q) @ (x @ k).swapaxes(1, 2)) @ (x @ v)) @ o

        each = tuple(jnp.moveaxis(p[name], 1, 0) for name in "qkv")
        return finish(p, x + lax.map(one, (*each, p["o"])).sum(0))

    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    for loss in (python, mapped):
        with pytest.raises(ValueError, match=r"(?s)4 parameter.*k, shape.*o, .*q, .*v, .*heads\?"):
            by_use(loss, params, data(2, 7, D))


def test_heads_over_which_the_input_is_spread_are_joint():
    def loss(p, x):
        spread = jnp.broadcast_to(x[None], (H, *x.shape))
        q, k, v = (
            jnp.einsum("hbtd,hdw->bthw", spread, jnp.moveaxis(p[name], 1, 0)) for name in "qkv"
        )
        y = softmax_attention(q, k, v)
        return finish(p, x + jnp.einsum("bthw,hwd->btd", y, p["o"]))

    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    assert read(loss, params, data(2, 7, D)) == THREE


def test_a_loop_over_heads_around_an_opaque_kernel_is_a_doubt():
    def loss(p, x):
        y = sum(jnp.fft.fft(x @ p["q"][:, h]).real @ p["o"][h] for h in range(H))
        return finish(p, x + y)

    params = arrays(q=(D, H, W), o=(H, W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"2 parameter(?s:.*) o, .*heads\?(?s:.*) q, .*heads\?"):
        by_use(loss, params, data(2, 7, D))


def test_heads_that_a_map_runs_along_and_that_are_added_up_are_a_doubt():
    def loss(p, x):
        def one(q, k, v, o):
            return (jax.nn.softmax((x @ q) @ (x @ k).swapaxes(1, 2)) @ (x @ v)) @ o

        each = (p[name] for name in "qkvo")
        return finish(p, x + jax.vmap(one, in_axes=(1, 1, 1, 0))(*each).sum(0))

    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"4 parameter(?s:.*) o, .*attention's heads"):
        by_use(loss, params, data(2, 7, D))


def test_headwise_matrices_behind_several_outputs_are_a_doubt():
    def loss(p, x):
        y = jnp.einsum("nhw,hwv->nhv", jnp.einsum("nd,dhw->nhw", x, p["q"]), p["b"])
        return finish(p, jnp.tanh(y).reshape(6, -1))

    params = arrays(q=(D, H, W), b=(H, W, 3), head=(D, 5))
    with pytest.raises(ValueError, match=r"1 parameter(?s:.*) q, "):
        by_use(loss, params, data(6, D))


def test_a_fused_axis_of_its_own_is_a_doubt():
    def loss(p, x):
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dchw->btchw", x, p["qkv"]), 2, 0)
        return finish(p, x + jnp.einsum("bthw,hwd->btd", softmax_attention(q, k, v), p["o"]))

    params = arrays(qkv=(D, 3, H, W), o=(H, W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"1 parameter(?s:.*) qkv, "):
        by_use(loss, params, data(2, 7, D))


@pytest.mark.parametrize("merged", ["kv", "qkv"])
def test_merged_projections_on_an_axis_of_their_own_are_a_doubt(merged):
    def loss(p, x):
        each = [jnp.einsum("btd,dhw->bthw", x, p[merged][i]) for i in range(len(merged))]
        if merged == "kv":
            each = [jnp.einsum("btd,dhw->bthw", x, p["q"]), *each]
        return finish(p, x + jnp.einsum("bthw,hwd->btd", softmax_attention(*each), p["o"]))

    params = arrays(q=(D, H, W), o=(H, W, D), head=(D, 5), **{merged: (len(merged), D, H, W)})
    if merged == "qkv":
        del params["q"]
    with pytest.raises(ValueError, match=rf"1 parameter(?s:.*) {merged}, shape"):
        by_use(loss, params, data(2, 7, D))


def test_heads_around_an_opaque_kernel_are_a_doubt():
    def loss(p, x):
        q, k, v = (jnp.einsum("btd,dhw->bthw", x, p[name]) for name in "qkv")
        y = jnp.fft.fft(q + k + v).real
        return finish(p, x + jnp.einsum("bthw,hwd->btd", y, p["o"]))

    params = arrays(q=(D, H, W), k=(D, H, W), v=(D, H, W), o=(H, W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"(?s)4 parameter.*k, .*o, .*q, .*v, "):
        by_use(loss, params, data(2, 7, D))


def test_several_outputs_without_attention_are_a_doubt():
    def loss(p, x):
        y = jnp.tanh(jnp.einsum("nd,dab->nab", x, p["into"]))
        return finish(p, jnp.tanh(jnp.einsum("nab,abd->nd", y, p["back"])))

    params = arrays(into=(8, 2, 4), back=(2, 4, 8), head=(8, 5))
    with pytest.raises(ValueError, match=r"(?s)2 parameter.*back, .*into, "):
        by_use(loss, params, data(3, 8))
