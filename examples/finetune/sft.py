r"""Fine-tunes a model on conversations: the command line of ms-swift's `swift sft`.

    python -m examples.finetune.sft --model Qwen2.5-0.5B-Instruct --dataset talks.jsonl#500 \
        --tuner_type lora --optimizer muon --output_dir output
    python -m examples.finetune.sft --model Qwen2.5-0.5B-Instruct --dataset talks.jsonl \
        --tuner_type full --learning_rate 2e-5 --packing true --output_dir full
    python -m examples.finetune.sft --model Qwen2.5-0.5B-Instruct --dataset talks.jsonl#500 \
        --tuner_type lora --optimizer muon --resume_from_checkpoint output

A run lives in its output folder: args.json, metrics (JSONL and TensorBoard), checkpoint-N/, and at
the end the loss curves and `results.json`. Under LoRA a checkpoint holds the factors and their
optimizer state alone. Killed at any moment and called again with `--resume_from_checkpoint output`,
a run goes on from its newest checkpoint, and its losses are bit for bit those of an uninterrupted
run on the same machine.

Without arguments, the small model of `make train` is fine-tuned on the repository's own dialogues.
The models are whatever `huggingface/pretrained.py` reads: Qwen2, Llama, Moonlight, on one device
and, with `--mesh`, on many.

    python -m examples.finetune.sft --model Qwen2.5-0.5B-Instruct --dataset talks.jsonl \
        --coordinator host0:1234 --processes 2 --process 0

runs as several processes, here the first of two. Each reads its own parts of the weights and all of
the data, and has its share of the devices; a run may change how many there are when it is resumed.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import rich
from rich.console import Console

from examples.finetune.args import ALIASES, GROUPS, OWN_PATHS, Args
from examples.finetune.command_line import parse
from examples.finetune.foreign_flags import IN_TRAINING
from examples.finetune.training.folder import enter_folder
from examples.finetune.training.history import Course
from examples.finetune.training.job import Job, make_job
from examples.finetune.training.keeping import occasions
from examples.finetune.training.learner import Learner, make_learner
from examples.finetune.training.loop import Run
from examples.finetune.training.place import ARGS, FLAGS
from examples.finetune.training.results import present, write_results
from examples.finetune.training.steps import Frozen
from examples.finetune.training.texts import Texts, load_texts
from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import of_first
from examples.moonlight.common.processes.together import work_together
from examples.moonlight.common.program import run_program
from examples.moonlight.common.terminal import make_sturdy
from examples.moonlight.run_folder import metrics, seal
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.folder import RESULTS, check_run_folder
from examples.moonlight.run_folder.retention import best_step
from examples.moonlight.training.loop import Clock
from examples.moonlight.training.results import SHARDING
from examples.moonlight.training.steps import TrainState
from examples.moonlight.training.stopping import Stopped, StopRequest, quieten_signals


def finetune(args: Args) -> dict[str, Any]:
    """Fine-tunes, or finishes a fine-tuning, and returns what `results.json` holds.

    Raises:
        FileExistsError: The output folder is in use, and is not to be gone on with.
        FileNotFoundError: The model, a file of data or a checkpoint is not there.
        ValueError: An argument is out of range or differs from the run that is to be resumed, or
            the model or a record cannot be read.
        FloatingPointError: A loss, a gradient, or what an update left behind is not finite.
        FolderInUse: Another process works in the output folder.
        Damaged: No checkpoint of the run is as it was saved.
        OSError: A file cannot be written, for want of space, say.
        Stopped: A signal came. The run is saved.
    """
    with StopRequest(FLAGS.resume) as stop:
        return _finetune(args, stop)


def _finetune(args: Args, stop: StopRequest) -> dict[str, Any]:
    clock, console = Clock(), rich.get_console()
    job = make_job(args)
    check_run_folder(
        job.folder, resume=job.place.resume, must_exist=job.place.step is not None, flags=FLAGS
    )
    with phase(console, "reading the conversations"):
        texts = load_texts(job, console)
    job = job.with_rows(texts.length)
    settings = job.settings(texts.settings)
    with phase(console, "laying out model and optimizer"):
        learner = make_learner(job, texts.steps)
    with contextlib.ExitStack() as held:
        stop.check("stopped before the first step: nothing was written")
        lock, checkpoints = enter_folder(job, texts, settings, console, held)
        if of_first((job.folder / RESULTS).exists):
            console.print(f"{job.folder} holds a finished run: nothing left to train")
            return of_first(lambda: present(job.folder, read_json(job.folder / RESULTS)))
        learner.describe(console)
        if group.is_first() and (report := learner.sharding_report()) is not None:
            write_atomically(job.folder / SHARDING, f"{report}\n".encode())

        state, frozen, step, history = _restore_or_start(
            learner, texts, checkpoints, clock, console
        )
        record = job.record(history.base)
        log = metrics.NoLog()
        if group.is_first():
            write_atomically(job.folder / ARGS, record)
            log = metrics.MetricsLog(job.folder, after_step=step, console=console)
        held.enter_context(contextlib.closing(log))
        stop.check(f"stopped after step {step}")
        if step < texts.steps:
            with phase(console, "compiling the training step and the validation"):
                train_step, validate = learner.compile(state, frozen, texts)
                # A collective waits less long for a process that compiles than one may take.
                group.barrier()
            stop.check(f"stopped after step {step}")
            saves, validates = occasions(
                args, texts.steps_per_epoch, validates=texts.validation is not None
            )
            run = Run(
                job=job,
                texts=texts,
                train_step=train_step,
                validate=validate,
                frozen=frozen,
                record=record,
                saves=saves,
                validates=validates,
                checkpoints=checkpoints,
                lock=lock,
                stop=stop,
                log=log,
                history=history,
                clock=clock,
                console=console,
            )
            state = run.to_the_end(state, step)
        lock.check()
        steps = checkpoints.all_steps()  # all wait for the one that is being saved

        def results() -> dict[str, Any]:
            found = _results(job, learner, texts, history, clock, checkpoints, steps)
            found = write_results(job.folder, found | {"settings": settings})
            return present(job.folder, found)

        return of_first(results)


def _restore_or_start(
    learner: Learner, texts: Texts, checkpoints: Checkpoints, clock: Clock, console: Console
) -> tuple[TrainState, Frozen, int, Course]:
    """The state, the step that it is after, and the run's course so far."""
    if checkpoints.latest_step() is None:
        with phase(console, f"reading {learner.job.base.folder}"):
            state, frozen, base = learner.start(console)
        return state, frozen, 0, Course(base=base)
    with phase(console, "reading the newest checkpoint"):
        state, frozen, restored = learner.restore(checkpoints, console)
    clock.add(restored.progress["clock"])
    texts.batches.set_state(restored.progress["data"])
    console.print(f"continuing after step {restored.step} of {texts.steps}")
    return state, frozen, restored.step, Course.read(restored.progress["history"])


def _results(
    job: Job,
    learner: Learner,
    texts: Texts,
    history: Course,
    clock: Clock,
    checkpoints: Checkpoints,
    steps: Sequence[int],
) -> dict[str, Any]:
    losses = {step: seal.read_seal(checkpoints.path(step))["val_loss"] for step in steps}
    measured = {step: loss for step, loss in losses.items() if loss is not None}

    def named(step: int | None) -> str | None:
        return None if step is None else str(job.folder / checkpoints.path(step).name)

    return {
        "steps": texts.steps,
        "epochs": texts.steps / texts.steps_per_epoch,
        "tokens": history.tokens,
        "tokens_per_second": history.tokens / max(clock.step_seconds, 1e-9),
        "seconds": clock.wall_seconds,
        "validation": history.validation,
        "best": history.best,
        "trained_parameters": learner.trained,
        "parameters": learner.counts._asdict(),
        "optimizer_state_bytes_per_device": learner.state_bytes,
        "last_model_checkpoint": named(max(steps, default=None)),
        "best_model_checkpoint": named(best_step(measured) if measured else None),
    }


COMMAND_LINE = CommandLine("examples.finetune.sft", Args, __doc__, groups=GROUPS, underscores=True)


def read(argv: Sequence[str] | None = None) -> Args:
    """Reads a command line, the process's where it is None: see `parse`."""
    return parse(Args, argv, aliases=ALIASES, foreign=IN_TRAINING, shown=COMMAND_LINE)


def main(argv: Sequence[str] | None = None) -> None:
    """The program. What its user can mend ends it with one sentence, and the exit code 1.

    Args:
        argv: Left out, the command line's.
    """
    make_sturdy()
    quieten_signals()

    def program() -> None:
        work_together(finetune, read(argv), own=OWN_PATHS, underscores=True)

    try:
        run_program(program)
    except Stopped as stopped:
        rich.print(f"{stopped}; the same command with {FLAGS.resume} and its output folder goes on")
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    main()
