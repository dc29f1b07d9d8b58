"""One training step of the example, with each optimizer, and in transformers with torch's Muon.

The same weights and the same batch. Parameters are float32; on an accelerator the model computes
in bfloat16, in transformers by `torch.autocast`. The losses of the first step are recorded beside
the times: they begin alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from benchmarks.device_clock import Clocks
from benchmarks.harness import attempt_each, median, time_interleaved
from benchmarks.step import Peer
from benchmarks.train.ours import LEARNING_RATE, WEIGHT_DECAY, build_model, build_step
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import count_parameters
from examples.moonlight.training.optimizers import make_optimizer
from examples.moonlight.training.steps import TrainState
from muon_jax import routing_report


class Step(NamedTuple):
    """A side that is ready to train.

    Attributes:
      call: takes a step, and returns its loss.
      compile_s: tracing and compiling; None for torch.
      losses: one of the first step, put there by it.
    """

    call: Callable[[], float]
    compile_s: float | None
    losses: list[float]


def measure(
    config: MoonlightConfig,
    batch: int,
    length: int,
    peers: tuple[Peer, ...],
    repeats: int,
    clocks: Clocks,
) -> dict[str, Any]:
    """Build every side, train each for a step, and time further steps in turns."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = build_model(config, dtype=dtype)
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
    tokens_bt = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1))
    tokens_bt = tokens_bt.astype(np.int32)

    def build(peer: Peer) -> Step:
        if peer == "torch":
            return _torch(config, params, bias, tokens_bt, dtype)
        optimizer = _optimizer(peer, params)
        # Copies, because a step donates what it is given.
        state = jax.tree.map(jnp.copy, TrainState(params, bias, jax.jit(optimizer.init)(params)))
        return Step(*build_step(graphdef, optimizer, state, jnp.asarray(tokens_bt)), [])

    built, failed = attempt_each(
        {peer: lambda peer=peer: build(peer) for peer in peers},
        lambda step: step.losses.append(step.call()),
    )
    seconds = time_interleaved(
        {peer: step.call for peer, step in built.items()},
        repeats,
        warmups=1,
        clocks=clocks.of(built),
    )
    rows: dict[str, dict[str, Any]] = {peer: {"error": said} for peer, said in failed.items()}
    for peer, step in built.items():
        rows[peer] = {
            "step_s": median(seconds[peer]),
            "step_s_all": seconds[peer],
            "compile_s": step.compile_s,
            "first_loss": step.losses[0],
            "tokens_per_second": batch * length / median(seconds[peer]),
        }
    reference = rows.get("optax", {}).get("step_s")
    for peer in built:
        rows[peer]["step_s_to_optax"] = rows[peer]["step_s"] / reference if reference else None
    return {
        "parameters": count_parameters(model)._asdict(),
        "batch": batch,
        "length": length,
        "dtype": jnp.dtype(dtype).name,
        "optimizers": {peer: rows[peer] for peer in peers},
    }


def _optimizer(peer: Peer, params: nnx.State) -> optax.GradientTransformation:
    """An optimizer with the example's settings, behind its clipping."""
    schedule = optax.constant_schedule(LEARNING_RATE)
    if peer != "optax":
        return make_optimizer("adamw" if peer == "adamw" else "muon", schedule, WEIGHT_DECAY)
    rows = routing_report(params).rows
    # In these models the last two axes are the matrix, whatever is stacked before them.
    numbers = [MuonDimensionNumbers(-2, -1) if row.optimizer == "muon" else None for row in rows]
    tx = optax_muon(
        schedule,
        weight_decay=WEIGHT_DECAY,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree.unflatten(jax.tree.structure(params), numbers),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def _torch(
    config: MoonlightConfig,
    params: nnx.State,
    bias: nnx.State,
    tokens_bt: np.ndarray,
    dtype: jax.typing.DTypeLike,
) -> Step:
    import torch

    from benchmarks.train.theirs import Theirs

    theirs = Theirs(
        config,
        params,
        bias,
        tokens_bt,
        ("muon",),
        device="cuda" if torch.cuda.is_available() else "cpu",
        bfloat16=dtype == jnp.bfloat16,
    )
    return Step(theirs.calls["step muon"], None, [])
