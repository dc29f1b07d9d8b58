"""The learning rate of every step: it rises, and falls as asked.

As in pretraining (`schedule/plan.py` there), the rate is that of a step's end while it rises and of
its beginning while it falls: the first step already moves, the first after the warmup has the peak,
and none has the 0 at the end. Hugging Face's schedules are one step later, and their first step has
the rate 0.
"""

import math

import jax.numpy as jnp
import optax


def warmup_of(steps: int, *, warmup_steps: int, warmup_ratio: float, kind: str) -> int:
    """The steps in which the rate rises; "constant" has none, as in Hugging Face's."""
    if kind == "constant":
        return 0
    return min(steps, warmup_steps or math.ceil(steps * warmup_ratio))


def make_schedule(kind: str, *, peak: float, steps: int, warmup: int) -> optax.Schedule:
    """The learning rate by the number of steps before.

    Args:
        kind: "cosine" or "linear", both to 0; "constant" or "constant_with_warmup".
        peak: The rate after the warmup.
        steps: How many the whole run has.
        warmup: In how many of them the rate rises.
    """

    def rate(step):
        rising = (step + 1) / max(warmup, 1)
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if kind == "cosine":
            falling = 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif kind == "linear":
            falling = 1 - done
        else:
            falling = 1.0
        return peak * jnp.where(step < warmup, rising, falling)

    return rate
