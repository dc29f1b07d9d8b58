"""What a fine-tuning reads: conversations, made rows, in the order of the steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from examples.finetune.args import Args
from examples.finetune.data.batches import steps_per_epoch, train_batches, validation_batches
from examples.finetune.data.conversations import Conversation
from examples.finetune.data.packing import PackingReport, Rows, pack
from examples.finetune.data.self_cognition import fill_identity
from examples.finetune.data.sources import Loaded, hold_out, load_conversations
from examples.finetune.data.template import Template, encode, load_template
from examples.finetune.training.job import Job
from examples.moonlight.common.processes.agreement import everywhere_equal
from examples.moonlight.common.untrusted import MEBIBYTE, is_there, read_text

CORPUS = Path(__file__).parents[1] / "corpus"

# What the repository's own corpus says of the model where the command line is silent.
_NAMES, _AUTHORS = ("小缪", "Mu"), ("muon_jax 的作者", "the authors of muon_jax")


class Texts(NamedTuple):
    """A run's data.

    Attributes:
        tokenizer: The model's.
        template: How the model writes conversations.
        batches: Training rows, `[micro-batches, batch, time]` for each step, from the first.
        validation: The held-out rows, `[batches, batch, time]`; None where nothing is held out.
        row_length: Tokens of a training row.
        length: Tokens of the longest row, held out or not.
        steps_per_epoch: Steps that read every row once.
        steps: How many the whole run has.
        settings: What a resumed run has to have in common of the data.
    """

    tokenizer: Tokenizer
    template: Template
    batches: grain.DatasetIterator
    validation: Rows | None
    row_length: int
    length: int
    steps_per_epoch: int
    steps: int
    settings: dict[str, Any]


def load_texts(job: Job, console: Console) -> Texts:
    """Reads conversations, writes them as the model's template does, and puts them into rows.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A record, the template or a flag that concerns them is none; the message names
            file and line, or the flag.
    """
    args = job.args
    tokenizer = job.base.tokenizer()
    template = load_template(job.base.folder, tokenizer)
    train, held_out = _conversations(args, console)
    system = system_text(args.system)

    def rows(conversations: Sequence[Conversation]) -> tuple[Rows, PackingReport]:
        return pack(
            [encode(conversation, template, system=system) for conversation in conversations],
            max_length=args.max_length,
            packing=args.packing,
            truncation=args.truncation_strategy,
        )

    train_rows, report = rows(train)
    settings: dict[str, Any] = {"data": report.digest, "validation": None}
    _tell(console, "training", report)
    length, validation = report.length, None
    if held_out:
        held_rows, held_report = rows(held_out)
        _tell(console, "held out", held_report)
        settings["validation"] = held_report.digest
        batch = args.per_device_eval_batch_size * job.sharding.batch_shards
        batches = [*validation_batches(held_rows, batch_size=batch)]
        validation = jax.tree.map(lambda *x: np.stack(x), *batches)
        length = max(length, held_report.length)
    everywhere_equal(settings, "the conversations")
    if length > job.config.max_position_embeddings:
        console.print(
            f"rows have {length} tokens, and the model was made for "
            f"{job.config.max_position_embeddings}: it sees later positions for the first time",
            style="yellow",
        )
    micro = {"micro_batches": args.gradient_accumulation_steps, "batch_size": job.micro_batch}
    epoch = steps_per_epoch(train_rows, **micro)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    console.print(
        f"{steps} steps of {job.batch} rows, {steps / epoch:.3g} epochs of {epoch}", highlight=False
    )
    return Texts(
        tokenizer=tokenizer,
        template=template,
        batches=train_batches(train_rows, **micro, seed=args.data_seed),
        validation=validation,
        row_length=report.length,
        length=length,
        steps_per_epoch=epoch,
        steps=steps,
        settings=settings | {"steps": steps},
    )


def system_text(system: str | None) -> str | None:
    """`--system`: the text itself, or what a .txt file holds."""
    if system is None or not system.endswith(".txt"):
        return system
    if not is_there(Path(system)):
        raise FileNotFoundError(
            f"--system {system}: no such file; give the message, or a .txt file that holds it"
        )
    return read_text(Path(system), limit=MEBIBYTE).strip()


def _conversations(args: Args, console: Console) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations to train on, and those that are held out."""
    sources = list(args.dataset) or [str(path) for path in sorted(CORPUS.glob("*.jsonl"))]
    names, authors = args.model_name, args.model_author
    if not args.dataset:
        names, authors = names or _NAMES, authors or _AUTHORS

    def load(sources: Sequence[str]) -> list[Conversation]:
        loaded: Loaded = load_conversations(
            sources, seed=args.data_seed, skip_malformed=not args.strict
        )
        for report in loaded.reports:
            for line in report.lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        return fill_identity(loaded.conversations, names=names, authors=authors).conversations

    train = load(sources)
    if args.val_dataset:
        return train, load(args.val_dataset)
    if args.split_dataset_ratio:
        return hold_out(train, args.split_dataset_ratio, seed=args.data_seed)
    if args.eval_steps is not None or args.eval_strategy not in (None, "no"):
        console.print(
            "nothing is held out, so nothing is validated: give --val_dataset, or a share with "
            "--split_dataset_ratio 0.01",
            style="yellow",
        )
    return train, []


def _tell(console: Console, what: str, report: PackingReport) -> None:
    for line in report.lines():
        console.print(f"{what}: {line}", highlight=False, soft_wrap=True)
