"""The accelerators' engine, run here on shapes that XLA:CPU can multiply in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muon_jax import SCHEDULES
from muon_jax._arithmetic import Arithmetic, bfloat16_product, to_bfloat16
from muon_jax._newton_schulz import ALL_ROWS, iterate
from muon_jax._orthogonalize import Iteration
from muon_jax._polynomials import resolve_schedule

# Both round every product once, but sum it in another order; measured: 2.2e-3 at most.
ORDER_OF_SUMS = 1e-2


def batched(iteration, x, wide=jnp.float32, product=bfloat16_product):
    mixed = Arithmetic(wide, to_bfloat16, product, unroll=True)
    schedule, preconditioning, _ = iteration
    return jax.jit(functools.partial(iterate, schedule, preconditioning, ALL_ROWS, mixed))(x)


def distance(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


CASES = [(name, "frobenius") for name in SCHEDULES]
CASES += [("standard", name) for name in ("spectral", "aol", "schatten")]


@pytest.mark.parametrize("shape", [(2, 16, 32), (3, 48, 200)])
@pytest.mark.parametrize(("schedule", "preconditioning"), CASES)
def test_both_engines_agree(shape, schedule, preconditioning):
    iteration = Iteration(resolve_schedule(schedule), preconditioning, "bfloat16")
    x = iteration.cast(jax.random.normal(jax.random.key(0), shape))
    one_by_one = iteration(x)
    assert one_by_one.dtype == jnp.bfloat16
    assert distance(batched(iteration, x), one_by_one) < ORDER_OF_SUMS


def test_sums_in_bfloat16_are_noticed():
    iteration = Iteration(resolve_schedule("standard"), "frobenius", "bfloat16")
    x = iteration.cast(jax.random.normal(jax.random.key(0), (3, 48, 200)))
    wrong = batched(iteration, x, wide=jnp.bfloat16, product=jnp.matmul)
    assert distance(wrong, iteration(x)) > 3 * ORDER_OF_SUMS  # measured: 7.2e-2
