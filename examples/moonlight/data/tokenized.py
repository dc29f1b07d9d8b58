"""From documents to tokens: a byte-level BPE trained on the spot, and a cache.

The tokenizer and the token streams are functions of the documents and the settings. Several sources
share one tokenizer and are kept apart otherwise, so that a run can mix them (`batches.py`).
"""

import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.moonlight.common.files import read_json, write_atomically
from examples.moonlight.data.corpus import (
    Document,
    has_few_lines,
    hash_documents,
    load_documents,
    split_documents,
)
from examples.moonlight.data.tokenizer import (
    listed_ids,
    load_tokenizer,
    read_tokenizer,
    tokenizers_errors,
)

END_OF_TEXT = "<|endoftext|>"

# Part of the cache's key: raise it when what is written changes for the same corpus.
_FORMAT = 1
_TOKENIZER, _TRAIN, _VALIDATION = "tokenizer.json", "train", "validation"
_MANIFEST = "manifest.json"

# Training a byte-pair encoding is quadratic in the length of a word, and a text may be one word: a
# genome of 80,000 letters took 3 s, and one of 3M did not end in minutes. So longer ones are cut in
# training; they are encoded as they are.
_LONGEST_WORD = 1000
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD}}}(?=\S)")

# A byte that is no character, as SentencePiece writes it.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TokenizedCorpus(NamedTuple):
    """The corpus as a model sees it.

    Attributes:
        corpus_hash: 16 hexadecimal digits over all documents and the tokenizer's settings.
        tokenizer: the byte-level BPE trained on the training documents.
        train: token ids, uint32 [N]; every document ends in ``END_OF_TEXT``.
        validation: the tokens of the held-out documents, likewise.
    """

    corpus_hash: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


class TokenizedSources(NamedTuple):
    """Several sources as a model sees them.

    Attributes:
        corpus_hash: 16 hexadecimal digits over all documents, their sources and the settings.
        tokenizer: the byte-level BPE trained on the training documents of all sources.
        train: token ids by source, uint32 [N]; every document ends in ``END_OF_TEXT``.
        validation: the tokens of the held-out documents, likewise.
    """

    corpus_hash: str
    tokenizer: Tokenizer
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]


def load_corpus(path: Path | None, *, vocab_size: int, cache_dir: Path) -> TokenizedCorpus:
    """Reads, tokenizes and caches a corpus of one source; see `load_sources`.

    Args:
        path: see `corpus.load_documents`.
        vocab_size: tokens to learn, at most; 256 bytes and ``END_OF_TEXT`` are always among them.
        cache_dir: holds one folder per corpus and vocabulary.
    """
    loaded = load_sources({"": path}, vocab_size=vocab_size, cache_dir=cache_dir)
    return TokenizedCorpus(
        loaded.corpus_hash, loaded.tokenizer, loaded.train[""], loaded.validation[""]
    )


def load_sources(
    paths: Mapping[str, Path | None],
    *,
    vocab_size: int,
    cache_dir: Path,
    pretrained: Path | None = None,
    tell: Callable[[str], object] = print,
) -> TokenizedSources:
    """Reads, tokenizes and caches sources; the second call for the same text reads the cache.

    The cache is checked against the digests in its manifest, which is written last. What an
    interrupted run, a full disk or a stray editor has left incomplete is built again.

    A text that one source holds out is taken from the training documents of the others.

    Args:
        paths: Where each source lies, by name; see `corpus.load_documents`. A lone source may have
            the name "".
        vocab_size: tokens to learn, at most; 256 bytes and ``END_OF_TEXT`` are always among them.
        cache_dir: holds one folder per corpus and vocabulary.
        pretrained: Folder of a model whose tokenizer is taken, in the place of one trained on these
            texts; ``vocab_size`` is not used then.
        tell: Is given a sentence on what a source has that is no text; see `load_documents`.

    Raises:
        FileNotFoundError: ``pretrained`` has no tokenizer.
        ValueError: ``vocab_size`` cannot hold the 256 bytes and ``END_OF_TEXT``; the pretrained
            tokenizer is malformed, or has no token that ends a text; or a source has nothing to
            train on but what another one holds out.
    """
    if vocab_size < 257 and pretrained is None:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes + 1), got {vocab_size}")
    given = None if pretrained is None else read_vocabulary(pretrained)
    documents = {name: load_documents(path, tell=tell) for name, path in paths.items()}
    settings: list[Any] = [_FORMAT, vocab_size, *_exceptions(documents, given)]
    if list(paths) != [""]:
        settings.append({name: len(texts) for name, texts in documents.items()})
    if given is not None:
        settings[1:2] = [_digest(given.tokenizer.to_str().encode()), given.end]
    corpus_hash = hash_documents(
        [Document("settings", json.dumps(settings)), *itertools.chain(*documents.values())]
    )
    folder = cache_dir / corpus_hash
    if not _is_complete(folder, documents):
        _build(folder, documents, given or vocab_size)
    return TokenizedSources(
        corpus_hash,
        Tokenizer.from_file(str(folder / _TOKENIZER)),
        {name: np.load(folder / _file(_TRAIN, name)) for name in documents},
        {name: np.load(folder / _file(_VALIDATION, name)) for name in documents},
    )


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The token ids of each text, uint32 [N], without special tokens.

    Raises:
        ValueError: The tokenizer fails at one.
    """
    with tokenizers_errors("the model's tokenizer cannot encode the texts"):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text behind each token id, int32 [largest id + 1]; 0 for special tokens.

    A byte-level BPE writes one printable character per byte, so a token's length is its bytes.
    Other tokenizers write text, with "▁" for a space, and a byte that is no character as <0x0A>.
    These lengths turn a loss per token, which depends on the tokenizer, into one per byte.
    """
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    special = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab()
    lengths = np.zeros(max(vocab.values()) + 1, np.int32)
    for piece, index in vocab.items():
        if index in special:
            continue
        if '"ByteLevel"' in decoder:
            lengths[index] = len(piece)
        elif '"ByteFallback"' in decoder and _BYTE.fullmatch(piece):
            lengths[index] = 1
        else:
            lengths[index] = len(piece.replace("▁", " ").encode())
    return lengths


def _exceptions(documents: Mapping[str, list[Document]], given: Any) -> list[str]:
    """What is done otherwise with some texts than before there was such a rule, for the hash."""
    texts = [document.text for document in itertools.chain(*documents.values())]
    few_lines = any(len(each) == 1 and has_few_lines(each[0].text) for each in documents.values())
    long_words = given is None and any(map(_LONG_WORD.search, texts))
    return ["few lines"] * few_lines + ["long words"] * long_words


class Vocabulary(NamedTuple):
    """A tokenizer, and the token that it has behind every document."""

    tokenizer: Tokenizer
    end: int


def read_vocabulary(place: Path) -> Vocabulary:
    """A model's tokenizer; a text ends in ``END_OF_TEXT``, or in what its config names.

    Args:
        place: The folder of a model or of a run, or its `tokenizer.json`.

    Raises:
        FileNotFoundError: There is no tokenizer.
        ValueError: It is malformed, or has no token that ends a text; the message says which.
    """
    if place.is_file():
        tokenizer, folder = read_tokenizer(place), place.parent
    else:
        tokenizer, folder = load_tokenizer(place), place
    end: Any = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        path = folder / "config.json"
        listed = listed_ids(read_json(path, missing_ok=True), "eos_token_id", path, least=-1)
        end = listed[0] if listed else None
    if end is None or end < 0 or tokenizer.id_to_token(end) is None:
        raise ValueError(
            f"{folder}: its tokenizer has no {END_OF_TEXT}, and its config.json names no token of "
            f"it as eos_token_id (got {end!r}): say there which token ends a text"
        )
    return Vocabulary(tokenizer, end)


def _build(
    folder: Path, documents: Mapping[str, list[Document]], vocabulary: int | Vocabulary
) -> None:
    """Tokenizes; a vocabulary that is a size is trained first."""
    train, validation = {}, {}
    for name, texts in documents.items():
        train[name], validation[name] = split_documents(texts)
    if len(documents) > 1:
        train = _without_held_out(train, validation)
    if isinstance(vocabulary, int):
        every = itertools.chain(*train.values())
        texts = (part for document in every for part in _cut_words(document.text))
        tokenizer = _train_tokenizer(texts, vocabulary)
        end = tokenizer.token_to_id(END_OF_TEXT)
        assert end is not None
        vocabulary = Vocabulary(tokenizer, end)
    contents = {_TOKENIZER: vocabulary.tokenizer.to_str().encode()}
    for kind, sources in ((_TRAIN, train), (_VALIDATION, validation)):
        for name, chosen in sources.items():
            contents[_file(kind, name)] = _npy(_encode(vocabulary, chosen))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    digests = {name: _digest(content) for name, content in contents.items()}
    write_atomically(folder / _MANIFEST, json.dumps(digests, indent=2).encode())


def _without_held_out(
    train: Mapping[str, list[Document]], validation: Mapping[str, list[Document]]
) -> dict[str, list[Document]]:
    """The training documents whose text no source holds out."""
    held_out = {document.text for document in itertools.chain(*validation.values())}
    kept = {
        name: [document for document in documents if document.text not in held_out]
        for name, documents in train.items()
    }
    for name, documents in kept.items():
        if not documents:
            raise ValueError(
                f"the other sources hold out every text that {name!r} has to train on: leave that "
                "source out, or give it more text"
            )
    return kept


def _file(kind: str, name: str) -> str:
    """The tokens' file; the lone source without a name has the plain one."""
    return f"{kind}-{name}.npy" if name else f"{kind}.npy"


def _is_complete(folder: Path, sources: Iterable[str]) -> bool:
    names = [_TOKENIZER, *(_file(kind, name) for kind in (_TRAIN, _VALIDATION) for name in sources)]
    try:
        digests = json.loads((folder / _MANIFEST).read_bytes())
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


def _cut_words(text: str) -> Iterator[str]:
    start = 0
    for word in _LONG_WORD.finditer(text):
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]


def _encode(vocabulary: Vocabulary, documents: list[Document]) -> np.ndarray:
    encoded = encode_texts(vocabulary.tokenizer, [document.text for document in documents])
    return np.concatenate([np.append(ids, np.uint32(vocabulary.end)) for ids in encoded])


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
