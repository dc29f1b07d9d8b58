"""The slow float64 twin: Muon and AdamW in NumPy, written from the papers' equations.

Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), Section 2, for the
matrices; Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv 1711.05101),
Algorithm 2, with the weight decay multiplied by the learning rate, for the rest. Nothing here is
fast, batched or shared with the library.
"""

import dataclasses

import numpy as np

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def polynomial(values: np.ndarray, schedule) -> np.ndarray:
    """What a schedule makes of singular values: ``a s + b s^3 + c s^5``, step after step."""
    values = np.asarray(values, np.float64)
    for a, b, c in schedule:
        values = a * values + b * values**3 + c * values**5
    return values


def newton_schulz(matrix: np.ndarray, schedule=(QUINTIC,) * STEPS) -> np.ndarray:
    """Section 2.1: divide by the Frobenius norm, then ``a X + b (X X^T) X + c (X X^T)^2 X``."""
    x = np.asarray(matrix, np.complex128 if np.iscomplexobj(matrix) else np.float64)
    norm = np.sqrt(np.sum(np.abs(x) ** 2))
    if norm == 0:
        return x
    x = x / norm
    for a, b, c in schedule:
        gram = x @ x.conj().T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def polar_factor(matrix: np.ndarray) -> np.ndarray:
    """``U V^H`` of the singular value decomposition: what Newton-Schulz approximates."""
    u, _, vh = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    return u @ vh


@dataclasses.dataclass
class Muon:
    """One matrix under Eq. 1 and Eq. 4.

    M_t = mu M_{t-1} + G_t,  O_t = NewtonSchulz(mu M_t + G_t),
    W_t = W_{t-1} - lr (0.2 sqrt(max(A, B)) O_t + wd W_{t-1}).
    """

    weights: np.ndarray
    learning_rate: float
    weight_decay: float = 0.1
    mu: float = 0.95
    nesterov: bool = True
    rms: float = 0.2
    schedule: tuple = (QUINTIC,) * STEPS

    def __post_init__(self):
        self.weights = np.asarray(self.weights, np.float64)
        self.momentum = np.zeros_like(self.weights)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """Update the weights; return the change."""
        gradient = np.asarray(gradient, np.float64)
        self.momentum = self.mu * self.momentum + gradient
        direction = self.mu * self.momentum + gradient if self.nesterov else self.momentum
        orthogonal = newton_schulz(direction, self.schedule)
        scale = self.rms * np.sqrt(max(gradient.shape))
        change = -self.learning_rate * (scale * orthogonal + self.weight_decay * self.weights)
        self.weights = self.weights + change
        return change


@dataclasses.dataclass
class AdamW:
    """One array of any shape under AdamW with decoupled weight decay."""

    weights: np.ndarray
    learning_rate: float
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self):
        self.weights = np.asarray(self.weights, np.float64)
        self.first = np.zeros_like(self.weights)
        self.second = np.zeros_like(self.weights)
        self.count = 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """Update the weights; return the change."""
        gradient = np.asarray(gradient, np.float64)
        self.count += 1
        self.first = self.b1 * self.first + (1 - self.b1) * gradient
        self.second = self.b2 * self.second + (1 - self.b2) * gradient**2
        first = self.first / (1 - self.b1**self.count)
        second = self.second / (1 - self.b2**self.count)
        ratio = first / (np.sqrt(second) + self.eps)
        change = -self.learning_rate * (ratio + self.weight_decay * self.weights)
        self.weights = self.weights + change
        return change
