"""How far a result is from what float64 says: the polar factor, and five exact steps.

With ``X = U S V^T`` in float64, the polar factor is ``U V^T``; Newton-Schulz in exact arithmetic is
``U p(S / |S|) V^T``, p its polynomial of one singular value. Both are compared entry by entry: a
flipped sign or exchanged columns show, which ``X X^T = I`` would accept.
"""

from collections.abc import Sequence

import numpy as np

from muon_jax._polynomials import resolve_schedule


class Spectrum:
    """A wide matrix's singular value decomposition in float64.

    Args:
      x: the matrix, `[rows, cols]` with rows <= cols.
      schedule: ``(a, b, c)`` of each step.
    """

    def __init__(
        self, x: np.ndarray, schedule: Sequence[tuple[float, ...]] = resolve_schedule("standard")
    ):
        left, values, right = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        self.polar = left @ right
        values = values / np.linalg.norm(values)
        for a, b, c in schedule:
            values = a * values + b * values**3 + c * values**5
        self.steps = (left * values) @ right

    def polar_error(self, out: np.ndarray) -> float:
        """RMS of |s - 1|, where rounding counts as well: ``|O - U V^T| / sqrt(rows)``."""
        return float(np.linalg.norm(out - self.polar) / np.sqrt(len(out)))

    def rounding_error(self, out: np.ndarray) -> float:
        """How far the result is from the same steps in exact arithmetic, relative to them."""
        return float(np.linalg.norm(out - self.steps) / np.linalg.norm(self.steps))

    @property
    def exact_polar_error(self) -> float:
        """The polar error that the steps have without any rounding."""
        return self.polar_error(self.steps)
