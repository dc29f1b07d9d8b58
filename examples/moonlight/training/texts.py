"""What a run reads: training batches, held-out windows and the prompt of its sample."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
from rich.console import Console
from tokenizers import Tokenizer

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import everywhere_equal
from examples.moonlight.data.batches import Span, plan_spans, train_batches, windows_read
from examples.moonlight.data.prepared import PreparedSources, is_prepared, open_sources
from examples.moonlight.data.tokenized import (
    TokenizedSources,
    load_sources,
    token_byte_lengths,
)
from examples.moonlight.data.tokenizer import TOKENIZER
from examples.moonlight.data.validation import Validation, make_validation
from examples.moonlight.generation.texts import encode_prompt
from examples.moonlight.training.job import Job

# Times that a text is read up to which it teaches almost as much as new text would (Muennighoff et
# al. 2023, arXiv 2305.16264).
MOST_EPOCHS = 4


class Texts(NamedTuple):
    """A run's data.

    Attributes:
        corpus_hash: 16 hexadecimal digits over all documents and the tokenizer's settings.
        tokenizer: The corpus' own, or that of the model to begin with.
        spans: The mixes that the batches are read in, one after the other.
        batches: This process's rows of the training batches, from the first.
        validation: The held-out windows.
        prompt: The token ids that the sample begins with.
    """

    corpus_hash: str
    tokenizer: Tokenizer
    spans: Sequence[Span]
    batches: grain.DatasetIterator
    validation: Validation
    prompt: list[int]


def epochs(job: Job, spans: Sequence[Span], sizes: Mapping[str, int]) -> dict[str, float]:
    """How often the whole run reads each source; sizes are in tokens."""
    length, windows = job.recipe.sequence_length, job.plan.sequences(job.plan.steps)
    return {
        name: read * length / sizes[name] for name, read in windows_read(spans, windows).items()
    }


def epochs_line(name: str, times: float, job: Job) -> str:
    """Says how often a source is read; with advice, where that is too often."""
    if times < 1:
        return f"this run reads {times:.0%} of {name}"
    line = f"this run reads {name} {times:,.1f} times"
    # "About four times" is what is known; the default text's length depends on the Python, too.
    if round(times) <= MOST_EPOCHS:
        return line
    fewer = int(job.plan.tokens(job.plan.steps) * MOST_EPOCHS / times)
    return (
        f"[yellow]{line}[/]; past about {MOST_EPOCHS}, each time teaches less. Give more text with "
        f"--data, or --total-tokens {fewer} or fewer"
    )


def _read(job: Job, console: Console) -> TokenizedSources | PreparedSources:
    """The tokens: prepared ones where they lie, or those of texts, from the cache or made."""
    if any(map(is_prepared, job.sources.values())):
        resumes = job.args.resume and (job.folder / TOKENIZER).exists()
        return open_sources(job.sources, pretrained=job.folder if resumes else job.pretrained)
    # Process 0 builds what is not in the cache; the others find it there, or build their own where
    # they have a file system of their own.
    if not group.is_first():
        group.barrier()
    corpus = load_sources(
        job.sources,
        vocab_size=job.config.vocab_size,
        cache_dir=job.args.cache_dir,
        pretrained=job.pretrained,
        tell=lambda words: console.print(words, markup=False, highlight=False, soft_wrap=True),
    )
    if group.is_first():
        group.barrier()
    return corpus


def load_texts(job: Job, console: Console) -> Texts:
    """Reads and tokenizes the texts, or takes them from the cache, and says how large they are.

    Raises:
        FileNotFoundError: A text is not there.
        ValueError: A text, or a prepared corpus, cannot be read or is too short, or the prompt does
            not fit a window, or the devices do not divide the held-out windows.
    """
    args, recipe = job.args, job.recipe
    corpus = _read(job, console)
    everywhere_equal(corpus.corpus_hash, "the corpus")
    sizes = {name: len(tokens) for name, tokens in corpus.train.items()}
    console.print(
        f"corpus {corpus.corpus_hash}: {sum(sizes.values()):,} training tokens, "
        f"{sum(map(len, corpus.validation.values())):,} held out, vocabulary "
        f"{corpus.tokenizer.get_vocab_size()}"
    )
    spans = plan_spans(job.plan, sizes)
    for name, times in epochs(job, spans, sizes).items():
        console.print(epochs_line(name if len(sizes) > 1 else "the corpus", times, job))
    batches = train_batches(
        corpus.train,
        spans,
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        seed=args.data_seed,
        rows=job.sharding.local_rows(recipe.batch_size),
    )
    validation = make_validation(
        corpus,
        token_byte_lengths(corpus.tokenizer),
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        count=args.eval_windows,
    )
    prompt = encode_prompt(corpus.tokenizer, args.prompt, recipe.sequence_length)
    if (windows := validation.windows_kbt.shape[1]) % job.sharding.batch_shards:
        raise ValueError(
            f"--mesh {args.mesh}: the validation batch of {windows} windows cannot be divided by "
            f"{job.sharding.batch_shards}; give more data or more --eval-windows"
        )
    return Texts(corpus.corpus_hash, corpus.tokenizer, spans, batches, validation, prompt)
