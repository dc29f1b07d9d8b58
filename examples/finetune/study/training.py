"""One run of the study: from a `Run` to a record, by the training step of `sft`.

Rates are an argument of the programs, so that one compiled program serves a whole grid.
"""

import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.finetune.data.packing import Rows
from examples.finetune.lora.adapters import DropoutKey, LoraConfig, add_lora
from examples.finetune.study import protocol
from examples.finetune.study.protocol import Run
from examples.finetune.study.task import LENGTH, VOCABULARY, pretraining_rows, task_rows
from examples.finetune.study.task import training_rows as question_rows
from examples.finetune.training.schedule import make_schedule, warmup_of
from examples.finetune.training.steps import Frozen, make_train_step
from examples.moonlight.common.files import write_atomically
from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.packed import Packed
from examples.moonlight.training.optimizers import make_optimizer
from examples.moonlight.training.routing import read_roles
from examples.moonlight.training.steps import TrainState

Record = dict[str, Any]

CONFIG = DenseConfig(
    vocab_size=VOCABULARY,
    hidden_size=protocol.HIDDEN,
    num_hidden_layers=protocol.LAYERS,
    num_attention_heads=protocol.HEADS,
    num_key_value_heads=protocol.HEADS,
    intermediate_size=protocol.INTERMEDIATE,
    max_position_embeddings=LENGTH,
)
_LORA = LoraConfig(rank=protocol.LORA_RANK, alpha=protocol.LORA_ALPHA, dropout=0.0)
_EMPTY = nnx.State({})
_EXECUTION = Execution(unroll=True)


class _Programs(NamedTuple):
    """What is compiled for one tuner and optimizer; see `_programs`."""

    init: Callable[[Any], TrainState]
    train: Callable[..., tuple[TrainState, Any]]
    measure: Callable[..., tuple[jax.Array, jax.Array]]


def train(run: Run, bases: Path) -> Record:
    """Trains and returns the run's record.

    Args:
        run: What to train.
        bases: The folder of pre-trained weights; those of this run's base are there, unless it is
            a pre-training, which puts them there.

    Returns:
        Plain values, as JSON holds them. `loss` is in nats per token that counts, `exact` the share
        of questions whose every token, the end included, is the likeliest: what decoding without
        sampling answers right. Both are None for a run that has diverged.
    """
    started, used = time.perf_counter(), time.process_time()
    if run.tuner is None:
        params, frozen, losses, measure = _pretrain(run)
        bases.mkdir(parents=True, exist_ok=True)
        write_atomically(bases / f"{run.key()}.npz", _packed(params))
    else:
        params, frozen, losses, measure = _tune(run, bases)
    loss, exact = _measured(measure, params, frozen, task_rows(run.measured_on))
    good = bool(np.isfinite(losses).all() and np.isfinite(loss))
    return {
        "key": run.key(),
        "run": protocol.to_json(run),
        "loss": loss if good else None,
        "exact": exact if good else None,
        "curve": [round(float(x), 4) for x in losses[:: max(1, len(losses) // 50)]] if good else [],
        "cpu_seconds": round(time.process_time() - used, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _pretrain(run: Run) -> tuple[nnx.State, Frozen, np.ndarray, Any]:
    model = Dense(CONFIG, rngs=nnx.Rngs(run.seed), execution=_EXECUTION)
    _, params = nnx.split(model)
    rows = pretraining_rows(run.seed, run.pretraining_steps, protocol.PRETRAINING_BATCH)
    programs = _programs("full", run.pretrained_by, run.pretraining_steps)
    frozen = Frozen(_EMPTY, _EMPTY, _EMPTY)
    params, losses = _run(programs, params, frozen, rows, run.learning_rate)
    return params, frozen, losses, programs.measure


def _tune(run: Run, bases: Path) -> tuple[nnx.State, Frozen, np.ndarray, Any]:
    assert run.tuner is not None and run.optimizer is not None
    programs = _programs(run.tuner, run.optimizer, run.steps)
    base = _unpacked(bases / f"{run.base.key()}.npz")
    trained, frozen = base, Frozen(_EMPTY, _EMPTY, _EMPTY)
    if run.tuner == "lora":
        model = Dense(CONFIG, rngs=nnx.Rngs(0), execution=_EXECUTION)
        add_lora(model, _LORA, nnx.Rngs(run.seed))
        _, trained, dropout, _ = nnx.split(model, nnx.LoRAParam, DropoutKey, nnx.Param)
        frozen = Frozen(dropout, base, _EMPTY)
    rows = question_rows(run.seed, run.steps, protocol.TUNING_BATCH)
    params, losses = _run(programs, trained, frozen, rows, run.learning_rate)
    return params, frozen, losses, programs.measure


def _run(
    programs: _Programs, params: nnx.State, frozen: Frozen, rows: Rows, rate: float
) -> tuple[nnx.State, np.ndarray]:
    """The trained parameters, and the loss of every step."""
    state, losses = programs.init(params), []
    steps = len(rows.tokens_bt)
    for start in range(0, steps, protocol.STEPS_PER_CALL):
        call = Rows(*(x[start : start + protocol.STEPS_PER_CALL, None] for x in rows))
        state, loss_s = programs.train(state, frozen, call, start, rate)
        losses.append(np.asarray(loss_s))
        if not np.isfinite(losses[-1]).all():
            break
    return state.params, np.concatenate(losses)


@functools.cache
def _programs(tuner: str, optimizer: str, steps: int) -> _Programs:
    """The programs of a tuner and an optimizer, for runs of so many steps.

    `train(state, frozen, rows, step, rate)` takes `STEPS_PER_CALL` steps and returns their
    losses; `measure(params, frozen, rows)` gives the summed loss, the tokens that count, and for
    each question whether all of it is right.
    """
    warmup = warmup_of(steps, warmup_steps=0, warmup_ratio=protocol.WARMUP_RATIO, kind="cosine")
    model = nnx.eval_shape(lambda: Dense(CONFIG, rngs=nnx.Rngs(0), execution=_EXECUTION))
    roles: Any = None
    if tuner == "lora":
        add_lora(model, _LORA, nnx.Rngs(0))
        graphdef, *_ = nnx.split(model, nnx.LoRAParam, DropoutKey, nnx.Param)
    else:
        roles = read_roles(CONFIG)
        graphdef, *_ = nnx.split(model)

    def optimizer_of(rate: Any) -> tuple[Any, Any]:
        schedule = make_schedule("cosine", peak=rate, steps=steps, warmup=warmup)
        made = make_optimizer(
            optimizer,
            schedule,
            protocol.WEIGHT_DECAY,
            roles=roles,
            max_norm=protocol.GRADIENT_CLIP,
        )
        return made, schedule

    def init(params: nnx.State) -> TrainState:
        return TrainState(params, _EMPTY, optimizer_of(1.0)[0].init(params))

    def train(state: TrainState, frozen: Frozen, rows: Rows, first: Any, rate: Any):
        step = make_train_step(graphdef, *optimizer_of(rate))

        def one(state: TrainState, x: Any) -> tuple[TrainState, jax.Array]:
            state, measured = step(state, frozen, *x)
            return state, measured.loss

        numbers = first + jnp.arange(len(rows.tokens_bt))
        return jax.lax.scan(one, state, (rows, numbers))

    def measure(params: nnx.State, frozen: Frozen, rows: Any):
        built: Any = nnx.merge(graphdef, params, *frozen)
        logits_btv, _ = built(rows.tokens_bt, Packed(rows.segment_bt, rows.position_bt))
        log_bt = jnp.take_along_axis(
            jax.nn.log_softmax(logits_btv), rows.targets_bt[..., None], axis=-1
        )[..., 0]
        right_bt = (logits_btv.argmax(-1) == rows.targets_bt) | (rows.weight_bt == 0)
        return -(log_bt * rows.weight_bt).sum() / rows.weight_bt.sum(), right_bt.all(-1).mean()

    return _Programs(jax.jit(init), jax.jit(train, donate_argnums=0), jax.jit(measure))


def _measured(measure: Any, params: Any, frozen: Frozen, rows: Rows) -> tuple[float, float]:
    loss, exact = measure(params, frozen, rows)
    return float(loss), float(exact)


def _packed(params: nnx.State) -> bytes:
    """The arrays of a model, in the order of their tree."""
    buffer = io.BytesIO()
    np.savez(buffer, *map(np.asarray, jax.tree.leaves(params)))
    return buffer.getvalue()


def _unpacked(path: Path) -> nnx.State:
    """Inverts `_packed`."""
    model = nnx.eval_shape(lambda: Dense(CONFIG, rngs=nnx.Rngs(0), execution=_EXECUTION))
    structure = jax.tree.structure(nnx.split(model)[1])
    with np.load(path) as arrays:
        return structure.unflatten([jnp.asarray(arrays[name]) for name in arrays.files])
