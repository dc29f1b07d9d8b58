"""What a run reads: training batches, held-out windows and the prompt of its sample."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
from rich.console import Console
from tokenizers import Tokenizer

from examples.moonlight.data.batches import Span, plan_spans, train_batches
from examples.moonlight.data.tokenized import load_sources, token_byte_lengths
from examples.moonlight.data.validation import Validation, make_validation
from examples.moonlight.generation.texts import encode_prompt
from examples.moonlight.training.job import Job


class Texts(NamedTuple):
    """A run's data.

    Attributes:
        corpus_hash: 16 hexadecimal digits over all documents and the tokenizer's settings.
        tokenizer: The corpus' own, or that of the model to begin with.
        spans: The mixes that the batches are read in, one after the other.
        batches: The training batches, from the first.
        validation: The held-out windows.
        prompt: The token ids that the sample begins with.
    """

    corpus_hash: str
    tokenizer: Tokenizer
    spans: Sequence[Span]
    batches: grain.DatasetIterator
    validation: Validation
    prompt: list[int]


def load_texts(job: Job, console: Console) -> Texts:
    """Reads and tokenizes the texts, or takes them from the cache, and says how large they are.

    Raises:
        FileNotFoundError: A text is not there.
        ValueError: A text cannot be read or is too short, or the prompt does not fit a window, or
            the devices do not divide the held-out windows.
    """
    args, recipe = job.args, job.recipe
    corpus = load_sources(
        job.sources,
        vocab_size=job.config.vocab_size,
        cache_dir=args.cache_dir,
        pretrained=job.pretrained,
    )
    sizes = {name: len(tokens) for name, tokens in corpus.train.items()}
    console.print(
        f"corpus {corpus.corpus_hash}: {sum(sizes.values()):,} training tokens, "
        f"{sum(map(len, corpus.validation.values())):,} held out, vocabulary "
        f"{corpus.tokenizer.get_vocab_size()}"
    )
    spans = plan_spans(job.plan, sizes)
    batches = train_batches(
        corpus.train,
        spans,
        sequence_length=recipe.sequence_length,
        batch_size=recipe.batch_size,
        seed=args.data_seed,
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
