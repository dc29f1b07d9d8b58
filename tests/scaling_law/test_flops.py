"""The formulas against what XLA counts in the programs that they are about."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import muon_jax
from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.language_model import count_parameters, next_token_loss
from examples.scaling_law.flops import PETAFLOP_DAY, newton_schulz, per_token

pytestmark = pytest.mark.one_stack

# XLA also counts norms, softmax and the like: measured 0.6% to 1.3% of a model, and 1.1% of a step.
MODEL_TOLERANCE, STEP_TOLERANCE = 0.02, 0.02


def counted(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of the compiled program."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


# --- a token --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hidden, intermediate, vocab, time",
    [(192, 640, 64, 64), (128, 256, 2048, 64), (128, 256, 64, 1024)],
    ids=["body", "head", "attention"],
)
def test_a_token_costs_what_xla_counts(hidden, intermediate, vocab, time):
    config = DenseConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=intermediate,
        max_position_embeddings=time,
    )
    # Written out: XLA counts a loop's body once. With all queries at a time: the whole square.
    execution = Execution(unroll=True)
    model = nnx.eval_shape(lambda: Dense(config, rngs=nnx.Rngs(0), execution=execution))
    graphdef, params = nnx.split(model)

    def loss(params: nnx.State, tokens_bt: jax.Array) -> jax.Array:
        return next_token_loss(nnx.merge(graphdef, params), tokens_bt)[0]

    tokens_bt = jax.ShapeDtypeStruct((1, time + 1), jnp.int32)
    found = counted(jax.value_and_grad(loss), params, tokens_bt) / time

    sizes = {"hidden": hidden, "layers": 2, "attention_width": hidden, "vocab": vocab}
    body = count_parameters(model).body
    # Twice the sequence's causal half is its square.
    square = per_token(body=body, sequence_length=2 * time, **sizes)[1]
    assert found == pytest.approx(square, rel=MODEL_TOLERANCE)


def test_the_terms_of_a_token():
    # 6 N; 6 of the head; two products of 100 / 2 keys on average with 64 columns, 2 FLOPs each,
    # in 3 layers, forward and twice backward.
    body, whole = per_token(
        body=1000, hidden=32, layers=3, attention_width=64, sequence_length=100, vocab=256
    )
    assert body == 6 * 1000
    assert whole - body == 6 * 32 * 256 + 3 * 3 * (2 * 2 * 50 * 64)


def test_the_unit_of_the_papers_compute():
    assert pytest.approx(8.64e19) == PETAFLOP_DAY


# --- Newton-Schulz --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(512, 608), (608, 512), (608, 608)], ids=str)
def test_a_step_of_newton_schulz_costs_what_xla_counts(shape):
    """Below the sizes of which CPUs mirror a part: the study counts whole products."""

    def step(x: jax.Array) -> jax.Array:
        return muon_jax.orthogonalize(x, ns_steps=1)

    found = counted(step, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert found == pytest.approx(newton_schulz([shape], "standard", 1), rel=STEP_TOLERANCE)


def flops_of_products(jaxpr: Any) -> int:
    """FLOPs of a program's matrix products, those of loops as often as they run."""
    count = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            count += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        if name == "cond":  # one branch for each kind of device
            count += max(flops_of_products(branch.jaxpr) for branch in params["branches"])
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None:
            count += params.get("length", 1) * flops_of_products(inner.jaxpr)
    return count


@pytest.mark.parametrize(
    "ns_coeffs, ns_steps",
    [*((name, None) for name in muon_jax.SCHEDULES), ("standard", 3), ("polar_express", 10)],
)
def test_what_is_counted_is_what_the_library_multiplies(ns_coeffs, ns_steps):
    """Or more than that, where it takes two steps at once: of 4x8, and not of 4x6."""

    def multiplied(shape):
        jaxpr = jax.make_jaxpr(
            lambda x: muon_jax.orthogonalize(x, ns_coeffs=ns_coeffs, ns_steps=ns_steps)
        )(jax.ShapeDtypeStruct(shape, jnp.float32))
        return flops_of_products(jaxpr.jaxpr)

    assert newton_schulz([(4, 6)], ns_coeffs, ns_steps) == multiplied((4, 6))
    assert newton_schulz([(4, 8)], ns_coeffs, ns_steps) > multiplied((4, 8))


def test_matrices_add_up_whichever_side_is_first():
    shapes = [(4, 8), (16, 4), (3, 3)]
    together = newton_schulz(shapes, "standard", None)
    assert together == sum(newton_schulz([shape], "standard", None) for shape in shapes)
    assert together == newton_schulz([(n, m) for m, n in shapes], "standard", None)
    assert newton_schulz([], "standard", None) == 0


def test_an_unknown_schedule_raises():
    with pytest.raises(KeyError, match="quintic"):
        newton_schulz([(4, 8)], "quintic", None)
