"""Factors of adapters: known by name, their axes by the factor beside; qwix's among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muon_jax import by_path, muon, routing_report
from muon_jax._common.paths import show
from muon_jax._routing.route_leaves import route_leaves

qwix = pytest.importorskip("qwix", reason="qwix is part of the test extra")

pytestmark = pytest.mark.one_stack


def found(rules=None, **leaves):
    """The matrices of each leaf, `(batch, rows, columns)`; None for AdamW."""
    params = {
        path.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in leaves.items()
    }
    routes, _ = route_leaves(params, rules)
    return [route.views[0].matrices if route.views else None for route in routes]


@pytest.mark.parametrize(
    ("a", "b"), [("lora_a", "lora_b"), ("lora_A", "lora_B"), ("kernel_lora_a", "kernel_lora_b")]
)
@pytest.mark.parametrize("module", ["embedder", "attn__q_einsum", "moe__router", "norm"])
@pytest.mark.parametrize("leaf", ["", "__kernel"])
def test_factors_are_known_by_name(a: str, b: str, module: str, leaf: str):
    leaves = {f"{module}__{a}{leaf}": (6, 16, 4), f"{module}__{b}{leaf}": (4, 64)}
    assert found(**leaves) == [(1, 96, 4), (1, 4, 64)]


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "matrices"),
    [
        ((64, 4), (4, 96), [(1, 64, 4), (1, 4, 96)]),
        # qwix's, of a projection to heads and of one from heads, in an einsum.
        ((64, 4), (4, 6, 16), [(1, 64, 4), (1, 4, 96)]),
        ((6, 16, 4), (4, 64), [(1, 96, 4), (1, 4, 64)]),
        # As many heads as the rank, of both.
        ((8, 16, 8), (8, 64), [(1, 128, 8), (1, 8, 64)]),
        ((64, 8), (8, 8, 16), [(1, 64, 8), (1, 8, 128)]),
        # A convolution's.
        ((3, 3, 16, 4), (4, 32), [(1, 144, 4), (1, 4, 32)]),
        # Stacks that nothing names.
        ((5, 64, 4), (5, 4, 96), [(5, 64, 4), (5, 4, 96)]),
        ((5, 6, 16, 4), (5, 4, 64), [(5, 96, 4), (5, 4, 64)]),
        ((2, 5, 64, 4), (2, 5, 4, 96), [(10, 64, 4), (10, 4, 96)]),
    ],
    ids=str,
)
def test_factors_are_matrices_along_their_axes(a_shape, b_shape, matrices):
    assert found(q__w_lora_a=a_shape, q__w_lora_b=b_shape) == matrices


def test_a_norm_of_two_axes_beside_makes_no_stack_of_a_factor():
    leaves = {"layers__0__q__w_lora_a": (4, 16, 4), "layers__0__q__w_lora_b": (4, 6, 3)}
    assert found(**leaves, layers__0__norm__scale=(4, 5))[1:] == [(1, 64, 4), (1, 4, 18)]


def test_a_named_stack_needs_no_other_factor_and_may_be_as_long_as_the_rank():
    leaves = {"layers__q__lora_a": (4, 64, 4), "layers__q__lora_b": (4, 4, 6, 16)}
    assert found(**leaves) == [(4, 64, 4), (4, 4, 96)]
    assert found(layers__q__lora_a=(3, 64, 4), layers__k__lora_a=(3, 64, 4)) == 2 * [(3, 64, 4)]


@pytest.mark.parametrize(
    "leaves",
    [
        {"q__lora_a": (4, 64, 4), "q__lora_b": (4, 4, 96)},
        {"q__lora_a": (6, 64, 4)},
        {"q__lora_a": (6, 64, 4), "q__lora_b": (5, 4, 96)},
        {"q__lora_b": (4, 6, 16), "k__lora_a": (64, 4)},
        # As many experts as the rank, which B has without them.
        {"experts__w_lora_a": (4, 64, 4), "experts__w_lora_b": (4, 96)},
    ],
    ids=str,
)
def test_what_the_other_factor_leaves_open_is_asked(leaves):
    with pytest.raises(ValueError, match=r"factor of an adapter \(LoRA\), and the shape of the"):
        found(**leaves)


def test_factors_of_a_head_and_of_rank_one_go_to_adamw():
    assert found(lm_head__kernel_lora_a=(64, 4), lm_head__kernel_lora_b=(4, 900)) == [None, None]
    assert found(q__lora_a=(64, 1), q__lora_b=(1, 96)) == [None, None]
    assert found(attn__head__lora_a=(64, 4), attn__head__lora_b=(4, 96))[0] == (1, 64, 4)


def test_the_report_says_what_they_are():
    params = {"layers": {"q": {"lora_a": jnp.ones((3, 64, 4)), "lora_b": jnp.ones((3, 4, 96))}}}
    text = str(routing_report(params))
    assert "LoRA factor [in, r], stack under layers" in text
    assert "LoRA factor [r, out], stack under layers" in text


def test_one_pattern_gives_a_to_adamw():
    """As docs/routing.md writes it."""
    rules = by_path({r"(?i)lora_a\b": None})
    leaves = {"q__kernel_lora_a": (64, 4), "q__kernel_lora_b": (4, 6, 16)}
    assert found(rules, **leaves) == [None, (1, 4, 96)]
    assert found(rules, q__lora_A__kernel=(64, 4), q__lora_B__kernel=(4, 96)) == [None, (1, 4, 96)]


class Attentive(nnx.Module):
    """A model that is nobody's: heads by einsum, and a head that is adapted, too."""

    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = nnx.Einsum("bd,dnh->bnh", (16, 4, 6), rngs=rngs)
        self.o_proj = nnx.Einsum("bnh,nhd->bd", (4, 6, 16), rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.lm_head = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lm_head(jax.nn.relu(self.up(x + self.o_proj(self.q_proj(x)))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax, for what qwix calls
def test_a_step_with_qwix_needs_no_word():
    x = jax.random.normal(jax.random.key(0), (32, 16))
    y = jnp.arange(32) % 5
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    model = qwix.apply_lora_to_model(Attentive(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    factors = jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))
    routes, _ = route_leaves(factors)
    matrices = {show(r.path): r.views[0].matrices if r.views else None for r in routes}
    assert matrices == {
        "lm_head/kernel_lora_a": None,
        "lm_head/kernel_lora_b": None,
        "o_proj/kernel_lora_a": (1, 24, 2),
        "o_proj/kernel_lora_b": (1, 2, 16),
        "q_proj/kernel_lora_a": (1, 16, 2),
        "q_proj/kernel_lora_b": (1, 2, 24),
        "up/kernel_lora_a": (1, 16, 2),
        "up/kernel_lora_b": (1, 2, 24),
    }
    base = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.LoRAParam)))
    optimizer = nnx.Optimizer(model, muon(3e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            logits = jax.nn.log_softmax(model(x))
            return -jnp.take_along_axis(logits, y[:, None], axis=1).mean()

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    after = nnx.state(model, nnx.LoRAParam)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, factors)
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Not(nnx.LoRAParam)), base)
