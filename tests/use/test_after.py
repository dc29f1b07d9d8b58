"""What comes after a matrix, or before it, and is no product with a trained matrix, raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muon_jax import by_use
from tests.use.use_programs import S, arrays, data, ids, mean_square, read

D, H, W, B, T = 16, 4, 8, 2, 7


def hidden(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w"])


def low_rank(p, x, frozen):
    return mean_square(jnp.tanh(x @ frozen["w"] + x @ p["a"] @ p["w"]) @ frozen["head"])


def constant_head(p, x):
    return mean_square(hidden(p, x) @ np.ones((D, 5), np.float32))


def vector_head(p, x):
    return mean_square((hidden(p, x) * p["v"][None]).sum(-1))


def sampled(p, x, chosen):
    return mean_square(jnp.einsum("bd,bnd->bn", hidden(p, x), p["table"][chosen]))


def opaque(p, x):
    def kernel(h, w):
        return jax.pure_callback(lambda h, w: (h @ w).sum(-1), S((B,), jnp.float32), h, w)

    return mean_square(kernel(hidden(p, x), p["v"]))


def head_by_hand(p, x):
    return mean_square((hidden(p, x)[:, :, None] * p["head"][None]).sum(1))


SQUARE = {"w0": (D, D), "w": (D, D)}
CLOSED = {
    "frozen head": (
        low_rank,
        {"a": (D, 4), "w": (4, D)},
        (data(B, D), arrays(w=(D, D), head=(D, 5))),
    ),
    "constant head": (constant_head, SQUARE, (data(B, D),)),
    "vector head": (vector_head, {**SQUARE, "v": (D,)}, (data(B, D),)),
    "sampled softmax": (sampled, {**SQUARE, "table": (50, D)}, (data(B, D), ids(B, 6))),
    "opaque head": (opaque, {**SQUARE, "v": (D,)}, (data(B, D),)),
    "head by hand": (head_by_hand, {**SQUARE, "head": (D, 5)}, (data(B, D),)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_matrix_before_something_else_than_a_trained_matrix_raises(name):
    loss, shapes, batch = CLOSED[name]
    with pytest.raises(ValueError, match=r"  w, .*no trained matrix after it, but"):
        by_use(loss, arrays(**shapes), *batch)


def test_labels_and_masks_leave_a_head():
    def loss(p, x, labels, mask):
        y = jnp.tanh(x @ p["w"]) @ p["head"]
        return -(labels * jax.nn.log_softmax(y)).sum(-1).mean() + (mask * y).mean()

    params = arrays(w=(D, D), head=(D, 5))
    found = read(loss, params, data(B, D), data(B, 5), data(B, 5))
    assert found == {"w": ((0,), (1,)), "head": "head"}


CODES = {
    "mean": lambda code, mask: code.mean(1),
    "sum": lambda code, mask: code.sum(1),
    "masked": lambda code, mask: code * mask[..., None],
    "smoothed": lambda code, mask: code * 0.9 + 0.1 / 50,
}


@pytest.mark.parametrize("name", CODES)
def test_what_is_made_of_one_hot_codes_raises(name):
    def loss(p, i, mask):
        code = CODES[name](jax.nn.one_hot(i, 50), mask)
        return mean_square(jnp.tanh(code @ p["e"]) @ p["w"] @ p["head"])

    params = arrays(e=(50, D), w=(D, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"  e, .*made of one-hot codes"):
        by_use(loss, params, ids(B, 6), data(B, 6))


def test_linear_attention_by_hand_in_a_loop_over_heads_raises():
    def loss(p, x):
        heads = []
        for i in range(H):
            q, k, v = (x @ p[name][i] for name in "qkv")
            s = jnp.cumsum(k[..., :, None] * v[..., None, :], 1)
            heads.append((q[..., None] * s).sum(-2))
        return mean_square(jnp.concatenate(heads, -1) @ p["o"] @ p["head"])

    params = arrays(**dict.fromkeys("qkv", (H, D, W)), o=(H * W, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"(?s)3 parameter.*k, .*heads\?.*q, .*v, "):
        by_use(loss, params, data(B, T, D))


@pytest.mark.parametrize("statistic", ["norm", "penalty"])
def test_norms_and_penalties_add_up_no_experts(statistic):
    def loss(p, x):
        h = jax.nn.relu(jnp.einsum("bd,dhw->bhw", x, p["q"]))
        y = jnp.einsum("bhw,hwv->bhv", h, p["b"])
        if statistic == "norm":
            y = y * jax.lax.rsqrt(jnp.mean(y * y, (1, 2), keepdims=True) + 1e-6)
        extra = mean_square(h) if statistic == "penalty" else 0
        return mean_square(jnp.tanh(y.reshape(B, -1) @ p["w"]) @ p["head"]) + extra

    params = arrays(q=(D, H, W), b=(H, W, 3), w=(H * 3, D), head=(D, 5))
    with pytest.raises(ValueError, match=r"  q, .*all stay"):
        by_use(loss, params, data(B, D))
