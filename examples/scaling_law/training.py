"""One run: from a `Run` to a record.

Rates are an argument of the program: both optimizers are built for a rate of 1, and what they
return is multiplied by the step's rate, decay included. So one compiled program serves every rate,
seed and length of a size.
"""

import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.moonlight.data.batches import Span, train_batches, validation_windows
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.language_model import ModelStats, next_token_loss
from examples.moonlight.training.monitors import layer_rms, svd_entropies
from examples.moonlight.training.steps import TrainState, apply_gradients
from examples.scaling_law import protocol
from examples.scaling_law.corpus import Corpus
from examples.scaling_law.models import flops_of, make_model, muon_heads, muon_leaves, parameters_of
from examples.scaling_law.protocol import STEPS_PER_CALL, Run
from muon_jax import FixedScale, UpdateNorm, muon, rms_by_optimizer

Record = dict[str, Any]

# Sequences in a batch of the validation, whatever the run's own.
_VALIDATION_BATCH = 32

# Points of a record's training curve.
_CURVE_POINTS = 50

# Moonlight's, in its first two stages.
_ROUTER_BIAS_RATE = 1e-3


class _Programs(NamedTuple):
    """What is compiled once per size, batch and optimizer."""

    init: Callable[[jax.Array], TrainState]
    train: Callable[..., tuple[TrainState, Any]]
    validate: Callable[[TrainState, np.ndarray], jax.Array]


def train(run: Run, corpus: Corpus) -> Record:
    """Trains and returns the run's record.

    Args:
        run: What to train.
        corpus: Its part is read: training text in an order of the seed, held-out text evenly.

    Returns:
        Plain values, as JSON holds them. `val_loss` is in nats per byte, and None for a run that
        has diverged, which stops there.

    Raises:
        ValueError: The corpus is too small for the run, or has not one sequence to hold out.
    """
    part = corpus.part(run)
    started = time.perf_counter()
    programs = _programs(_shape(run))
    windows_kbt = validation_windows(
        {"": part.validation.astype(np.int32)},
        sequence_length=run.sequence_length,
        batch_size=_VALIDATION_BATCH,
        count=protocol.VALIDATION_WINDOWS,
    )[""]
    batches = train_batches(
        {"": part.train},
        [Span(1, {"": 1.0})],
        sequence_length=run.sequence_length,
        batch_size=run.batch * STEPS_PER_CALL,
        seed=run.seed,
    )
    rates = learning_rates(run)
    state = programs.init(jnp.uint32(run.seed))
    calls = run.steps // STEPS_PER_CALL
    watched_calls = {round((i + 1) * calls / run.watch) - 1 for i in range(run.watch)}
    losses, update_rms, watched = [], [], []
    diverged = False
    for call in range(calls):
        tokens_nt = next(batches).astype(np.int32)
        tokens_sbt = tokens_nt.reshape(STEPS_PER_CALL, run.batch, -1)
        steps = slice(call * STEPS_PER_CALL, (call + 1) * STEPS_PER_CALL)
        state, (loss_s, rms_s, stats) = programs.train(state, tokens_sbt, rates[steps])
        loss_s, rms_s = jax.device_get((loss_s, rms_s))
        losses.append(loss_s)
        update_rms.append(rms_s)
        diverged = not np.isfinite(loss_s).all()
        if diverged:
            break
        if call in watched_calls:
            place = {"step": steps.stop, "tokens": steps.stop * run.batch * run.sequence_length}
            watched.append(
                place
                | {"val_loss": _loss(programs.validate(state, windows_kbt))}
                | _measure(state.params, stats)
            )
    val_loss = None if diverged else _loss(programs.validate(state, windows_kbt))
    loss_s = np.concatenate(losses)
    rms = {name: np.concatenate([r[name] for r in update_rms]) for name in update_rms[0]}
    return {
        "key": run.key(corpus.hash),
        "corpus": corpus.hash,
        "run": protocol.to_json(run),
        "val_loss": val_loss,
        "curve": _curve(loss_s),
        "steps": run.steps,
        "trained_tokens": run.trained_tokens,
        "epochs": round(run.trained_tokens / len(part.train), 4),
        "parameters": parameters_of(run)._asdict(),
        "flops": flops_of(run)._asdict(),
        # Over the second half, when no start-up is in it.
        "update_rms": {
            name: _rounded(np.sqrt(np.mean(np.square(values[len(values) // 2 :]))))
            for name, values in rms.items()
        },
        **({} if diverged else _measure(state.params, None)),
        "watched": watched,
        "seconds": round(time.perf_counter() - started, 2),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("muon-jax", "jax", "flax", "optax")},
    }


def learning_rates(run: Run) -> np.ndarray:
    """The rate of every step, float32 `[steps]`: the first step moves, the last is not idle."""
    warmup = max(1, round(protocol.WARMUP_FRACTION * run.steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        run.learning_rate,
        warmup,
        run.steps,
        end_value=protocol.FINAL_RATE_FRACTION * run.learning_rate,
    )
    # Steps count from 0; the rate rises to that of a step's end, and falls from its beginning.
    rise, fall = np.arange(1, warmup + 1), np.arange(warmup, run.steps)
    return np.asarray(jax.vmap(schedule)(np.concatenate([rise, fall])), np.float32)


def make_optimizer(run: Run) -> optax.GradientTransformation:
    """Clipping, then the optimizer at a rate of 1."""
    if run.optimizer == "adamw":
        optimizer = optax.adamw(
            1.0,
            b1=protocol.ADAM_B1,
            b2=protocol.ADAM_B2,
            eps=protocol.ADAM_EPS,
            weight_decay=run.weight_decay,
        )
    else:
        scales = {
            "adjusted_lr": {"consistent_rms": run.update_rms},
            "baseline": {
                "update_scale": FixedScale(run.update_rms * (run.layers * run.head_dim) ** 0.5)
            },
            "update_norm": {"update_scale": UpdateNorm(run.update_rms)},
        }
        optimizer = muon(
            1.0,
            weight_decay=run.weight_decay,
            ns_coeffs=run.ns_coeffs,
            ns_steps=run.ns_steps,
            adam_b1=protocol.ADAM_B1,
            adam_b2=protocol.ADAM_B2,
            eps=protocol.ADAM_EPS,
            muon_weight_dimension_numbers=muon_leaves(run),
            heads=muon_heads(run),
            **scales[run.scale],
        )
    return optax.chain(optax.clip_by_global_norm(protocol.GRADIENT_CLIP), optimizer)


def _shape(run: Run) -> Run:
    """What programs depend on: a run without its data, rate and length."""
    return run.replace(part="study", tokens=1, learning_rate=1.0, seed=0, watch=min(run.watch, 1))


@functools.lru_cache(maxsize=4)
def _programs(run: Run) -> _Programs:
    unroll = jax.default_backend() == "cpu"
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: make_model(run, jax.random.key(0), unroll=unroll))
    )
    optimizer = make_optimizer(run)

    def init(seed: jax.Array) -> TrainState:
        _, params, bias = nnx.split(
            make_model(run, jax.random.key(seed), unroll=unroll), nnx.Param, RouterBias
        )
        return TrainState(params, bias, optimizer.init(params))

    def loss_fn(params: nnx.State, bias: nnx.State, tokens_bt: jax.Array):
        return next_token_loss(nnx.merge(graphdef, params, bias), tokens_bt)

    rms_of = functools.partial(rms_by_optimizer, muon_weight_dimension_numbers=muon_leaves(run))

    def step(state: TrainState, xs: tuple[jax.Array, jax.Array]):
        tokens_bt, rate = xs
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.bias, tokens_bt
        )
        after, updates = apply_gradients(
            state, grads, stats.load_le, optimizer, bias_rate=_ROUTER_BIAS_RATE, rate=rate
        )
        return after, (loss, rms_of(updates, state.params), stats if run.watch else None)

    def steps(state: TrainState, tokens_sbt: jax.Array, rate_s: jax.Array):
        state, (loss_s, rms_s, stats) = jax.lax.scan(step, state, (tokens_sbt, rate_s))
        return state, (loss_s, rms_s, jax.tree.map(lambda x_s: x_s[-1], stats))

    def validate(state: TrainState, windows_kbt: jax.Array) -> jax.Array:
        def loss(tokens_bt: jax.Array) -> jax.Array:
            return loss_fn(state.params, state.bias, tokens_bt)[0]

        return jax.lax.map(loss, windows_kbt)

    return _Programs(jax.jit(init), jax.jit(steps, donate_argnums=0), jax.jit(validate))


def _measure(params: nnx.State, stats: ModelStats | None) -> Record:
    """Spectra and RMS of the weights, and of what layers add to the stream if that was measured."""
    weight_rms = jax.device_get(layer_rms(params))
    measured: Record = {
        "svd_entropy": {name: _rounded(value) for name, value in svd_entropies(params).items()},
        "weight_rms": {
            name.removeprefix("layers/"): _rounded(np.sqrt(np.mean(np.square(value))))
            for name, value in weight_rms.items()
        },
    }
    if stats is not None:
        for name in ("attention_rms_l", "mlp_rms_l"):
            measured[name.removesuffix("_l")] = [
                _rounded(value) for value in np.asarray(getattr(stats, name))
            ]
    return measured


def _loss(loss_k: jax.Array) -> float | None:
    """The mean of a validation, or None if it is no number."""
    loss = float(np.mean(np.asarray(loss_k, np.float64)))
    return loss if np.isfinite(loss) else None


def _curve(loss_s: np.ndarray) -> list[float | None]:
    """Means over up to `_CURVE_POINTS` equal stretches of the run."""
    return [_rounded(np.mean(part)) for part in np.array_split(loss_s, _CURVE_POINTS) if len(part)]


def _rounded(value: Any) -> float | None:
    """Five significant digits, enough to plot, and short; None where JSON has no number."""
    return float(f"{float(value):.5g}") if np.isfinite(value) else None
