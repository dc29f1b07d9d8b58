"""The loop of a fine-tuning: rows in, steps taken, metrics and checkpoints out."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from examples.finetune.training.history import Course
from examples.finetune.training.job import Job
from examples.finetune.training.keeping import Occasions
from examples.finetune.training.place import ARGS, FLAGS
from examples.finetune.training.steps import Frozen, StepMetrics, accuracy_of
from examples.finetune.training.texts import Texts
from examples.moonlight.model.execution.sharding import BATCH_AXES
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.lock import RunLock
from examples.moonlight.training.loop import Clock, progress_bar
from examples.moonlight.training.nonfinite import explain
from examples.moonlight.training.steps import TrainState
from examples.moonlight.training.stopping import StopRequest


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is trained with, from its first step to its last.

    Attributes:
        job: What it is to do.
        texts: Its rows.
        train_step: `train_step(state, frozen, rows, step)`, compiled.
        validate: `validate(trained, frozen)`: summed loss, hits and weight of the held-out rows;
            None where nothing is held out.
        frozen: What no step changes.
        record: What `args.json` of every checkpoint holds.
        saves: When to save, besides the end.
        validates: When to validate, besides before a checkpoint.
        checkpoints: Where the state is saved.
        lock: The lock of the run's folder: held, or nothing is saved.
        stop: Asked after each step whether to go on.
        log: Where losses and all else are recorded.
        history: The run's course so far.
        clock: The time so far.
        console: Shows progress.
    """

    job: Job
    texts: Texts
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    validate: Callable[..., Any] | None
    frozen: Frozen
    record: bytes
    saves: Occasions
    validates: Occasions
    checkpoints: Checkpoints
    lock: RunLock
    stop: StopRequest
    log: metrics.MetricsLog | metrics.NoLog
    history: Course
    clock: Clock
    console: Console

    def to_the_end(self, state: TrainState, step: int) -> TrainState:
        """Takes the run from a step, and the state after it, to its last step.

        Raises:
            FloatingPointError: A gradient, a state or a validation is not finite: it is not saved.
            FolderLost: The run's folder was deleted, or taken over by another process.
            OSError: A file cannot be written.
            Stopped: A signal came; the state is saved.
        """
        steps, status = self.texts.steps, ""
        with progress_bar(self.console) as bar:
            task = bar.add_task("training", total=steps, completed=step, status=status)
            while step < steps:
                state, values = self._step(state, step)
                step += 1
                self.checkpoints.check()
                last = step == steps
                saves = last or self.saves.includes(step)
                # A checkpoint without a loss could never be the best.
                if self.validate is not None and (saves or self.validates.includes(step)):
                    self._validate(state, step)
                    bar.console.print(self._validation_line(step), highlight=False)
                if step == 1 or last or step % self.job.args.logging_steps == 0:
                    status = _line(values)
                    bar.console.print(
                        f"step {step:>5} of {steps}  {status}", highlight=False, soft_wrap=True
                    )
                self.log.flush()
                stops = self.stop.asked()
                if saves or stops:
                    self._save(state, step)
                if stops:
                    self.stop.check(f"stopped after step {step}")
                bar.update(task, completed=step, status=status)
        # Results say that a run is finished: not before its last checkpoint is there.
        self.checkpoints.wait()
        return state

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """Takes a step, and records it."""
        started = time.perf_counter()
        rows, sharding = next(self.texts.batches), self.job.sharding
        state, measured = jax.block_until_ready(
            self.train_step(
                state,
                self.frozen,
                # Every process reads all rows, which lie in its memory, and puts up its own.
                sharding.spread_all(rows, None, BATCH_AXES),
                sharding.spread(np.int32(step)),
            )
        )
        seconds = time.perf_counter() - started
        self.clock.step_seconds += seconds
        values = {name: float(value) for name, value in measured._asdict().items()}
        read = int(np.count_nonzero(rows.segment_bt))
        finite = values.pop("grads_finite"), values.pop("state_finite")
        values |= {
            "epoch": (step + 1) / self.texts.steps_per_epoch,
            "tokens_read": read,
            "tokens_per_second": read / seconds,
        }
        self.history.tokens += read
        self.log.write(metrics.TRAIN, step + 1, values)
        if not all(finite):
            names = {"grads_finite": finite[0], "state_finite": finite[1]}
            self._give_up(explain(step + 1, values | names))
        return state, values

    def _validate(self, state: TrainState, step: int) -> None:
        assert self.validate is not None
        loss, hits, weight = (float(x) for x in self.validate(state.params, self.frozen))
        record = {"val_loss": loss / weight, "val_token_acc": accuracy_of(hits, weight)}
        self.log.write(metrics.VALIDATION, step, record)
        if not np.isfinite(record["val_loss"]):
            self._give_up(f"step {step}: the validation loss is not finite. ")
        self.history.validated(step, record)

    def _validation_line(self, step: int) -> str:
        last: Mapping[str, Any] = self.history.validation or {}
        return (
            f"step {step:>5} of {self.texts.steps}  validation loss {last['val_loss']:.4f}  "
            f"token accuracy {last['val_token_acc']:.2%}"
        )

    def _save(self, state: TrainState, step: int) -> None:
        """Saves: the checkpoint behind the next steps, and the log, of which it needs nothing."""
        self.lock.check()
        last = self.history.validation
        val_loss = last["val_loss"] if last is not None and last["step"] == step else None
        self.checkpoints.save(
            step,
            model=self.frozen.saved_with(state.params),
            optimizer=state.opt_state,
            progress={
                "data": self.texts.batches.get_state(),
                "clock": self.clock.record(),
                "history": self.history.record(),
            },
            val_loss=val_loss,
            files={ARGS: self.record},
        )
        self.log.sync()

    def _give_up(self, what: str) -> None:
        self.log.flush()
        newest = self.checkpoints.latest_step()
        if newest is None:
            remedy = "Nothing was saved yet: begin again with a lower --learning_rate"
        else:
            remedy = (
                f"The newest checkpoint, of step {newest}, is finite: take it as it is, or begin "
                "again with a lower --learning_rate in another --output_dir; "
                f"{FLAGS.resume} would take the same steps again"
            )
        raise FloatingPointError(what + remedy)


def _line(values: Mapping[str, float]) -> str:
    return (
        f"training loss {values['loss']:.4f}  token accuracy {values['token_acc']:.2%}  "
        f"gradient {values['grad_norm']:.3g}  rate {values['learning_rate']:.2e}  "
        f"{values['tokens_per_second']:,.0f} tokens/s"
    )
