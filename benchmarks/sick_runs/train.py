"""One run, with what to watch taken in the program of the step."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.sick_runs.cases import Case
from benchmarks.sick_runs.model import CHARACTERS, Params, init, loss_of
from muon_jax import map_matrices, orthogonality_error, rms_by_optimizer, svd_entropy, update_rms

Record = dict[str, list[float]]

UNSEEN = 9
"""Control characters before the tabulator: no text has them, so their rows get no gradient."""


def batches(records: int, every: int, batch: int, length: int) -> np.ndarray:
    """Pieces of Python's standard library, `[records, every, batch, length + 1]` characters."""
    library = b"".join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
    text = np.array([character for character in library if character < CHARACTERS])
    starts = np.random.default_rng(0).integers(len(text) - length, size=(records, every, batch, 1))
    return text[starts + np.arange(length + 1)]


def watch(updates: Params, old: Params, new: Params, rate: jax.Array) -> dict[str, jax.Array]:
    """What an update and the weights look like, as scalars.

    Args:
      updates: what the optimizer returned, learning rate and weight decay included.
      old: the parameters before it.
      new: the parameters after it.
      rate: the learning rate.

    Returns:
      `update_rms`, `adam_rms`: RMS of the update over the learning rate, of each optimizer's
      leaves as they should be routed; `embed_update`: the same of the embedding. `weight_rms`: RMS
      of the matrices. `arrived`: the RMS by which the matrices moved, to that of the update.
      `unseen`: RMS of the embedding's rows that no text uses. `orthogonality`: the error of the
      layers' updates; `entropy`: the SVD entropy of the layers' weights; both are means.
    """
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    old, new, updates = wide(old), wide(new), wide(updates)
    asked = jax.tree.map(lambda u: u / rate, updates)
    came = jax.tree.map(jnp.subtract, new, old)
    rms = rms_by_optimizer(asked, old)
    # By layer, whatever this run's optimizer took for a matrix.
    errors = map_matrices(orthogonality_error, _unscaled(asked), old)
    entropies = map_matrices(svd_entropy, new, old)
    return {
        "update_rms": rms["muon"],
        "adam_rms": rms["adam"],
        "embed_update": update_rms(asked["embed"]),
        "weight_rms": rms_by_optimizer(new, old)["muon"],
        "arrived": rms_by_optimizer(came, old)["muon"] / rms_by_optimizer(updates, old)["muon"],
        "unseen": update_rms(new["embed"][:UNSEEN]),
        "orthogonality": _mean(errors),
        "entropy": _mean(entropies),
    }


def _mean(by_leaf: dict[str, list[jax.Array]]) -> jax.Array:
    return jnp.mean(jnp.concatenate([of_view for views in by_leaf.values() for of_view in views]))


def _unscaled(updates: Params) -> Params:
    """Updates without the factor ``0.2 sqrt(max(fan_in, fan_out))``: orthogonal matrices."""
    return jax.tree.map(
        lambda u: u / (0.2 * max(u.shape[-2:]) ** 0.5) if u.ndim > 1 else u, updates
    )


def run(case: Case, texts: np.ndarray, width: int, layers: int) -> Record:
    """Train, and return each diagnostic's values.

    Args:
      case: the run.
      texts: characters `[records, steps, batch, length + 1]`: the last of `steps` is watched.
      width: the model's width.
      layers: the number of its layers.

    Returns:
      One value for each record; of the loss, the mean over its steps.
    """
    seen = jax.jit(program(case, texts.shape, width, layers))(texts)
    return {name: np.asarray(values, float).tolist() for name, values in seen.items()}


def program(
    case: Case, shape: tuple[int, ...], width: int, layers: int
) -> Callable[[Any], dict[str, jax.Array]]:
    """The training run as one function of its texts; see `run`."""
    count = shape[0] * shape[1]
    rate = optax.warmup_cosine_decay_schedule(0.0, case.rate, count // 10, count, case.rate / 100)
    tx = case.optimizer(rate)

    def step(carry: Any, text: jax.Array) -> Any:
        params, state, _, done = carry
        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, text)
        updates, state = tx.update(gradients, state, params)
        new = optax.apply_updates(params, updates)
        return (new, state, (updates, params), done + 1), (loss, jnp.max(logits))

    def record(carry: Any, text: jax.Array) -> Any:
        carry, (losses, logits) = jax.lax.scan(step, carry, text)
        new, _, (updates, old), done = carry
        seen = watch(updates, old, new, jnp.asarray(rate(done - 1)))
        return carry, seen | {"loss": jnp.mean(losses), "max_logit": jnp.max(logits)}

    def train(texts: jax.Array) -> dict[str, jax.Array]:
        params = init(jax.random.key(0), width, shape[-1] - 1, layers)
        params = jax.tree.map(lambda x: x.astype(case.dtype), params)
        zero = jnp.zeros((), jnp.int32)
        return jax.lax.scan(record, (params, tx.init(params), (params, params), zero), texts)[1]

    return train
