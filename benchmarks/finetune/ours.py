"""Our side of `benchmarks/finetune`: the program's own training step.

What `examples.finetune.sft` builds of its command line is built here: job, learner, compiled step.
Only the rows are drawn, not read from conversations.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from flax import nnx
from rich.console import Console

from benchmarks.finetune.work import Work, draw, serve
from examples.finetune.args import Args
from examples.finetune.data.packing import Rows
from examples.finetune.lora.peft_files import write_peft
from examples.finetune.training.adapted import lora_config
from examples.finetune.training.job import make_job
from examples.finetune.training.learner import make_learner
from examples.finetune.training.texts import Texts


def arguments(work: Work) -> Args:
    """The command line of the work; dropout is off, because two libraries draw it differently."""
    return Args(
        model=work.model,
        output_dir=Path(work.adapter).with_name("run"),
        optimizer=work.optimizer,
        lora_rank=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=0.0,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=work.weight_decay,
        max_grad_norm=work.max_grad_norm,
        adam_beta1=work.betas[0],
        adam_beta2=work.betas[1],
        per_device_train_batch_size=work.batch_size,
        gradient_accumulation_steps=work.accumulation,
        seed=work.seed,
        torch_dtype="float32",
    )


def make(work: Work) -> tuple[Callable[[], float], dict[str, Any]]:
    """Compiles the step, and writes the adapter that both sides begin with."""
    drawn, args = draw(work), arguments(work)
    job = make_job(args).with_rows(work.length)
    learner = make_learner(job, steps=1)
    state, frozen, _ = learner.start(Console(stderr=True))
    write_peft(
        Path(work.adapter), nnx.merge(learner.graphdef, state.params, *frozen), lora_config(args)
    )
    start = time.perf_counter()
    # A step asks nothing else of the texts than how long their rows are.
    texts = SimpleNamespace(row_length=work.length, validation=None)
    train_step, _ = learner.compile(state, frozen, cast(Texts, texts))
    compile_seconds = time.perf_counter() - start
    position_abt = np.broadcast_to(
        np.arange(work.length, dtype=np.int32), drawn.tokens_abt.shape
    ).copy()
    rows = Rows(*drawn, np.ones_like(drawn.tokens_abt), position_abt)
    held: dict[str, Any] = {"state": state, "step": 0}
    del state  # it is donated

    def step() -> float:
        held["state"], measured = train_step(held["state"], frozen, rows, np.int32(held["step"]))
        held["step"] += 1
        return float(measured.loss)

    told = {
        "compile_s": compile_seconds,
        "trained": learner.trained,
        "parameters": learner.counts.total,
    }
    return step, told


if __name__ == "__main__":
    serve(make)
