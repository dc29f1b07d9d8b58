"""The training loop: batches in, programs called, metrics and checkpoints out."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from rich import progress
from rich.console import Console

from examples.moonlight.data.batches import Span, windows_read
from examples.moonlight.data.validation import Validation
from examples.moonlight.model.sharding import BATCH_AXES, ModelSharding
from examples.moonlight.training import metrics, monitors
from examples.moonlight.training.args import Args, Recipe, steps_per_call
from examples.moonlight.training.checkpoint import Checkpoints
from examples.moonlight.training.schedule import Plan
from examples.moonlight.training.steps import TrainState, TrainSteps


class Programs(NamedTuple):
    """What is compiled; see `steps.py`."""

    train_steps: Callable[..., Any]
    validate: Callable[..., Any]


def compile_programs(
    train_steps: TrainSteps,
    validate: Callable[..., jax.Array],
    *,
    state: TrainState,
    shardings: TrainState,
    sharding: ModelSharding,
    buffer_sabt: np.ndarray,
    windows_kbt: np.ndarray,
) -> Programs:
    """Compiles both programs ahead of the loop.

    Args:
        train_steps: From `make_train_steps`.
        validate: From `make_validate`.
        state: Of the training; abstract or not.
        shardings: Where it lies.
        sharding: The devices.
        buffer_sabt: The tokens of a call, see `token_buffer`.
        windows_kbt: The held-out windows.
    """
    one = sharding.place()
    steps = jax.jit(
        train_steps,
        donate_argnums=0,
        in_shardings=(shardings, sharding.place(None, None, BATCH_AXES), one, one, one),
        out_shardings=(shardings, one, one),
    )
    losses = jax.jit(
        validate,
        in_shardings=(shardings.params, shardings.bias, sharding.place(None, BATCH_AXES)),
    )
    micro_s = np.zeros(len(buffer_sabt), np.int32)
    return Programs(
        steps.lower(state, buffer_sabt, 0, 0, micro_s).compile(),
        losses.lower(state.params, state.bias, windows_kbt).compile(),
    )


class Clock:
    """The seconds that a run took, in all its processes.

    Attributes:
        step_seconds: Of these, in optimizer steps.
    """

    def __init__(self):
        self._started = time.perf_counter()
        self.step_seconds = 0.0

    @property
    def wall_seconds(self) -> float:
        """Up to now."""
        return time.perf_counter() - self._started

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds what `record` returned in an earlier process."""
        self._started -= earlier["wall_seconds"]
        self.step_seconds += earlier["step_seconds"]

    def record(self) -> dict[str, float]:
        """What a checkpoint holds of it."""
        return {"wall_seconds": self.wall_seconds, "step_seconds": self.step_seconds}


def token_buffer(args: Args, recipe: Recipe, plan: Plan) -> np.ndarray:
    """Zeros, int32 [steps, micro-batches, batch, time + 1], for the most that a call takes."""
    micro_batches = plan.max_batch // recipe.batch_size
    steps = steps_per_call(args, recipe)
    shape = (steps, micro_batches, recipe.batch_size, recipe.sequence_length + 1)
    return np.zeros(shape, np.int32)


def run_to_the_end(
    state: TrainState,
    step: int,
    *,
    args: Args,
    recipe: Recipe,
    plan: Plan,
    programs: Programs,
    batches: grain.DatasetIterator,
    spans: Sequence[Span],
    validation: Validation,
    checkpoints: Checkpoints,
    log: metrics.MetricsLog,
    meshes: dict[str, str],
    clock: Clock,
    console: Console,
) -> TrainState:
    """Takes a run from a step to the end of its plan.

    Args:
        state: What the run has after `step` steps.
        step: Optimizer steps taken.
        args: How often to validate, save and monitor, and how many steps a call takes.
        recipe: The sizes of a batch.
        plan: What each step trains with.
        programs: The compiled steps and validation.
        batches: The training batches, from the first that is not behind the state.
        spans: The mixes that they are read in.
        validation: The held-out windows.
        checkpoints: Where the state is saved.
        log: Where losses and all else are recorded.
        meshes: The meshes so far, by the first step taken on each.
        clock: The time so far.
        console: Shows progress.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    buffer_sabt = token_buffer(args, recipe, plan)
    stage_ends = {*plan.stage_ends().values()}
    val_loss = float("nan")
    with _progress_bar(console) as bar:
        task = bar.add_task("training", total=plan.steps, completed=step, status="")
        while step < plan.steps:
            called = time.perf_counter()
            count = _steps_until_stop(step, len(buffer_sabt), args, stage_ends)
            micro_s = np.zeros(len(buffer_sabt), np.int32)
            for i in range(count):
                micro_s[i] = plan.segment(step + i).batch // recipe.batch_size
                for j in range(micro_s[i]):
                    buffer_sabt[i, j] = next(batches)
            state, measured, watched = jax.block_until_ready(
                programs.train_steps(state, buffer_sabt, step, count, micro_s)
            )
            seconds = time.perf_counter() - called
            clock.step_seconds += seconds

            rate = (plan.tokens(step + count) - plan.tokens(step)) / seconds
            columns = {
                name: np.asarray(x).tolist()
                for name, x in measured._asdict().items()
                if x is not None
            }
            for i in range(count):
                values = {name: column[i] for name, column in columns.items()}
                values |= {"tokens": plan.tokens(step + i + 1), "tokens_per_second": rate}
                log.write(metrics.TRAIN, step + i + 1, values)
            step += count
            loss = columns["loss"][count - 1]
            if not np.isfinite(columns["loss"][:count]).all():
                raise FloatingPointError(
                    f"the loss is not finite at step {step}; lower --learning-rate (was "
                    f"{recipe.learning_rate:g})"
                )

            saves = step % args.checkpoint_every == 0 or step in stage_ends
            if saves or step % args.eval_every == 0:
                losses_k = programs.validate(state.params, state.bias, validation.windows_kbt)
                record = validation.record(np.asarray(losses_k))
                dropped = ""
                if "dropped_share" in columns:
                    dropped = f"  dropped {columns['dropped_share'][count - 1]:.1%}"
                val_loss = record["val_loss"]
                log.write(metrics.VALIDATION, step, record)
                bar.console.print(
                    f"step {step:>6}  loss {loss:.4f}  validation {val_loss:.4f}  "
                    f"{rate:,.0f} tokens/s{dropped}"
                )
            if watched is not None and step % args.monitor_every == 0:
                svd = monitors.svd_entropies(state.params)
                record = monitors.make_record(watched, svd, columns["grad_norm"][count - 1])
                log.write(metrics.MONITOR, step, record, monitors.board_scalars(record))
            log.flush()
            if saves:
                checkpoints.save(
                    step,
                    model={"params": state.params, "router_bias": state.bias},
                    optimizer=state.opt_state,
                    progress={
                        "data": batches.get_state(),
                        "read": windows_read(spans, plan.sequences(step)),
                        "clock": clock.record(),
                        "meshes": meshes,
                    },
                    val_loss=val_loss,
                )
            status = f"loss {loss:.3f}  val {val_loss:.3f}  {rate:,.0f} tokens/s"
            bar.update(task, completed=step, status=status)
    return state


def _steps_until_stop(step: int, most: int, args: Args, stage_ends: set[int]) -> int:
    """Steps of the next call: up to the next validation, checkpoint, record or end of a stage."""
    stops = [step + most, min(end for end in stage_ends if end > step)]
    intervals = (args.eval_every, args.checkpoint_every, args.monitor_every)
    stops += [step // every * every + every for every in intervals if every]
    return min(stops) - step


def _progress_bar(console: Console) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
