"""Matrices whose polar factor is known, and how far a result is from it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

SPECTRA = ("gaussian", "ill-conditioned", "low-rank")

SEARCHED = (*SPECTRA, "spiked")
"""With Gaussians that one singular value outweighs: divided by the norm, it alone is near 1."""

SPIKE = 4.0
"""The norm of the spike, to that of the Gaussian matrix around it."""

CONDITION = 1e3
"""Of the ill-conditioned matrices, whose singular values are spread evenly in their logarithm."""

RANK = 1 / 4
"""Of the low-rank matrices, as a part of their rows; they are a product of two Gaussians."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A wide matrix as it enters Newton-Schulz, and its singular vectors.

    Attributes:
      x: the matrix in the dtype in which it is multiplied, of shape ``[rows, cols]``.
      left: its left singular vectors in float64, ``[rows, rank]``.
      right: its right singular vectors in float64, ``[cols, rank]``.
    """

    x: jnp.ndarray
    left: np.ndarray
    right: np.ndarray

    def error(self, result: jnp.ndarray) -> dict[str, float]:
        """How far a result is from the polar factor ``U V^T``.

        `error` is the RMS of ``|s - 1|``, s the singular values of the result between the
        directions that the matrix has: what lies outside its rank has no target. `distance`, which
        sees turned directions too, is that from ``U V^T``, per root of the rank. `largest` is the
        largest singular value of the whole result.
        """
        values: np.ndarray = np.asarray(result, np.float64)
        if not np.isfinite(values).all():
            return {"error": np.inf, "distance": np.inf, "largest": np.inf}
        core = self.left.T @ values @ self.right
        singular = np.linalg.svd(core, compute_uv=False)
        away = np.linalg.norm(values @ self.right - self.left) / np.sqrt(len(core))
        return {
            "error": float(np.sqrt(np.mean(np.square(singular - 1)))),
            "distance": float(away),
            "largest": float(np.sqrt(np.linalg.eigvalsh(values @ values.T)[-1])),
        }


def problem(spectrum: str, rows: int, cols: int, dtype: str, seed: int = 0) -> Problem:
    """Make one matrix, and decompose it in float64 as it is after rounding."""
    draw = np.random.default_rng(seed)
    x, rank = draw.normal(size=(rows, cols)), rows
    if spectrum == "ill-conditioned":
        left, _, right = np.linalg.svd(x, full_matrices=False)
        x = left * np.geomspace(1, 1 / CONDITION, rows) @ right
    elif spectrum == "low-rank":
        rank = max(1, int(RANK * rows))
        x = draw.normal(size=(rows, rank)) @ draw.normal(size=(rank, cols))
    elif spectrum == "spiked":
        left, right = (draw.normal(size=size) for size in (rows, cols))
        spike = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
        x = x + SPIKE * np.sqrt(rows * cols) * spike
    rounded = jnp.asarray(x, dtype)
    left, _, right = np.linalg.svd(np.asarray(rounded, np.float64), full_matrices=False)
    return Problem(rounded, left[:, :rank], right[:rank].T)
