"""What a run costs, in floating-point operations, counted three ways.

1. `body`: 6 N D, with the N parameters of the body and D tokens, as scaling laws count and as the
   paper compares.
2. `whole`: attention's inner products (causal: half of the square) and the head besides; the
   embedding is a lookup.
3. `newton_schulz`: what Muon adds, which AdamW does not pay: 4 m^2 n + 2 m^3 for each step on each
   m x n matrix, m <= n; `cubic5` needs no 2 m^3. These are the products of steps one by one; where
   the library takes two at once they are fewer.

Elementwise work is in none of them.
"""

from collections.abc import Iterable
from typing import NamedTuple

from muon_jax import SCHEDULES

PETAFLOP_DAY = 1e15 * 86_400
"""The unit of the paper's compute: one PFLOP/s for a day."""

_OWN_STEPS = {
    **{"standard": 5, "dion": 5, "polar_express": 5, "deepseek_v4": 10},
    **{"minimax": 5, "cubic5": 5},
}


class Flops(NamedTuple):
    """FLOPs of a whole run; `newton_schulz` comes on top of the other two."""

    body: float
    whole: float
    newton_schulz: float


def per_token(
    *, body: int, hidden: int, layers: int, attention_width: int, sequence_length: int, vocab: int
) -> tuple[float, float]:
    """FLOPs of a token, forward and backward: of the body's parameters, and with the rest.

    Args:
        body: Parameters that a token passes through, without embedding and head.
        hidden: Width of the model.
        layers: Its layers.
        attention_width: Heads times the mean width of queries and values.
        sequence_length: Tokens in a sequence.
        vocab: Columns of the head.
    """
    # Two products of T/2 keys on average, 2 FLOPs each, three times: forward and twice backward.
    attention = 6 * layers * attention_width * sequence_length
    return 6.0 * body, 6.0 * (body + hidden * vocab) + attention


def newton_schulz(shapes: Iterable[tuple[int, int]], ns_coeffs: str, ns_steps: int | None) -> float:
    """FLOPs of orthogonalizing matrices of these shapes once.

    Args:
        shapes: The shape of each matrix, either side first.
        ns_coeffs: A schedule's name.
        ns_steps: Its steps, or None for its own number.
    """
    steps = _OWN_STEPS[ns_coeffs] if ns_steps is None else ns_steps
    sides = (sorted(shape) for shape in shapes)
    square = 0 if ns_coeffs == "cubic5" else 2
    return float(steps * sum(4 * m * m * n + square * m**3 for m, n in sides))


assert set(_OWN_STEPS) == set(SCHEDULES)
