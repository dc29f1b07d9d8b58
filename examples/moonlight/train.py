r"""Trains a Moonlight on real text: arguments, data, model, optimizer, loop, results.

    python -m examples.moonlight.train --preset tiny --output-dir runs/moonlight --resume

A run lives in its output folder: settings, metrics (JSONL and TensorBoard), checkpoints, and at the
end the loss curves, a sample of text and `results.json`. Killed at any moment and called again with
`--resume`, it goes on from its last checkpoint, and its losses are bit for bit those of an
uninterrupted run on the same machine.

    python -m examples.moonlight.train --schedule moonlight --output-dir runs/stages \
        --data general=texts/ --data quality=best.jsonl \
        --mix general=9,quality=1 --mix general=9,quality=1 --mix general=1,quality=1

trains through the paper's three stages (see `stages.py`), each with its own mix of the data. With
`--resume-step` such a run goes back to any checkpoint that it kept, and with `--branch-from
RUN@STEP` another run begins there, with another cooldown, say.

    python -m examples.moonlight.train --init-from hf/ --bias-rate 0 --data texts/ \
        --output-dir runs/continued

goes on with the weights of a Hugging Face directory, on its own tokenizer: a Moonlight, or a dense
Qwen2 or Llama (`huggingface/pretrained.py`).

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python -m examples.moonlight.train --mesh data=2,expert=2,tensor=2 --output-dir runs/mesh

trains on a mesh (see `model/execution/sharding.py`), here of eight virtual CPU devices. Its losses
are those of one device to rounding, and a run may change its mesh, or leave it, each time it is
resumed.

    python -m examples.moonlight.train --local-processes 4 --output-dir runs/four --resume

trains as four processes, here on this machine; on a cluster, the command without that flag is
started once for each (see `common/processes/`). Each reads its own rows of every batch, the first
writes and speaks, and if one is lost, all end: the same command goes on, with as many processes or
with fewer.
"""

import contextlib
import sys
from typing import Any

import jax
import rich
from rich.console import Console

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.common.phases import phase
from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import of_first
from examples.moonlight.common.processes.start import enter
from examples.moonlight.common.program import run_program
from examples.moonlight.common.terminal import make_sturdy
from examples.moonlight.data.tokenizer import TOKENIZER
from examples.moonlight.generation.decoding import Generator
from examples.moonlight.generation.model_folder import copy_companions, stop_tokens
from examples.moonlight.generation.sampling import Sampling
from examples.moonlight.generation.texts import continue_texts
from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.run_folder import metrics
from examples.moonlight.run_folder.branching import copy_branch, find_branch, go_back
from examples.moonlight.run_folder.checkpoint import Checkpoints
from examples.moonlight.run_folder.folder import (
    CHECKPOINTS,
    RESULTS,
    check_run_folder,
    claim_checkpoints,
    open_run_folder,
)
from examples.moonlight.run_folder.lock import RunLock
from examples.moonlight.run_folder.storage import folder_at
from examples.moonlight.schedule.stages import plan_table
from examples.moonlight.training.args import GROUPS, Args
from examples.moonlight.training.job import Job, make_job
from examples.moonlight.training.learner import Learner, make_learner
from examples.moonlight.training.loop import (
    Clock,
    History,
    Programs,
    Run,
    buffer_shape,
    compile_programs,
)
from examples.moonlight.training.nonfinite import guard, wrap
from examples.moonlight.training.presets import LEFT_OUT, preset_table
from examples.moonlight.training.results import SCHEDULE, SHARDING, present, write_results
from examples.moonlight.training.steps import TrainState, make_train_steps, make_validate
from examples.moonlight.training.stopping import Stopped, StopRequest, quieten_signals
from examples.moonlight.training.texts import Texts, load_texts

COMMAND_LINE = CommandLine(
    "examples.moonlight.train",
    Args,
    __doc__,
    groups=GROUPS,
    left_out=LEFT_OUT,
    tables=lambda: [preset_table()],
)


def train(args: Args, config: ModelConfig | None = None) -> dict[str, Any]:
    """Trains, or finishes a training, and returns what `results.json` holds.

    Args:
        args: The command line's arguments.
        config: An architecture in the place of the preset's. Its vocabulary is the largest that the
            tokenizer may learn; a small corpus fills less, and the model has that size then.

    Raises:
        FileExistsError: The output folder is in use and `resume` is off.
        FileNotFoundError: A text, the checkpoint to go back to or to branch from, or the model to
            begin with, is not there.
        ValueError: An argument is out of range, or differs from the run that is to be resumed; or
            the model to begin with cannot be read.
        FloatingPointError: A loss, a gradient, or what an update left behind is not finite.
        FolderInUse: Another process works in the output folder.
        Damaged: No checkpoint of the run, or of the one to branch from, is as it was saved.
        OSError: A file cannot be written, for want of space, say.
        Stopped: A signal came. The run is saved, and goes on from there with `resume`.
    """
    with StopRequest() as stop:
        return _train(args, config, stop)


def _train(args: Args, config: ModelConfig | None, stop: StopRequest) -> dict[str, Any]:
    clock, console = Clock(), rich.get_console()
    job = make_job(args, config)
    goes_back = args.resume_step is not None
    check_run_folder(job.folder, resume=args.resume or goes_back, must_exist=goes_back)
    with phase(console, "reading the texts"):
        texts = load_texts(job, console)
    job = job.with_vocabulary(texts.tokenizer.get_vocab_size())
    settings = job.settings(texts.corpus_hash)
    with phase(console, "laying out model and optimizer"):
        learner = make_learner(job, settings["qk_clip_threshold"])
    with contextlib.ExitStack() as held:
        lock, checkpoints = _enter_folder(job, texts, settings, stop, console, held)
        if of_first((job.folder / RESULTS).exists):
            console.print(f"{job.folder} holds a finished run: nothing left to train")
            return of_first(lambda: present(job.folder, read_json(job.folder / RESULTS)))
        if group.is_first():
            _show_plan(job, console)
        learner.describe(console)
        if group.is_first() and (report := learner.sharding_report()) is not None:
            write_atomically(job.folder / SHARDING, f"{report}\n".encode())

        state, step, history = _restore_or_start(learner, texts, checkpoints, clock, console)
        state = state._replace(opt_state=wrap(state.opt_state, args.on_nonfinite, history.skipped))
        log = metrics.NoLog()
        if group.is_first():
            log = metrics.MetricsLog(job.folder, after_step=step, console=console)
        held.enter_context(contextlib.closing(log))
        stop.check(f"stopped after step {step}")

        if step < job.plan.steps:
            with phase(console, "compiling the training step and the validation"):
                programs = _compile(learner, texts, state, history)
                # A collective waits less long for a process that compiles than one may take.
                group.barrier()
            stop.check(f"stopped after step {step}")
            run = Run(
                args=args,
                recipe=job.recipe,
                plan=job.plan,
                programs=programs,
                sharding=job.sharding,
                batches=texts.batches,
                spans=texts.spans,
                validation=texts.validation,
                checkpoints=checkpoints,
                lock=lock,
                stop=stop,
                log=log,
                history=history,
                clock=clock,
                console=console,
            )
            state = run.to_the_end(state, step)

        with phase(console, "writing a sample"):
            sample = args.prompt + _continue_prompt(learner, texts, state)
        results = {
            **_numbers(learner, texts, history, clock),
            "settings": settings,
            "sample": sample,
        }
        stop.check(f"stopped after step {job.plan.steps}, before the results were written")
        lock.check()
        last, best = history.validation, history.best
        assert last is not None and best is not None  # the last step is validated
        return of_first(lambda: present(job.folder, write_results(job.folder, last, best, results)))


def _enter_folder(
    job: Job,
    texts: Texts,
    settings: dict[str, Any],
    stop: StopRequest,
    console: Console,
    held: contextlib.ExitStack,
) -> tuple[RunLock, Checkpoints]:
    """The run's folder, locked, with all that a new run begins with; and its checkpoints."""
    args, folder = job.args, job.folder
    directory = folder / CHECKPOINTS
    if args.checkpoint_dir is not None:
        directory = folder_at(args.checkpoint_dir)
    branch = find_branch(args.branch_from, directory, settings, texts.spans)
    goes_back = args.resume_step is not None
    stop.check("stopped before the first step: nothing was written")
    lock = held.enter_context(
        open_run_folder(folder, settings, resume=args.resume or goes_back, must_exist=goes_back)
    )
    if args.checkpoint_dir is not None:
        claim_checkpoints(directory, settings, resume=args.resume or goes_back)
    if group.is_first():
        write_atomically(folder / TOKENIZER, texts.tokenizer.to_str(pretty=True).encode())
        if job.pretrained is not None:
            copy_companions(job.pretrained, folder)
    group.barrier()
    if branch is not None:
        copy_branch(branch, folder, directory, console)
    checkpoints = held.enter_context(
        contextlib.closing(Checkpoints(directory, job.retention, console, guard=lock.check))
    )
    if args.resume_step is not None:
        go_back(folder, checkpoints, args.resume_step, console)
    return lock, checkpoints


def _show_plan(job: Job, console: Console) -> None:
    console.print(plan_table(job.plan, job.recipe))
    # Here, because matplotlib takes half as long to import as all else.
    from examples.moonlight.training.plots import draw_plan

    name = job.args.init_from or f"Moonlight {job.args.preset}"
    title = f"{name}, {job.recipe.schedule} schedule"
    with phase(console, "drawing the schedule"):
        draw_plan(job.folder / SCHEDULE, job.plan, title=title)


def _restore_or_start(
    learner: Learner, texts: Texts, checkpoints: Checkpoints, clock: Clock, console: Console
) -> tuple[TrainState, int, History]:
    """The state, the step that it is after, and the run's course so far."""
    job = learner.job
    if checkpoints.latest_step() is None:
        with phase(console, "making the initial state"):
            state, step, history = jax.block_until_ready(learner.start(console)), 0, History()
    else:
        with phase(console, "reading the newest checkpoint"):
            state, restored = learner.restore(checkpoints)
        step, saved = restored.step, restored.progress
        history = History.read(saved["history"])
        clock.add(saved["clock"])
        texts.batches.set_state(saved["data"])
        stage = job.plan.segment(step).stage
        console.print(f"continuing after step {step}, in the stage {stage}")
    if step < job.plan.steps and [*history.meshes.values()][-1:] != [str(job.sharding)]:
        history.meshes[str(step + 1)] = str(job.sharding)
    return state, step, history


def _compile(learner: Learner, texts: Texts, state: TrainState, history: History) -> Programs:
    """The programs of the loop; updates that are not finite are left out if that is asked for."""
    job, args = learner.job, learner.job.args
    steps = make_train_steps(
        learner.graphdef,
        guard(learner.optimizer, args.on_nonfinite),
        job.plan.learning_rate,
        bias_rate=job.plan.bias_rate,
        on_nonfinite=args.on_nonfinite,
        roles=learner.roles,
        monitor=job.execution.monitor,
    )
    scalar = job.sharding.place()
    opt_state = wrap(learner.shardings.opt_state, args.on_nonfinite, history.skipped, scalar)
    return compile_programs(
        steps,
        make_validate(learner.inference),
        state=state,
        shardings=learner.shardings._replace(opt_state=opt_state),
        sharding=job.sharding,
        buffer_shape=buffer_shape(args, job.recipe, job.plan),
        windows_kbt=texts.validation.windows_kbt,
    )


def _continue_prompt(learner: Learner, texts: Texts, state: TrainState) -> str:
    """What the trained model writes after the prompt."""
    job = learner.job
    generator = Generator(
        learner.inference,
        state.params,
        state.bias,
        batch=1,
        length=job.recipe.sequence_length,
        chunk=1,  # one program to compile: the prompt is short
        sampling=Sampling(seed=job.args.seed),
        sharding=job.sharding,
    )
    [continuation] = continue_texts(
        generator,
        texts.tokenizer,
        [texts.prompt],
        max_new_tokens=job.recipe.sequence_length,
        stop_ids=stop_tokens(job.folder, texts.tokenizer),
    )
    return continuation


def _numbers(learner: Learner, texts: Texts, history: History, clock: Clock) -> dict[str, Any]:
    """What a finished run counted and measured, its losses apart."""
    plan = learner.job.plan
    tokens = plan.tokens(plan.steps)
    return {
        "steps": plan.steps,
        "stages": plan.stage_ends(),
        "tokens": tokens,
        "tokens_per_second": tokens / clock.step_seconds,
        "wall_seconds": clock.wall_seconds,
        "bytes_per_token": texts.validation.bytes_per_token,
        "parameters": learner.counts._asdict(),
        "meshes": history.meshes,
        "skipped_updates": history.skipped.total,
        "optimizer_state_bytes_per_device": learner.state_bytes,
    }


def main(args: Args | None = None, config: ModelConfig | None = None) -> None:
    """The program: `train` on a terminal that may fail; stopped, it says how to go on.

    What its user can mend ends it with one sentence, and the exit code 1.

    Args:
        args: Left out, the command line's.
        config: An architecture, as for `train`.
    """
    make_sturdy()
    quieten_signals()

    def program() -> None:
        asked = args or COMMAND_LINE.parse()
        enter(asked.processes)
        train(asked, config)

    try:
        run_program(program)
    except Stopped as stopped:
        rich.print(f"{stopped}; the same command with --resume goes on")
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    main()
