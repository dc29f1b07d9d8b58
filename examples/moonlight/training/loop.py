"""The training loop: batches in, programs called, metrics and checkpoints out."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from rich import progress
from rich.console import Console

from examples.moonlight.common.processes.agreement import gather
from examples.moonlight.data.batches import Span, windows_read
from examples.moonlight.data.validation import Validation
from examples.moonlight.model.execution.sharding import BATCH_AXES, ModelSharding
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.lock import RunLock
from examples.moonlight.schedule.plan import Plan
from examples.moonlight.schedule.recipe import Recipe
from examples.moonlight.training import monitors
from examples.moonlight.training.args import Args, steps_per_call
from examples.moonlight.training.nonfinite import (
    MOST_IN_A_ROW,
    Skipped,
    explain,
    remedy,
    unwrap,
)
from examples.moonlight.training.steps import TrainState, TrainSteps
from examples.moonlight.training.stopping import StopRequest

# Seconds that a call shall take where the user leaves it open: shown, stopped and saved is between
# calls alone. Longer ones save no time that could be measured.
CALL_SECONDS = 5.0

# Seconds between lines of progress where no terminal shows a bar.
LINE_SECONDS = 10.0


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
    buffer_shape: tuple[int, ...],
    windows_kbt: np.ndarray,
) -> Programs:
    """Compiles both programs ahead of the loop.

    Args:
        train_steps: What `make_train_steps` returned.
        validate: What `make_validate` returned.
        state: The training's state; abstract or not.
        shardings: Where it lies.
        sharding: The devices.
        buffer_shape: The shape of the tokens of a call, see `buffer_shape`.
        windows_kbt: The held-out windows.
    """
    one = sharding.place()
    # Abstract: host data cannot be lowered for the devices of several processes.
    sabt, micro_s, number, kbt = (
        jax.ShapeDtypeStruct(shape, np.int32)
        for shape in (buffer_shape, buffer_shape[:1], (), windows_kbt.shape)
    )
    state = jax.tree.map(_abstract, state)
    steps = jax.jit(
        train_steps,
        donate_argnums=0,
        in_shardings=(shardings, sharding.place(None, None, BATCH_AXES), one, one, one),
        out_shardings=(shardings, one, one),
    )
    losses = jax.jit(
        validate,
        in_shardings=(shardings.params, shardings.bias, sharding.place(None, BATCH_AXES)),
        out_shardings=one,
    )
    return Programs(
        steps.lower(state, sabt, number, number, micro_s).compile(sharding.compiler_options),
        losses.lower(state.params, state.bias, kbt).compile(),
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


class Clock:
    """The seconds that a run took, in all its processes.

    Attributes:
        step_seconds: The seconds in optimizer steps.
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


def buffer_shape(args: Args, recipe: Recipe, plan: Plan) -> tuple[int, ...]:
    """The most tokens that a call takes: [steps, micro-batches, batch, time + 1]."""
    micro_batches = plan.max_batch // recipe.batch_size
    steps = steps_per_call(args, recipe)
    return steps, micro_batches, recipe.batch_size, recipe.sequence_length + 1


@dataclasses.dataclass
class History:
    """What a run remembers of its course, in its checkpoints: its results are made of this.

    Attributes:
        meshes: The meshes so far, by the first step taken on each.
        validation: The last validation's record, with its step; None before the first.
        best: The lowest validation loss, and its step.
        skipped: The updates that were left out.
    """

    meshes: dict[str, str] = dataclasses.field(default_factory=dict)
    validation: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    skipped: Skipped = dataclasses.field(default_factory=Skipped)

    def validated(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds a validation."""
        self.validation = {"step": step, **record}
        if self.best is None or record["val_loss"] <= self.best["val_loss"]:
            self.best = {"step": step, "val_loss": record["val_loss"]}

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return vars(self) | {"skipped": self.skipped._asdict()}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "History":
        """Inverts `record`."""
        history = cls(record["meshes"], record["validation"], record["best"])
        history.skipped = Skipped(**record["skipped"])
        return history


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is trained with, from its first call to its last.

    Attributes:
        args: How often to validate, save and monitor, and how many steps a call takes.
        recipe: The sizes of a batch.
        plan: What each step trains with.
        programs: The compiled steps and validation.
        sharding: The devices.
        batches: This process's rows of the training batches, from the first that is not behind the
            state.
        spans: The mixes that they are read in.
        validation: The held-out windows.
        checkpoints: Where the state is saved.
        lock: The lock of the run's folder: held, or nothing is saved.
        stop: Asked after each call whether to go on.
        log: Where losses and all else are recorded.
        history: The run's course so far.
        clock: The time so far.
        console: Shows progress.
    """

    args: Args
    recipe: Recipe
    plan: Plan
    programs: Programs
    sharding: ModelSharding
    batches: grain.DatasetIterator
    spans: Sequence[Span]
    validation: Validation
    checkpoints: Checkpoints
    lock: RunLock
    stop: StopRequest
    log: metrics.MetricsLog | metrics.NoLog
    history: History
    clock: Clock
    console: Console

    def to_the_end(self, state: TrainState, step: int) -> TrainState:
        """Takes the run from a step, and the state after it, to the end of its plan.

        Raises:
            FloatingPointError: An update, a state or a validation is not finite: it is not saved.
            FolderLost: The run's folder was deleted, or taken over by another process.
            OSError: A file cannot be written.
            Stopped: A signal came; the state is saved.
        """
        args, plan = self.args, self.plan
        # This process's rows of the tokens of a call.
        steps, micro_batches, batch, time_1 = buffer_shape(args, self.recipe, plan)
        rows = len(self.sharding.local_rows(batch))
        buffer_sabt = np.zeros((steps, micro_batches, rows, time_1), np.int32)
        stage_ends = {*plan.stage_ends().values()}
        # The first call is short: it shows that the run has begun, and how long a step takes.
        most, told = args.steps_per_call or 1, float("-inf")
        # The same mean as in the picture of the losses, also after a resumption.
        recent = deque(self.log.losses(metrics.SMOOTHING), metrics.SMOOTHING)
        with progress_bar(self.console) as bar:
            task = bar.add_task("training", total=plan.steps, completed=step, status="")
            while step < plan.steps:
                count = _steps_until_stop(step, most, args, stage_ends)
                called = time.perf_counter()
                state, watched, columns, rate = self._call(state, step, count, buffer_sabt)
                step += count
                if args.steps_per_call is None:
                    fit = CALL_SECONDS * count / (time.perf_counter() - called)
                    most = gather(min(max(1, int(fit)), len(buffer_sabt)))[0]
                self._check_finite(state, step - count, columns)
                self.checkpoints.check()
                recent.extend(columns["loss"])
                loss = np.mean(recent)

                saves = step % args.checkpoint_every == 0 or step in stage_ends
                if saves or step % args.eval_every == 0:
                    self._validate(state, step)
                    dropped = ""
                    if "dropped_share" in columns:
                        dropped = f"  dropped {columns['dropped_share'][count - 1]:.1%}"
                    if self.history.skipped.total:
                        dropped += f"  skipped {self.history.skipped.total}"
                    bar.console.print(
                        f"step {step:>6}  training {loss:.4f}  validation {self._val_loss:.4f}  "
                        f"{rate:,.0f} tokens/s{dropped}"
                    )
                    told = time.perf_counter()
                elif not self.console.is_terminal and time.perf_counter() - told > LINE_SECONDS:
                    self.console.print(f"step {step:>6}  training {loss:.4f}  {rate:,.0f} tokens/s")
                    told = time.perf_counter()
                if watched is not None and step % args.monitor_every == 0:
                    svd = monitors.svd_entropies(state.params)
                    record = monitors.make_record(watched, svd, columns["grad_norm"][count - 1])
                    self.log.write(metrics.MONITOR, step, record, monitors.board_scalars(record))
                self.log.flush()
                if saves:
                    self._save(state, step)
                if self.stop.asked():
                    if not saves:
                        self._save(state, step)
                    self.stop.check(f"stopped after step {step}")
                losses = f"training {loss:.3f}  validation {self._val_loss:.3f}"
                bar.update(task, completed=step, status=f"{losses}  {rate:,.0f} tokens/s")
        # Results say that a run is finished: not before its last checkpoint is there.
        self.checkpoints.wait()
        return state

    def _call(
        self, state: TrainState, step: int, count: int, buffer_sabt: np.ndarray
    ) -> tuple[TrainState, monitors.Watched | None, dict[str, list[Any]], float]:
        """Takes steps, and records them: the state, what is watched, the records, tokens/s."""
        called = time.perf_counter()
        micro_s = np.zeros(len(buffer_sabt), np.int32)
        for i in range(count):
            micro_s[i] = self.plan.segment(step + i).batch // self.recipe.batch_size
            for j in range(micro_s[i]):
                buffer_sabt[i, j] = next(self.batches)
        spread = self.sharding.spread
        tokens_sabt = self.sharding.spread_rows(buffer_sabt, self.recipe.batch_size, axis=2)
        numbers = (spread(np.int32(step)), spread(np.int32(count)), spread(micro_s))
        state, measured, watched = jax.block_until_ready(
            self.programs.train_steps(state, tokens_sabt, *numbers)
        )
        seconds = time.perf_counter() - called
        self.clock.step_seconds += seconds

        rate = (self.plan.tokens(step + count) - self.plan.tokens(step)) / seconds
        columns = {
            name: np.asarray(x)[:count].tolist()
            for name, x in measured._asdict().items()
            if x is not None
        }
        for i in range(count):
            values = {name: column[i] for name, column in columns.items()}
            finite = values.pop("grads_finite"), values.pop("state_finite")
            values |= {} if all(finite) else {"finite": False}
            values |= {"tokens": self.plan.tokens(step + i + 1), "tokens_per_second": rate}
            self.log.write(metrics.TRAIN, step + i + 1, values)
        return state, watched, columns, rate

    def _check_finite(self, state: TrainState, step: int, columns: dict[str, list[Any]]) -> None:
        """Ends the run at the first step of a call that the user does not want to go past.

        Args:
            state: After the call.
            step: Before the call.
            columns: What its steps measured.
        """
        _, self.history.skipped = unwrap(state.opt_state)
        skips = self.args.on_nonfinite == "skip"
        for i, finite in enumerate(
            zip(columns["grads_finite"], columns["state_finite"], strict=True)
        ):
            if not finite[1] or not (finite[0] or skips):
                values = {name: column[i] for name, column in columns.items()}
                self._give_up(explain(step + i + 1, values))
        if self.history.skipped.in_a_row >= MOST_IN_A_ROW:
            self._give_up(
                f"step {step + len(columns['loss'])}: the gradients of the last "
                f"{self.history.skipped.in_a_row} steps were not finite, and were left out. "
            )

    def _give_up(self, what: str) -> None:
        self.log.flush()
        newest = self.checkpoints.latest_step()
        raise FloatingPointError(what + remedy(newest, self.args))

    def _validate(self, state: TrainState, step: int) -> None:
        windows_kbt = self.sharding.spread(self.validation.windows_kbt, None, BATCH_AXES)
        losses_k = self.programs.validate(state.params, state.bias, windows_kbt)
        record = self.validation.record(np.asarray(losses_k))
        self.log.write(metrics.VALIDATION, step, record)
        if not np.isfinite(record["val_loss"]):
            self._give_up(f"step {step}: the validation loss is not finite. ")
        self.history.validated(step, record)

    @property
    def _val_loss(self) -> float:
        validation = self.history.validation
        return float("nan") if validation is None else validation["val_loss"]

    def _save(self, state: TrainState, step: int) -> None:
        """Saves: the checkpoint behind the next steps, and the log, of which it needs nothing."""
        self.lock.check()
        optimizer, _ = unwrap(state.opt_state)
        last = self.history.validation
        val_loss = last["val_loss"] if last is not None and last["step"] == step else None
        self.checkpoints.save(
            step,
            model={"params": state.params, "router_bias": state.bias},
            optimizer=optimizer,
            progress={
                "data": self.batches.get_state(),
                "read": windows_read(self.spans, self.plan.sequences(step)),
                "clock": self.clock.record(),
                "history": self.history.record(),
            },
            val_loss=val_loss,
        )
        self.log.sync()


def _steps_until_stop(step: int, most: int, args: Args, stage_ends: set[int]) -> int:
    """Steps of the next call: up to the next validation, checkpoint, record or end of a stage."""
    stops = [step + most, min(end for end in stage_ends if end > step)]
    intervals = (args.eval_every, args.checkpoint_every, args.monitor_every)
    stops += [step // every * every + every for every in intervals if every]
    return min(stops) - step


def progress_bar(console: Console) -> progress.Progress:
    """Steps of a training, with a status that each update gives."""
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
