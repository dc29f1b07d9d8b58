"""Programs built at random of layers whose roles are known: the reading is right, or a doubt.

The parameters are named at random too: no name may matter.
"""

import hypothesis
import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

from muon_jax import by_use
from tests.use.use_programs import S, ids, mean_square, read

D, V, B, T = 8, 11, 2, 6
TEMPTING = [
    "kernel", "bias", "embedding", "lm_head", "scale", "wq", "wo", "experts", "layers", "norm",
    "out", "query", "router", "head", "moe", "conv",
]  # fmt: skip


def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def turned(p, x):
    return jnp.tanh(jnp.einsum("oi,bti->bto", p["w"], x))


def narrow(p, x):
    return x + jnp.maximum(x @ p["down"], 0) @ p["up"]


def gain(p, x):
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * scale * p["g"]


def positions(p, x):
    return x + p["t"]


def stack(p, x):
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["ws"])[0]


def stack_along_1(p, x):
    return lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ p["ws"][:, i]), x)


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhw->bthw", x, p[n]) for n in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bqhw,bkhw->bhqk", q, k))
    return x + jnp.einsum("bqhw,hwd->bqd", jnp.einsum("bhqk,bkhw->bqhw", weights, v), p["o"])


def experts(p, x):
    h = jnp.tanh(jnp.einsum("btd,edf->btef", x, p["into"]))
    y = jnp.einsum("btef,efd->bted", h, p["back"])
    return x + jnp.einsum("bted,bte->btd", y, jax.nn.softmax(x @ p["gate"]))


def convolution(p, x):
    return x + lax.conv_general_dilated(
        x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


M = (0,), (1,)
LAYERS = [
    (dense, {"w": (D, D), "b": (1, 1, D)}, {"w": M, "b": "vector"}),
    (turned, {"w": (D, D)}, {"w": ((1,), (0,))}),
    (narrow, {"down": (D, 3), "up": (3, D)}, {"down": M, "up": M}),
    (gain, {"g": (1, 1, D)}, {"g": "vector"}),
    (positions, {"t": (1, T, D)}, {"t": "elementwise"}),
    (stack, {"ws": (3, D, D)}, {"ws": ((1,), (2,))}),
    (stack_along_1, {"ws": (D, 3, D)}, {"ws": ((0,), (2,))}),
    (
        attention,
        {"q": (D, 2, 4), "k": (D, 2, 4), "v": (D, 2, 4), "o": (2, 4, D)},
        {**dict.fromkeys("qkv", ((0,), (1, 2))), "o": ((0, 1), (2,))},
    ),
    (
        experts,
        {"into": (3, D, 5), "back": (3, 5, D), "gate": (D, 3)},
        {"into": ((1,), (2,)), "back": ((1,), (2,)), "gate": M},
    ),
    (convolution, {"k": (3, D, D)}, {"k": ((0, 1), (2,))}),
]


@st.composite
def models(draw):
    """A loss, its parameters, and what each of them is."""
    chosen = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5))
    remat = draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    names = draw(
        st.lists(
            st.tuples(st.sampled_from(TEMPTING), st.sampled_from(TEMPTING), st.integers(0, 999)),
            min_size=40, max_size=40, unique=True,
        )
    )  # fmt: skip
    names = iter(f"{a}/{b}_{n}" for a, b, n in names)
    tied = draw(st.booleans())
    params, roles, layers = {}, {}, []
    table, head = next(names), next(names)
    params[table], roles[table] = S((V, D), jnp.float32), "embedding"
    if not tied:
        params[head], roles[head] = S((D, V), jnp.float32), "head"
    for (function, shapes, expected), again in zip(chosen, remat, strict=True):
        called = {key: next(names) for key in shapes}
        params |= {called[key]: S(shape, jnp.float32) for key, shape in shapes.items()}
        roles |= {called[key]: expected[key] for key in shapes}
        layers.append((jax.checkpoint(function) if again else function, called))

    def loss(params, tokens):
        x = params[table][tokens]
        for function, called in layers:
            x = function({key: params[name] for key, name in called.items()}, x)
        return mean_square(x @ (params[table].T if tied else params[head]))

    return loss, params, roles


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(models())
def test_random_models_are_read_right_whatever_their_names(model):
    loss, params, roles = model
    with jax.numpy_rank_promotion("allow"):
        assert read(loss, params, ids(B, T)) == roles


# --- The derivatives as a witness -----------------------------------------------------------------


def _mixes(layer, params, name, axis, x):
    """Whether slices of a leaf along an axis meet within one application of a layer.

    A stack's slices act on their own: of a layer that is linear in the leaf, the second derivative
    by two slices vanishes. Fan-in and fan-out pass this test too where a layer is linear in them,
    so the layer is squared entry by entry first: then what is summed over mixes.
    """

    def loss(leaf):
        return layer({**params, name: leaf}, x)

    leaf = params[name]
    first = jnp.zeros_like(leaf).at[(slice(None),) * axis + (0,)].set(1.0)
    second = jnp.zeros_like(leaf).at[(slice(None),) * axis + (1,)].set(1.0)
    _, mixed = jax.jvp(lambda w: jax.jvp(loss, (w,), (first,))[1], (leaf,), (second,))
    return bool(jnp.abs(mixed).max() > 1e-6)


def test_the_slices_of_a_stack_do_not_mix_where_the_reading_says_stack():
    """Of experts one sees it by derivatives: only along the axes of a matrix do slices mix."""
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def layer(p, x):
        h = jnp.einsum("nd,edf->nef", x, p["into"]) ** 2
        return (jnp.einsum("nef,efd->ned", h, p["back"]) ** 2).sum(-1)

    shapes = {"into": (3, D, 5), "back": (3, 5, D)}
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    x = jax.random.normal(next(keys), (4, D))

    def loss(p, x):
        y = jnp.einsum(
            "ne,ned->nd",
            x @ p["gate"],
            jnp.einsum("nef,efd->ned", jnp.einsum("nd,edf->nef", x, p["into"]) ** 2, p["back"])
            ** 2,
        )
        return mean_square(y @ p["head"])  # fmt: skip

    abstract = {name: S(shape, jnp.float32) for name, shape in shapes.items()}
    abstract |= {"gate": S((D, 3), jnp.float32), "head": S((D, 2), jnp.float32)}
    for reading in by_use(loss, abstract, S((4, D), jnp.float32)).readings:
        name = reading.path[0]
        if name in shapes:
            spec = reading.spec
            matrix = {*spec.reduction_axis, *spec.output_axis}
            for axis in range(3):
                per_expert = _mixes(layer, params, name, axis, x)
                # What is summed over mixes under the square; a stack's slices never do.
                assert per_expert is (axis in spec.reduction_axis) or (
                    axis in matrix and axis not in spec.reduction_axis
                )
                if axis not in matrix:
                    assert not per_expert
