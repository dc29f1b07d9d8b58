"""Ten steps beside `torch.optim.Muon`, the other implementation of Moonlight's scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muon_jax import muon
from tests.checkers import assert_close, gaussian

torch = pytest.importorskip("torch", reason="torch is part of the test extra")

pytestmark = pytest.mark.one_stack

LEARNING_RATE, WEIGHT_DECAY, MU, STEPS = 0.02, 0.1, 0.95, 10
SHAPES = {"wide": (48, 200), "tall": (128, 32), "square": (64, 64)}

# Both round to bfloat16, at other places: measured 0.5-0.7% of the change after ten steps.
BFLOAT16_NOISE = 0.015
# The momentum is float32 on both sides; measured 1e-7.
MOMENTUM_TOLERANCE = 1e-6


def run_torch(start, gradients, adjust, nesterov):
    torch.set_num_threads(1)
    # Torch's layout is [out, in], ours [in, out]; only the "original" scale tells them apart.
    params = {k: torch.nn.Parameter(torch.tensor(w.T.copy())) for k, w in start.items()}
    optimizer = torch.optim.Muon(
        params.values(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        momentum=MU,
        nesterov=nesterov,
        adjust_lr_fn=adjust,
    )
    for gradient in gradients:
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name].T.copy())
        optimizer.step()
    buffers = {k: optimizer.state[p]["momentum_buffer"].numpy().T for k, p in params.items()}
    return {k: p.detach().numpy().T for k, p in params.items()}, buffers


@pytest.mark.parametrize(
    ("adjust", "consistent_rms", "nesterov"),
    [("match_rms_adamw", 0.2, True), ("match_rms_adamw", 0.2, False), ("original", None, True)],
)
def test_ten_steps(adjust, consistent_rms, nesterov):
    start = {k: gaussian(s, i) for i, (k, s) in enumerate(SHAPES.items())}
    gradients = [
        {k: gaussian(s, 10 * step + i) for i, (k, s) in enumerate(SHAPES.items())}
        for step in range(STEPS)
    ]
    theirs, buffers = run_torch(start, gradients, adjust, nesterov)

    tx = muon(
        LEARNING_RATE, weight_decay=WEIGHT_DECAY, nesterov=nesterov, consistent_rms=consistent_rms
    )
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)

    momentum = state.inner_states["muon"].inner_state[0].mu
    for name, before in start.items():
        # Torch averages, B = mu B + (1 - mu) G, where the paper sums: B = (1 - mu) M. Its Nesterov
        # step, (1 - mu) G + mu B = (1 - mu)(G + mu M), is the paper's up to a factor, and
        # Newton-Schulz does not see a factor.
        assert_close(buffers[name], (1 - MU) * momentum[name], MOMENTUM_TOLERANCE, name)
        change = np.asarray(params[name]) - before
        assert_close(change, theirs[name] - before, BFLOAT16_NOISE, name)


def test_the_tolerance_tells_other_optimizers_apart():
    """Without Nesterov, with another scale or decay, the difference is far above the noise."""
    start = {"square": gaussian((64, 64))}
    gradients = [{"square": gaussian((64, 64), step)} for step in range(STEPS)]
    right, _ = run_torch(start, gradients, "match_rms_adamw", True)
    wrong, _ = run_torch(start, gradients, "match_rms_adamw", False)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(
            wrong["square"] - start["square"], right["square"] - start["square"], BFLOAT16_NOISE
        )
