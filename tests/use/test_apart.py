"""Members of an ensemble, which keep apart up to the loss, and what only looks like them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.use.use_programs import arrays, data, ids, mean_square, read

E, D, F, B, C = 3, 4, 6, 5, 7
STACK = ((1,), (2,))
LAYERS = {"a": (E, D, F), "b": (E, F, F)}


def of_labels(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1).mean()


def member(p, x):
    h = jnp.tanh(x @ p["a"])
    h = jax.nn.relu(h @ p["b"] + p["bias"][None])
    h = (h - h.mean(-1, keepdims=True)) / jnp.std(h, axis=-1, keepdims=True)
    return h @ p["head"]


def each_loss(p, x, y):
    return jax.vmap(lambda q: of_labels(member(q, x), y))(p).mean()


def mean_logits(p, x, y):
    return of_labels(jax.vmap(member, (0, None))(p, x).mean(0), y)


def mean_chances(p, x, y):
    chances = jax.nn.softmax(jax.vmap(member, (0, None))(p, x)).mean(0)
    return -jnp.log(jnp.take_along_axis(chances, y[:, None], -1)).mean()


def squares(p, x, y):
    return mean_square(jax.vmap(member, (0, None))(p, x))


@pytest.mark.parametrize("loss", [each_loss, mean_logits, mean_chances, squares])
def test_members_that_were_vmapped_are_a_stack(loss):
    params = arrays(**LAYERS, bias=(E, F), head=(E, F, C))
    expected = {"a": STACK, "b": STACK, "bias": "elementwise", "head": "head"}
    assert read(loss, params, data(B, D), ids(B)) == expected


def blocks(p, x, between=lambda h: h):
    """The same products, as of heads whose next layer is block-diagonal."""
    h = between(jnp.tanh(jnp.einsum("bd,edf->bef", x, p["a"])))
    return jnp.tanh(jnp.einsum("bef,efg->beg", h, p["b"]))


def joint_norm(h):
    return h / jnp.sqrt((h * h).mean((1, 2), keepdims=True))


def sorted_together(h):
    return jnp.sort(h.reshape(B, -1), axis=-1).reshape(h.shape)


def opaque(h):
    return h * jnp.linalg.svd(h, compute_uv=False).sum(-1)[:, None, None]


LOOK_ALIKES = {
    "a dense layer behind": lambda p, x, z: mean_square(blocks(p, x).reshape(B, -1) @ p["out"]),
    "a frozen layer behind": lambda p, x, z: mean_square(blocks(p, x).reshape(B, -1) @ z),
    "a constant layer behind": lambda p, x, z: mean_square(
        blocks(p, x).reshape(B, -1) @ jnp.ones((E * F, C))
    ),
    "one softmax": lambda p, x, z: -jax.nn.log_softmax(blocks(p, x), axis=(1, 2))[:, 0].mean(),
    "one flat softmax": lambda p, x, z: (
        -jax.nn.log_softmax(blocks(p, x).reshape(B, -1))[:, 0].mean()
    ),
    "one norm": lambda p, x, z: mean_square(blocks(p, x, joint_norm)),
    "one norm over them, and one layer": lambda p, x, z: mean_square(
        blocks(p, x, lambda h: h / jnp.sqrt((h * h).mean(1, keepdims=True))).reshape(B, -1)
        @ p["out"]
    ),
    "sorted together": lambda p, x, z: mean_square(blocks(p, x, sorted_together)),
    "a primitive without a rule": lambda p, x, z: mean_square(blocks(p, x, opaque)),
    "a dense layer of three axes behind": lambda p, x, z: mean_square(
        jnp.einsum("beg,ego->bo", blocks(p, x), p["out"].reshape(E, F, C))
    ),
    "a constant layer of three axes behind": lambda p, x, z: mean_square(
        jnp.einsum("beg,ego->bo", blocks(p, x), jnp.ones((E, F, C)))
    ),
    "a softmax between them": lambda p, x, z: mean_square(jax.nn.softmax(blocks(p, x), axis=1)),
    "weights of the batch": lambda p, x, z: mean_square(blocks(p, x) * z[:E, 0][None, :, None]),
    "a mask of the batch": lambda p, x, z: mean_square(
        blocks(p, x) * z.reshape(-1)[: B * E * F].reshape(B, E, F)
    ),
    "a loop behind": lambda p, x, z: mean_square(
        lax.scan(
            lambda h, _: (jnp.einsum("bef,efg->beg", h, p["b"]), None), blocks(p, x), length=2
        )[0].reshape(B, -1)
        @ p["out"]
    ),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_heads_of_a_block_diagonal_layer_are_no_members(name):
    params = arrays(**LAYERS, out=(E * F, C))
    if not {"dense", "loop", "layer"} & {*name.split()} or "constant" in name or "frozen" in name:
        del params["out"]
    with pytest.raises(ValueError, match=r"  a, shape \(3, 4, 6\): its axes \[0, 2\] all stay"):
        read(LOOK_ALIKES[name], params, data(B, D), data(E * F, C))


# --- Weights of classes ---------------------------------------------------------------------------


def log_chances(p, x):
    return jax.nn.log_softmax(jnp.tanh(x @ p["w"]) @ p["head"])


WEIGHTED = {
    "code first": lambda logp, code, v: -(code * logp * v[None]).sum(-1).mean(),
    "weights first": lambda logp, code, v: -(logp * v[None] * code).sum(-1).mean(),
    "weights on the code": lambda logp, code, v: -(logp * (v[None] * code)).sum(-1).mean(),
    "negative": lambda logp, code, v: (-(code * logp) * v[None]).mean(),
    "a product": lambda logp, code, v: -((code * logp) @ v).mean(),
    "einsum": lambda logp, code, v: -jnp.einsum("bc,bc,c->b", code, logp, v).mean(),
}


@pytest.mark.parametrize("how", WEIGHTED)
def test_weights_of_classes_are_no_frozen_head(how):
    def loss(p, x, y, v):
        return WEIGHTED[how](log_chances(p, x), jax.nn.one_hot(y, C), v)

    found = read(loss, arrays(w=(D, F), head=(F, C)), data(B, D), ids(B), data(C))
    assert found == {"w": ((0,), (1,)), "head": "head"}


FROZEN = {
    "a vector": lambda h, y, v: (h * v[None]).sum(-1),
    "a vector in a product": lambda h, y, v: h @ v,
    "two codes": lambda h, y, v: (h * v[None] * (one_hot(y) + one_hot(y + 1))).sum(-1),
    "a bag of codes": lambda h, y, v: (h * v[None] * one_hot(jnp.stack([y, y])).sum(0)).sum(-1),
    "the winner takes all": lambda h, y, v: (h * v[None] * one_hot(h.argmax(-1))).sum(-1),
    "the winner in a product": lambda h, y, v: (h * one_hot(h.argmax(-1))) @ v,
}


def one_hot(y):
    return jax.nn.one_hot(y, F)


@pytest.mark.parametrize("how", FROZEN)
def test_a_frozen_vector_is_no_weights_of_classes(how):
    def loss(p, x, y, v):
        return mean_square(FROZEN[how](jnp.tanh(x @ p["w"]), y, v))

    with pytest.raises(ValueError, match=r"w, shape \(4, 6\): no trained matrix after it, but"):
        read(loss, arrays(w=(D, F)), data(B, D), ids(B), data(F))


# --- Constant codes -------------------------------------------------------------------------------


def distances(p, x):
    """A bias for each head and distance, by a product with constant codes, as in t5x."""
    code = jax.nn.one_hot(jnp.arange(B)[:, None] - jnp.arange(B)[None] + B, 2 * B)
    bias = jnp.einsum("hn,qkn->hqk", p["table"], code)
    h = (x @ p["w"]).reshape(B, 2, F // 2)
    scores = jax.nn.softmax(jnp.einsum("qhw,khw->hqk", h, h) + bias)
    return mean_square(jnp.einsum("hqk,khw->qhw", scores, h).reshape(B, F) @ p["head"])


def test_a_constant_code_chooses_rows_as_a_constant_index_does():
    params = arrays(table=(2, 2 * B), w=(D, F), head=(F, C))
    expected = {"table": "elementwise", "w": ((0,), (1,)), "head": "head"}
    assert read(distances, params, data(B, D)) == expected

    def permuted(p, x):
        code = jax.nn.one_hot(jnp.array([2, 0, 1, 3]), D)
        return mean_square(jnp.tanh(x @ (code @ p["w"])) @ p["head"])

    found = read(permuted, arrays(w=(D, F), head=(F, C)), data(B, D))
    assert found == {"w": ((0,), (1,)), "head": "head"}
