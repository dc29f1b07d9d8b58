"""A run's output folder: entered, locked, and taken back to an earlier checkpoint if asked."""

import contextlib
from typing import Any

from rich.console import Console

from examples.finetune.training.job import Job
from examples.finetune.training.keeping import TotalLimit
from examples.finetune.training.place import FLAGS, PREFIX
from examples.finetune.training.texts import Texts
from examples.moonlight.common.files import write_atomically
from examples.moonlight.common.processes import group
from examples.moonlight.data.tokenizer import TOKENIZER
from examples.moonlight.generation.chat import TEMPLATE
from examples.moonlight.generation.model_folder import copy_companions
from examples.moonlight.run_folder.checkpoint import DAMAGED, Checkpoints
from examples.moonlight.run_folder.folder import RESULTS, open_run_folder
from examples.moonlight.run_folder.lock import RunLock
from examples.moonlight.run_folder.seal import Damaged


def enter_folder(
    job: Job,
    texts: Texts,
    settings: dict[str, Any],
    console: Console,
    held: contextlib.ExitStack,
) -> tuple[RunLock, Checkpoints]:
    """The run's folder, locked, with all that a new run begins with; and its checkpoints."""
    folder, step = job.folder, job.place.step
    lock = held.enter_context(
        open_run_folder(
            folder, settings, resume=job.place.resume, must_exist=step is not None, flags=FLAGS
        )
    )
    if group.is_first():
        write_atomically(folder / TOKENIZER, texts.tokenizer.to_str(pretty=True).encode())
        copy_companions(job.base.folder, folder)
        if texts.template.source is not None:
            write_atomically(folder / TEMPLATE, texts.template.source.encode())
    group.barrier()
    checkpoints = held.enter_context(
        contextlib.closing(
            Checkpoints(
                folder,
                TotalLimit(job.args.save_total_limit),
                console,
                prefix=PREFIX,
                damaged=folder / DAMAGED,
                flags=FLAGS,
                guard=lock.check,
            )
        )
    )
    if step is not None:
        _go_back(job, checkpoints, step, console)
    return lock, checkpoints


def _go_back(job: Job, checkpoints: Checkpoints, step: int, console: Console) -> None:
    """Deletes what a run has done after a step, and says what."""
    if (damage := checkpoints.damage(step)) is not None:
        raise Damaged(
            f"{checkpoints.path(step)}: this checkpoint is damaged: {damage}; give another"
        )
    later = [str(other) for other in checkpoints.all_steps() if other > step]
    if later:
        console.print(
            f"going back to step {step}: deleting the checkpoints {', '.join(later)}, and all "
            f"metrics after step {step}"
        )
        if group.is_first():
            (job.folder / RESULTS).unlink(missing_ok=True)
        group.barrier()
    checkpoints.delete_after(step)
