"""QK-Clip: exact laws on real attention in float64, wrong clips to be rejected, errors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from muon_jax import GroupedQuery, MultiHead, MultiHeadLatent, QKClipState, muon, qk_clip
from tests.checkers import abstract, assert_trees_equal

TOKENS, HIDDEN, LATENT = 5, 6, 3


# --- Attention in float64, written from its definition -------------------------------------------


def rotated(x_thr):
    """Rotary embedding: halves of the last axis as complex numbers, turned by the position."""
    real, imaginary = np.split(x_thr, 2, axis=-1)
    turns = np.arange(TOKENS)[:, None, None] * 50.0 ** -np.arange(real.shape[-1])
    z = (real + 1j * imaginary) * np.exp(1j * turns)
    return np.concatenate([z.real, z.imag], axis=-1)


def project(x, params, width):
    kernel = np.asarray(params["kernel"], np.float64)
    out = np.tensordot(x, kernel, 1) + np.asarray(params.get("bias", 0.0), np.float64)
    return out.reshape(TOKENS, -1, width)


def logits(params, heads, x):
    """The logits of one module, `[heads, queries, keys]`."""
    if not isinstance(heads, MultiHeadLatent):
        q = rotated(project(x, params[heads.query], heads.head_dim))
        k = rotated(project(x, params[heads.key], heads.head_dim))
        k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
        return np.einsum("qhw,khw->hqk", q, k)
    nope, rope = heads.nope_dim, heads.rope_dim
    q = project(x, params["q_proj"], nope + rope)
    compressed = x @ np.asarray(params["kv_a_proj"]["kernel"], np.float64)
    k_nope = project(compressed[:, :LATENT], params["kv_b_proj"], nope + heads.v_dim)[..., :nope]
    k_rope = rotated(compressed[:, None, LATENT:])
    return np.einsum("qhw,khw->hqk", q[..., :nope], k_nope) + np.einsum(
        "qhw,kw->hqk", rotated(q[..., nope:]), k_rope[:, 0]
    )


# --- Modules: integers over 64, so that everything below is exact --------------------------------


def exact(shape, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-64, 64, shape) / 64, jnp.float32)


class Case(NamedTuple):
    """A structure, its kernels' shapes, and powers of four for its heads' gammas."""

    heads: object
    shapes: dict
    gamma: tuple
    stack: tuple = ()


def linear(out, fan_in=HIDDEN, bias=True):
    out = out if isinstance(out, tuple) else (out,)
    return {"kernel": (fan_in, *out)} | ({"bias": out} if bias else {})


LATENT_SHAPES = {
    "q_proj": linear(3 * 6),
    "kv_a_proj": linear(LATENT + 4, bias=False),
    "kv_b_proj": linear(3 * 7, LATENT),
    "o_proj": linear(HIDDEN, 3 * 5, bias=False),
}
CASES = {
    "multi-head": Case(
        MultiHead(3, 4), {"q_proj": linear(12), "k_proj": linear(12)}, (1, 1 / 4, 1 / 16)
    ),
    "multi-head, Flax's kernels": Case(
        MultiHead(3, 4, query="query", key="key"),
        {name: linear((3, 4)) for name in ("query", "key", "value")},
        (1 / 4, 1, 1),
    ),
    "grouped-query": Case(
        GroupedQuery(6, 3, 2),
        {"q_proj": linear(12), "k_proj": linear(6), "v_proj": linear(6)},
        (1 / 4, 1 / 16, 1, 1 / 4, 1 / 4, 1 / 4),
    ),
    "multi-query, Flax's kernels": Case(
        GroupedQuery(4, 1, 4),
        {"q_proj": linear((4, 4), bias=False), "k_proj": linear((1, 4), bias=False)},
        (1 / 4, 1 / 16, 1 / 4, 1 / 4),
    ),
    "latent": Case(MultiHeadLatent(3, 2, 4, 5), LATENT_SHAPES, (1 / 4, 1, 1 / 16)),
    "latent, stacked": Case(
        MultiHeadLatent(3, 2, 4, 5),
        LATENT_SHAPES,
        ((1 / 4, 1, 1 / 16), (1, 1, 1)),
        stack=(2,),
    ),
    "multi-head, Flax's kernels in two stacks": Case(
        MultiHead(2, 4),
        {"q_proj": linear((2, 4)), "k_proj": linear((2, 4))},
        (((1, 1 / 4),), ((1 / 16, 1),)),
        stack=(2, 1),
    ),
}
THRESHOLD = 8.0


def tree(case, seed):
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    shapes, structure = jax.tree.flatten(case.shapes, is_leaf=is_shape)
    leaves = [exact((*case.stack, *shape), seed + i) for i, shape in enumerate(shapes)]
    return {"layer": {"attn": structure.unflatten(leaves)}, "norm": exact((4,), seed)}


def check_clip(tx, case):
    """The logits of the new weights are gamma times those of the update alone; nothing else moves.

    Every factor is a power of two, so all of it holds bit for bit.
    """
    gamma = np.asarray(case.gamma)
    largest = jnp.where(gamma < 1, THRESHOLD / gamma, THRESHOLD)  # at the threshold: not clipped
    params, updates = tree(case, 0), tree(case, 100)
    plain = optax.apply_updates(params, updates)
    got, _ = jax.jit(tx.update)(
        updates, tx.init(params), params, max_logits={"layer/attn": jnp.asarray(largest)}
    )
    assert abstract(got) == abstract(updates)
    new = optax.apply_updates(params, got)
    x = np.asarray(exact((TOKENS, HIDDEN), 7), np.float64)
    for index in np.ndindex(case.stack):
        of_layer = lambda p, i=index: jax.tree.map(lambda leaf: leaf[i], p["layer"]["attn"])  # noqa: E731
        before, after = (logits(of_layer(p), case.heads, x) for p in (plain, new))
        assert np.abs(before).max() > 1
        np.testing.assert_array_equal(after, gamma[index][:, None, None] * before)

    clipped = {"norm": [got["norm"], updates["norm"]]}
    for name, projection in got["layer"]["attn"].items():
        for leaf, value in projection.items():
            came = updates["layer"]["attn"][name][leaf]
            lead = (*case.stack, 1) if leaf == "kernel" else case.stack
            untouched = untouched_columns(case.heads, gamma, name)
            if untouched is not None:
                rest = value.shape[len(lead) :]
                untouched = untouched.reshape(*lead, *rest)
            clipped[f"{name}/{leaf}"] = [
                np.where(True if untouched is None else untouched, part, 0)
                for part in (value, came)
            ]
    for name, (value, came) in clipped.items():
        np.testing.assert_array_equal(value, came, err_msg=name)


def untouched_columns(heads, gamma, projection):
    """Which columns `[*stack, heads, width]` no head may change; None for all of them."""
    if projection not in heads.projections:
        return None
    count, width = heads.projections[projection]
    mildest = gamma.reshape(*gamma.shape[:-1], count, -1).max(-1) == 1
    columns = np.broadcast_to(mildest[..., None], (*mildest.shape, width)).copy()
    if projection == "kv_b_proj":
        columns[..., heads.nope_dim :] = True  # the values
    return columns


@pytest.mark.parametrize("name", CASES)
def test_logits_scale_by_gamma_and_nothing_else_changes(name):
    check_clip(qk_clip({"attn$": CASES[name].heads}, THRESHOLD), CASES[name])


# --- Wrong clips ---------------------------------------------------------------------------------


class RopeByTheRoot(MultiHeadLatent):
    def factors(self, gamma):
        root = jnp.sqrt(gamma)[..., None]
        right = super().factors(gamma)
        return right | {"q_proj": jnp.broadcast_to(root, right["q_proj"].shape)}


class ValuesToo(MultiHeadLatent):
    def factors(self, gamma):
        root = jnp.sqrt(gamma)[..., None]
        right = super().factors(gamma)
        return right | {"kv_b_proj": jnp.broadcast_to(root, right["kv_b_proj"].shape)}


class LedByTheWorst(GroupedQuery):
    """The products are right, and heads below the threshold are moved."""

    def factors(self, gamma):
        groups = gamma.reshape(self.kv_heads, -1)
        keys = jnp.sqrt(groups.min(-1, keepdims=True))
        wide = lambda x: jnp.broadcast_to(x[..., None], (*x.shape, self.head_dim))  # noqa: E731
        return {"q_proj": wide((groups / keys).reshape(-1)), "k_proj": wide(keys[:, 0])}


class OtherGroups(GroupedQuery):
    """Query head h with key head h % kv_heads."""

    def factors(self, gamma):
        order = np.arange(self.heads).reshape(-1, self.kv_heads).T.reshape(-1)
        right = super().factors(gamma[order])
        return right | {"q_proj": right["q_proj"][np.argsort(order)]}


def also_the_shared_rope_key(case):
    tx = qk_clip(case.heads, THRESHOLD)

    def update(updates, state, params, *, max_logits):
        out, state = tx.update(updates, state, params, max_logits=max_logits)
        key = out["layer"]["attn"]["kv_a_proj"]["kernel"]
        out["layer"]["attn"]["kv_a_proj"]["kernel"] = key.at[:, LATENT:].multiply(0.5)
        return out, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def the_update_in_place_of_the_weights(case):
    tx = qk_clip(case.heads, THRESHOLD)

    def update(updates, state, params, *, max_logits):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return tx.update(updates, state, zeros, max_logits=max_logits)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def with_heads(kind):
    return lambda case: qk_clip(kind(**vars(case.heads)), THRESHOLD)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (with_heads(RopeByTheRoot), "latent"),
        (with_heads(ValuesToo), "latent"),
        (with_heads(LedByTheWorst), "grouped-query"),
        (with_heads(OtherGroups), "grouped-query"),
        (also_the_shared_rope_key, "latent"),
        (the_update_in_place_of_the_weights, "multi-head"),
        (lambda case: qk_clip(case.heads, 2 * THRESHOLD), "multi-head"),
    ],
)
def test_wrong_clips_are_rejected(wrong, name):
    with pytest.raises(AssertionError):
        check_clip(wrong(CASES[name]), CASES[name])


# --- Laws ----------------------------------------------------------------------------------------

HEADS = MultiHead(2, 4)
PARAMS = {"attn": {"q_proj": exact((8, 8), 0), "k_proj": {"kernel": exact((8, 8), 1)}}}
UPDATES = jax.tree.map(lambda p: jnp.sin(100 * p), PARAMS)  # not exact: roundings would show


def clip(largest, tx=None, updates=UPDATES, params=PARAMS):
    tx = qk_clip(HEADS) if tx is None else tx
    return tx.update(updates, tx.init(params), params, max_logits=jnp.asarray(largest))[0]


def test_without_a_larger_logit_the_updates_pass_bit_for_bit():
    for largest in ([100.0, -5.0], [jnp.nan, jnp.inf], [-jnp.inf, 0.0]):
        assert_trees_equal(clip(largest), UPDATES)
    changed = clip([100.5, jnp.nan])["attn"]["q_proj"]
    assert jnp.all(changed[:, :4] != UPDATES["attn"]["q_proj"][:, :4])
    np.testing.assert_array_equal(changed[:, 4:], UPDATES["attn"]["q_proj"][:, 4:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    params, updates = (jax.tree.map(lambda x: x.astype(dtype), t) for t in (PARAMS, UPDATES))
    assert_trees_equal(clip([100.0, 0.0], updates=updates, params=params), updates)
    assert abstract(clip([400.0, 0.0], updates=updates, params=params)) == abstract(updates)


def test_muonclip_under_jit_with_donation_and_in_a_scan():
    tx = optax.chain(optax.clip_by_global_norm(1.0), muon(2.0**-4), qk_clip(HEADS, 8.0))
    largest = jnp.asarray([32.0, 1.0])
    traces = []

    def step(carry, largest):
        traces.append(None)
        params, state = carry
        updates, state = tx.update(params, state, params, max_logits=largest)
        return (optax.apply_updates(params, updates), state), None

    start = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.tile(largest, (2, 1))))(start)
    traces.clear()
    compiled = jax.jit(step, donate_argnums=0)
    carry, _ = compiled(start, largest)
    carry, _ = compiled(carry, largest)
    assert len(traces) == 1
    assert abstract(carry) == abstract((PARAMS, tx.init(PARAMS)))
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)

    # The first head's weights are half of plain Muon's after a step, the second's the same.
    plain = optax.chain(optax.clip_by_global_norm(1.0), muon(2.0**-4))
    updates, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS)
    muons = optax.apply_updates(PARAMS, updates)["attn"]["q_proj"]
    ours, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, max_logits=largest)
    ours = optax.apply_updates(PARAMS, ours)["attn"]["q_proj"]
    np.testing.assert_allclose(ours[:, :4], 0.5 * muons[:, :4], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(ours[:, 4:], muons[:, 4:])


@pytest.mark.parametrize("every", [3, lambda step: 3 - step], ids=["3", "a schedule"])
def test_behind_multi_steps_the_maximum_of_the_micro_batches_counts(every):
    """The largest logit comes in the first of three micro-batches, then never again."""
    inner = optax.MultiSteps(optax.scale(1.0), every_k_schedule=every)
    tx = optax.chain(inner.gradient_transformation(), qk_clip(HEADS, 8.0, every_k_schedule=every))
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    assert isinstance(state[1], QKClipState)
    steps = []
    for largest in ([32.0, 1.0], [4.0, 8.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]):
        updates, state = update(UPDATES, state, PARAMS, max_logits=jnp.asarray(largest))
        steps.append(updates)
    zeros = jax.tree.map(jnp.zeros_like, UPDATES)
    assert_trees_equal(steps[0], zeros)
    assert_trees_equal(steps[1], zeros)
    plain, plain_state = inner.update, inner.init(PARAMS)
    for _ in range(3):
        mean, plain_state = plain(UPDATES, plain_state, PARAMS)
    assert_trees_equal(steps[2], clip([32.0, 8.0], qk_clip(HEADS, 8.0), updates=mean))
    assert state[1].step == (1 if every == 3 else 2)
    assert_trees_equal(steps[3], zeros)
    if every != 3:
        assert jnp.any(steps[4]["attn"]["q_proj"])  # the second step is of two micro-batches
        assert not jnp.any(jnp.isfinite(state[1].max_logits["attn"]))


@pytest.mark.parametrize("every", [1, 2, lambda step: 2])
def test_the_state_has_its_types_from_init_on(every):
    """A weakly typed state would compile the step twice."""
    tx = qk_clip(HEADS, 8.0, every_k_schedule=every)
    state = tx.init(PARAMS)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(UPDATES, state, PARAMS, max_logits=jnp.ones(2))
    assert update._cache_size() == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_state_lies_there_from_init_on(kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("data", "tensor")))
    tx = qk_clip(HEADS, 8.0, every_k_schedule=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params, max_logits=jnp.ones(2))
    assert update._cache_size() == 1


def test_inject_hyperparams_sets_the_threshold():
    tx = optax.inject_hyperparams(qk_clip)({"attn": HEADS}, threshold=8.0)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    largest = jnp.asarray([16.0, 1.0])
    first, _ = update(UPDATES, state, PARAMS, max_logits=largest)
    state.hyperparams["threshold"] = jnp.float32(16.0)
    second, _ = update(UPDATES, state, PARAMS, max_logits=largest)
    expected = jax.jit(qk_clip(HEADS, 8.0).update)(
        UPDATES, optax.EmptyState(), PARAMS, max_logits=largest
    )[0]
    assert_trees_equal(first, expected)
    assert_trees_equal(second, UPDATES)
    assert update._cache_size() == 1


@pytest.mark.bits
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_and_logits(kind):
    """Heads over one axis, inputs over the other, logits over heads: the same bits, laid out so."""
    mesh = jax.make_mesh((2, 3), ("data", "tensor"), axis_types=(kind,) * 2)
    case = CASES["latent, stacked"]
    params, updates = tree(case, 0), tree(case, 100)
    attn = {"params": params["layer"]["attn"], "updates": updates["layer"]["attn"]}
    largest = jnp.asarray([[32.0, 2.0, 128.0], [8.0, 9.0, 1.0]])
    tx = qk_clip(case.heads, THRESHOLD)
    expected, _ = jax.jit(tx.update)(
        attn["updates"], tx.init(attn["params"]), attn["params"], max_logits=largest
    )
    specs = {
        "q_proj": {"kernel": P(None, "data", "tensor"), "bias": P(None, "tensor")},
        "kv_a_proj": {"kernel": P("data")},
        "kv_b_proj": {"kernel": P("data", None, "tensor"), "bias": P("data")},
        "o_proj": {"kernel": P()},
    }
    sharded = {
        name: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), part, specs)
        for name, part in attn.items()
    }
    got, _ = jax.jit(tx.update)(
        sharded["updates"],
        tx.init(sharded["params"]),
        sharded["params"],
        max_logits=jax.device_put(largest, NamedSharding(mesh, P(None, "tensor"))),
    )
    assert_trees_equal(jax.device_get(got), jax.device_get(expected))
    layouts = jax.tree.map(lambda x: x.sharding.spec, got)
    assert layouts["q_proj"]["kernel"] == specs["q_proj"]["kernel"]


def test_the_maximum_over_mapped_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = qk_clip(HEADS, 8.0, axis_name="data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    def step(updates, params, largest):
        return tx.update(updates, optax.EmptyState(), params, max_logits=largest[0])[0]

    largest = jnp.ones((8, 2)).at[5].set(jnp.asarray([32.0, 2.0]))
    expected = jax.jit(qk_clip(HEADS, 8.0).update)(
        UPDATES, optax.EmptyState(), PARAMS, max_logits=largest.max(0)
    )[0]
    assert_trees_equal(step(UPDATES, PARAMS, largest), expected)


def test_flax_attention_in_nnx_optimizer():
    """Paths end in `.value` in init and not in update; the module's own logits are clipped."""

    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(
                nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(i)) for i in range(2)
            )

    model = Net()
    heads = MultiHead(2, 4, query="query", key="key")
    optimizer = nnx.Optimizer(model, optax.chain(muon(0.0), qk_clip(heads)), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    largest = {f"layers/{i}": jnp.asarray([400.0 if i else 1.0, 1.0]) for i in range(2)}
    optimizer.update(model, jax.tree.map(jnp.ones_like, before), max_logits=largest)
    after = nnx.state(model, nnx.Param)
    old, new = (s["layers"][1]["query"]["kernel"][...] for s in (before, after))
    np.testing.assert_allclose(new[:, 0], 0.5 * old[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(new[:, 1], old[:, 1])
    assert_trees_equal(after["layers"][0], before["layers"][0])


# --- Errors --------------------------------------------------------------------------------------

ARRAY = jnp.ones((8, 8))
GOOD = {"q_proj": ARRAY, "k_proj": ARRAY}
LARGEST = jnp.ones(2)


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: MultiHead(0, 4), ValueError, "MultiHead.heads must be a positive whole"),
        (lambda: GroupedQuery(4, 2.0, 4), ValueError, "GroupedQuery.kv_heads must be .*got 2.0"),
        (lambda: GroupedQuery(4, 3, 4), ValueError, "4 query heads do not divide into 3 groups"),
        (lambda: MultiHead(2, 4, check_qk_norm="no"), TypeError, "must be True or False.*'no'"),
        (lambda: MultiHead(2, 4, query=3), TypeError, "MultiHead.query must be the name.*got 3"),
        (lambda: MultiHead(2, 4, "a", "a"), ValueError, "MultiHead: query and key are both 'a'"),
        (lambda: qk_clip({b"attn": HEADS}), ValueError, "b'attn' is no regular expression"),
        (lambda: qk_clip(HEADS, jnp.ones(2)), TypeError, r"threshold must be a number.* \(2,\)"),
        (lambda: qk_clip(HEADS, axis_name=0), TypeError, "axis_name must name .*got 0"),
        (
            lambda: qk_clip(HEADS, every_k_schedule=jnp.ones(())),
            ValueError,
            "every_k_schedule must",
        ),
        (lambda: qk_clip(HEADS, every_k_schedule=jnp.asarray([2])), ValueError, "every_k_schedule"),
        (lambda: qk_clip(HEADS, every_k_schedule=jnp.asarray(0)), ValueError, "at least 1 .*got"),
        (
            lambda: qk_clip(HEADS, every_k_schedule=lambda: 2),
            TypeError,
            "must take the count of st",
        ),
        (lambda: qk_clip({}), TypeError, "takes the structure of the heads.*got {}"),
        (lambda: qk_clip("attn"), TypeError, "takes the structure of the heads.*got 'attn'"),
        (lambda: qk_clip({"attn": 8}), TypeError, "'attn' maps to 8; use MultiHead"),
        (lambda: qk_clip({"(": HEADS}), ValueError, r"'\(' is no regular expression"),
        (lambda: qk_clip(HEADS, threshold=-1.0), ValueError, "threshold must be at least 0"),
        (lambda: qk_clip(HEADS, threshold=0), ValueError, "threshold must be positive; got 0"),
        (lambda: qk_clip(HEADS, every_k_schedule=0), ValueError, "at least 1 .*got 0"),
    ],
)
def test_bad_arguments_raise(untyped, make, error, why):
    with pytest.raises(error, match=why):
        make()


@pytest.mark.parametrize(
    ("attention", "params", "why"),
    [
        ({"mlp": HEADS}, {"attn": GOOD}, "'mlp' finds no module .*that have one are attn"),
        ({"": HEADS, "attn": HEADS}, {"attn": GOOD}, "'attn' finds no module"),
        (HEADS, {"w": ARRAY}, "projection 'q_proj' .*the parameters are w. Mend"),
        (HEADS, {"q_proj": ARRAY, "v_proj": ARRAY}, "no projection 'k_proj' .*it has q_proj, v_p"),
        (HEADS, GOOD | {"k_proj": {"weight": ARRAY}}, "k_proj must be a kernel.*k_proj/weight"),
        (
            HEADS,
            GOOD | {"q_proj": {"kernel": ARRAY, "lora_a": ARRAY}},
            "q_proj must be a kernel .*it holds q_proj/lora_a. Merge adapters",
        ),
        (HEADS, GOOD | {"q_proj": {"bias": jnp.ones(8)}}, "q_proj must .*it holds q_proj/bias"),
        (
            HEADS,
            GOOD | {"k_proj": jnp.ones((8, 6))},
            r"k_proj has shape \(8, 6\); expected \[..., in, 8\] or \[..., in, 2, 4\]",
        ),
        (HEADS, GOOD | {"k_proj": jnp.ones(8)}, r"k_proj has shape \(8,\)"),
        (
            HEADS,
            GOOD | {"q_proj": {"kernel": ARRAY, "bias": jnp.ones(4)}},
            r"q_proj/bias has shape \(4,\); expected \(8,\) or \(2, 4\)",
        ),
        (
            HEADS,
            {"q_proj": jnp.ones((3, 8, 8)), "k_proj": ARRAY},
            r"stacked differently, by leading axes of q_proj \(3,\), k_proj \(\)",
        ),
        (HEADS, GOOD | {"q_norm": {"scale": jnp.ones(4)}}, "has a 'q_norm': queries or keys are"),
        (HEADS, GOOD | {"key_ln": {"scale": jnp.ones(4)}}, "has a 'key_ln': queries or keys are"),
        (
            MultiHeadLatent(2, 2, 2, 2),
            {"q_proj": ARRAY, "kv_b_proj": ARRAY, "q_norm": jnp.ones(8)},
            "has a 'q_norm'",
        ),
    ],
)
def test_modules_that_cannot_be_clipped_raise(attention, params, why):
    tx = qk_clip(attention)
    with pytest.raises(ValueError, match=why):
        tx.init(params)
    with pytest.raises(ValueError, match=why):
        tx.update(params, optax.EmptyState(), params, max_logits=LARGEST)


def test_the_norm_of_a_low_rank_query_is_no_qk_norm():
    """DeepSeek's own code calls it q_norm; it normalises what goes into the second projection."""
    params = {"wq_b": jnp.ones((3, 8)), "kv_b_proj": ARRAY, "q_norm": jnp.ones(3)}
    tx = qk_clip(MultiHeadLatent(2, 2, 2, 2, query="wq_b"))
    assert tx.init(params) == optax.EmptyState()


# --- Gains of norms under names that are not known ---

GAIN = jnp.ones(4)
MLA = MultiHeadLatent(2, 3, 1, 3, query="q_b_proj")


def latent(query_rank, rank, **norms):
    return {"q_b_proj": jnp.ones((query_rank, 8)), "kv_b_proj": jnp.ones((rank, 12))} | norms


@pytest.mark.parametrize(
    ("heads", "params", "path"),
    [
        (HEADS, GOOD | {"RMSNorm_0": {"scale": GAIN}}, r"RMSNorm_0/scale, shape \(4,\)"),
        (HEADS, GOOD | {"RMSNorm_0": {"scale": jnp.ones(8)}}, "RMSNorm_0/scale.*of all heads"),
        (HEADS, GOOD | {"norm": {"bias": GAIN}}, "norm/bias"),
        (HEADS, GOOD | {"a": {"b": {"weight": GAIN}}}, "a/b/weight"),
        (HEADS, GOOD | {"a": {"q_norm": {"weight": jnp.ones(3)}}}, "a/q_norm/weight.*its name"),
        (HEADS, GOOD | {"q_gain": GAIN}, "q_gain"),
        (HEADS, GOOD | {"norm": {"scale": jnp.ones((1, 1, 4))}}, "norm/scale"),
        (HEADS, GOOD | {"norm": {"scale": jnp.ones((2, 4))}}, "norm/scale"),
        (GroupedQuery(4, 2, 2), {"q_proj": ARRAY, "k_proj": ARRAY[:, :4], "n": GAIN}, "n, shape"),
        (
            HEADS,
            {"q_proj": jnp.ones((3, 8, 8)), "k_proj": jnp.ones((3, 8, 8)), "n": jnp.ones((3, 4))},
            r"n, shape \(3, 4\)",
        ),
        (MLA, latent(6, 5, norm=jnp.ones(3)), "norm, shape"),
        (MLA, latent(6, 5, norm=jnp.ones(8)), "norm, shape"),
        (MLA, latent(6, 4, norm=jnp.ones(4)), "norm, shape"),
        (MLA, latent(6, 5, kv_a_layernorm=jnp.ones(4)), "kv_a_layernorm, shape"),
        (MLA, latent(4, 5, q_norm=jnp.ones(4)), "has a 'q_norm'"),
    ],
)
def test_a_gain_as_long_as_a_head_raises_whatever_its_name(heads, params, path):
    why = f"{path}.*scaling these changes no logit"
    with pytest.raises(ValueError, match=why):
        qk_clip(heads).init({"attn": params})


@pytest.mark.parametrize(
    ("heads", "params"),
    [
        (HEADS, GOOD | {"norm": jnp.ones(3), "temperature": jnp.ones(()), "sinks": GAIN}),
        (HEADS, GOOD | {"v_proj": {"kernel": ARRAY, "bias": jnp.ones(8)}, "b_o": jnp.ones(8)}),
        (HEADS, GOOD | {"value": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}}),
        (MultiHead(2, 4, check_qk_norm=False), GOOD | {"pre_norm": {"scale": jnp.ones(8)}}),
        (MLA, latent(7, 5, RMSNorm_0=jnp.ones(7), RMSNorm_1=jnp.ones(5))),
        # Ranks as long as a head: only the names tell.
        (MLA, latent(4, 8, q_a_layernorm={"scale": GAIN}, kv_a_layernorm={"scale": jnp.ones(8)})),
        (MLA, latent(6, 3, q_norm=jnp.ones(6), kv_norm=jnp.ones(3))),
    ],
)
def test_gains_of_other_vectors_are_none_of_queries_or_keys(heads, params):
    qk_clip(heads).init({"attn": params, "norm": {"scale": GAIN}})


TWO = {"a": GOOD, "b": GOOD}


@pytest.mark.parametrize(
    ("params", "options", "error", "why"),
    [
        ({"a": GOOD}, {}, TypeError, r"needs the largest attention logits.*{'a': \[2\]}"),
        (TWO, {"max_logits": LARGEST}, TypeError, "map the paths of 2 modules"),
        (TWO, {"max_logits": {"a": LARGEST}}, ValueError, "lacks 'b' of the modules"),
        (
            {"a": GOOD},
            {"max_logits": {"a": LARGEST, "c": LARGEST}},
            ValueError,
            "names 'c', which is none of the modules",
        ),
        (
            {"a": GOOD},
            {"max_logits": jnp.ones((4, 2))},
            ValueError,
            r"\['a'\] has shape \(4, 2\); expected \(2,\), .*maximum over micro-batches",
        ),
        ({"a": GOOD}, {"max_logits": jnp.ones(2, int)}, TypeError, "dtype int32; expected logits"),
        ({"a": GOOD}, {"max_logits": [1.0, 2.0]}, TypeError, r"\['a'\] must be an array.*got list"),
        (
            {"a": GOOD},
            {"max_logits": {"a": 1.0}},
            TypeError,
            r"\['a'\] must be an array.*got float",
        ),
    ],
)
def test_bad_logits_raise(params, options, error, why):
    tx = qk_clip(HEADS)
    with pytest.raises(error, match=why):
        tx.update(params, tx.init(params), params, **options)


def test_schedules_states_and_axes_that_do_not_fit_raise():
    for wrong in ("two", 2.5, jnp.asarray([2, 3])):
        tx = qk_clip(HEADS, every_k_schedule=lambda step, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="at least 1 from its function; it returned"):
            tx.update(GOOD, tx.init(GOOD), GOOD, max_logits=LARGEST)
    often, once = qk_clip(HEADS, every_k_schedule=2), qk_clip(HEADS)
    with pytest.raises(TypeError, match=r"type EmptyState; expected .* a QKClipState"):
        often.update(GOOD, once.init(GOOD), GOOD, max_logits=LARGEST)
    with pytest.raises(TypeError, match=r"state of type QKClipState; expected .*EmptyState\(\)"):
        once.update(GOOD, often.init(GOOD), GOOD, max_logits=LARGEST)
    with pytest.raises(ValueError, match="axis_name='data' names an axis that is not mapped here"):
        clip([1.0, 1.0], qk_clip(HEADS, axis_name="data"))


def test_updates_and_kernels_that_do_not_fit_raise():
    tx, state = qk_clip(HEADS), optax.EmptyState()
    with pytest.raises(ValueError, match="qk_clip: the updates' tree differs from that of the par"):
        tx.update({"q_proj": ARRAY}, state, GOOD, max_logits=LARGEST)
    narrow = GOOD | {"k_proj": jnp.ones((8, 1))}  # would broadcast
    with pytest.raises(ValueError, match=r"k_proj has shape \(8, 8\), but its update has \(8, 1\)"):
        tx.update(narrow, state, GOOD, max_logits=LARGEST)
    with pytest.raises(TypeError, match="k_proj has dtype int32; only floating-point weights"):
        tx.init(GOOD | {"k_proj": jnp.ones((8, 8), int)})


def test_missing_parameters_or_updates_raise():
    tx = qk_clip(HEADS)
    with pytest.raises(ValueError, match="scales weights and needs them"):
        tx.update(GOOD, tx.init(GOOD), max_logits=LARGEST)
    with pytest.raises(ValueError, match="k_proj has no update, so its weights cannot be clipped"):
        tx.update(GOOD | {"k_proj": None}, tx.init(GOOD), GOOD, max_logits=LARGEST)
