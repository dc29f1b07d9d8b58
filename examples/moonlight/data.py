"""From documents to batches: a byte-level BPE trained on the spot, a cache, and a grain pipeline.

Everything is a function of the corpus and the settings: the tokenizer, the token streams and the
order of the windows in every epoch. The position in it is one integer, saved with a checkpoint.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.moonlight.corpus import Document, hash_documents, load_documents, split_documents
from examples.moonlight.files import write_atomically

END_OF_TEXT = "<|endoftext|>"

# Part of the cache's key: raise it when what is written changes for the same corpus.
_FORMAT = 1
_TOKENIZER, _TRAIN, _VALIDATION = "tokenizer.json", "train.npy", "validation.npy"
_MANIFEST = "manifest.json"


class TokenizedCorpus(NamedTuple):
    """The corpus as a model sees it.

    Attributes:
        corpus_hash: 16 hexadecimal digits over all documents and the tokenizer's settings.
        tokenizer: the byte-level BPE trained on the training documents.
        train: token ids, uint32 [N]; every document ends in ``END_OF_TEXT``.
        validation: the same for the held-out documents.
    """

    corpus_hash: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def load_corpus(path: Path | None, *, vocab_size: int, cache_dir: Path) -> TokenizedCorpus:
    """Reads, tokenizes and caches a corpus; the second call for the same text reads the cache.

    The cache is checked against the digests in its manifest, which is written last. What an
    interrupted run, a full disk or a stray editor has left incomplete is built again.

    Args:
        path: see `corpus.load_documents`.
        vocab_size: tokens to learn, at most; 256 bytes and ``END_OF_TEXT`` are always among them.
        cache_dir: holds one folder per corpus and vocabulary.

    Returns:
        The tokenizer and both token streams.

    Raises:
        ValueError: ``vocab_size`` cannot hold the 256 bytes and ``END_OF_TEXT``.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes + 1), got {vocab_size}")
    documents = load_documents(path)
    settings = Document("settings", json.dumps([_FORMAT, vocab_size]))
    corpus_hash = hash_documents([settings, *documents])
    folder = cache_dir / corpus_hash
    if not _is_complete(folder):
        _build(folder, documents, vocab_size)
    return TokenizedCorpus(
        corpus_hash,
        Tokenizer.from_file(str(folder / _TOKENIZER)),
        np.load(folder / _TRAIN),
        np.load(folder / _VALIDATION),
    )


def train_batches(
    tokens: np.ndarray, *, sequence_length: int, batch_size: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of int32 [batch_size, sequence_length + 1], every epoch in its own order.

    Windows overlap by one token: the last target of one is the first input of the next. Batches run
    on across the end of an epoch. The position is ``get_state()``, a small dict that JSON can hold;
    ``set_state()`` continues with exactly the next batch.

    Raises:
        ValueError: the text is shorter than one window.
    """
    dataset = (
        grain.MapDataset.source(_Windows(tokens, sequence_length))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size)
    )
    # A window is a copy of half a kilobyte. One thread keeps ahead of any model; processes would
    # only cost start-up time.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)))


def validation_windows(
    tokens: np.ndarray, *, sequence_length: int, batch_size: int, count: int
) -> np.ndarray:
    """The fixed validation set: windows spread evenly over the held-out text.

    Returns:
        int32 [batches, batch_size, sequence_length + 1]; ``count`` windows where the text has that
        many, rounded down to whole batches; one smaller batch where it has not even ``batch_size``.

    Raises:
        ValueError: the text is shorter than one window.
    """
    source = _Windows(tokens, sequence_length)
    count = min(count, len(source))
    batch_size = min(batch_size, count)
    count -= count % batch_size
    indices = np.linspace(0, len(source) - 1, count).round().astype(int)
    windows = np.stack([source[index] for index in indices])
    return windows.reshape(-1, batch_size, sequence_length + 1)


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text behind each token id, int32 [vocab]; 0 for ``END_OF_TEXT``.

    A byte-level BPE writes one printable character per byte, so a token's length is its bytes. They
    turn a loss per token, which depends on the tokenizer, into one per byte, which does not.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for piece, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if piece == END_OF_TEXT else len(piece)
    return lengths


class _Windows:
    """Window i holds tokens [i * T, i * T + T]: T inputs and, shifted by one, T targets."""

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        if len(tokens) < sequence_length + 1:
            raise ValueError(
                f"{len(tokens)} tokens are fewer than one window of {sequence_length} + 1; give "
                "more data or a smaller --sequence-length"
            )
        self._tokens = tokens
        self._length = sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    # grain calls for a record by this name and asks for the type by SupportsIndex.
    def __getitem__(self, index: Any) -> np.ndarray:
        start = int(index) * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int32)


def _build(folder: Path, documents: list[Document], vocab_size: int) -> None:
    train, validation = split_documents(documents)
    tokenizer = _train_tokenizer((document.text for document in train), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        _TOKENIZER: tokenizer.to_str().encode(),
        _TRAIN: _npy(_encode(tokenizer, train)),
        _VALIDATION: _npy(_encode(tokenizer, validation)),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    digests = {name: _digest(content) for name, content in contents.items()}
    write_atomically(folder / _MANIFEST, json.dumps(digests, indent=2).encode())


def _is_complete(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _MANIFEST).read_bytes())
        names = (_TOKENIZER, _TRAIN, _VALIDATION)
        return all(_digest((folder / name).read_bytes()) == digests[name] for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch_fast([document.text for document in documents])
    return np.concatenate([np.array([*encoding.ids, end], np.uint32) for encoding in encodings])


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
