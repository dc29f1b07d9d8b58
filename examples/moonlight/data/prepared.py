"""Tokens that `examples.moonlight.data.prepare` wrote, read where they are needed.

A prepared corpus is a folder:

    tokens.json              what is in it, with the SHA-256 of every other file; written last
    tokenizer.json           the tokenizer
    train-00000.bin          token ids, uint16 or uint32, little-endian: documents in their order
    validation-00000.bin     those of the held-out documents, likewise

Nothing is read at the start but tokens.json and the tokenizer: a window is read when it is asked
for, at its place in a file. Plain files, and not ArrayRecord's: EXPERIMENTS.md has the windows per
second of both.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import MEBIBYTE, check_file, shown_name
from examples.moonlight.data.tokenizer import TOKENIZER, load_tokenizer, read_tokenizer

MANIFEST, UNFINISHED = "tokens.json", "unfinished.json"
KINDS = TRAIN, VALIDATION = "train", "validation"

# Raised when what is written changes.
FORMAT = 1

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class Shard(NamedTuple):
    """One file of tokens.

    Attributes:
        tokens: How many it has.
        sha256: The digest of its bytes, in hexadecimal digits.
    """

    tokens: int
    sha256: str


class Manifest(NamedTuple):
    """What a prepared corpus holds.

    Attributes:
        dtype: "uint16" or "uint32".
        vocabulary: The tokenizer's largest id, and 1.
        end_of_text: The id behind every document.
        tokenizer: The SHA-256 of `tokenizer.json`.
        train: The files of the training tokens, in order.
        validation: The files of the held-out ones.
    """

    dtype: str
    vocabulary: int
    end_of_text: int
    tokenizer: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    @property
    def corpus_hash(self) -> str:
        """The corpus' name: 16 hexadecimal digits over all that it holds."""
        return hashlib.sha256(json.dumps([FORMAT, *self]).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """What `tokens.json` has of it."""
        shards = {kind: [shard._asdict() for shard in getattr(self, kind)] for kind in KINDS}
        return {"format": FORMAT, "corpus": self.corpus_hash} | self._asdict() | shards


def shard_name(kind: str, number: int) -> str:
    """The file of a shard."""
    return f"{kind}-{number:05d}.bin"


def is_prepared(path: Path | None) -> bool:
    """Whether a folder holds a prepared corpus, or the beginning of one."""
    return path is not None and any((path / name).is_file() for name in (MANIFEST, UNFINISHED))


def read_manifest(folder: Path) -> Manifest:
    """What a prepared corpus says of itself.

    Raises:
        ValueError: It is unfinished, or not as it was written.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{shown_name(folder)} is unfinished: the command that began it goes on (python -m "
            "examples.moonlight.data.prepare)"
        )
    record = read_json(folder / MANIFEST)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST}: expected the format {FORMAT}, got {record.get('format')!r}: "
            "prepare the texts again"
        )
    manifest = None
    try:
        shards = {
            kind: tuple(Shard(int(each["tokens"]), str(each["sha256"])) for each in record[kind])
            for kind in KINDS
        }
        names = Manifest._fields[:4]
        manifest = Manifest(*(record[name] for name in names), **shards)
    except (KeyError, TypeError, ValueError):
        pass
    if manifest is None or manifest.corpus_hash != record.get("corpus"):
        raise ValueError(
            f"{folder / MANIFEST} is damaged: fetch it again, or prepare the texts again"
        )
    check_fits(manifest.vocabulary, manifest.dtype)
    return manifest


def check_fits(vocabulary: int, dtype: str) -> None:
    """Checks that a type has a number for each token of a vocabulary.

    Raises:
        ValueError: It has not.
    """
    if dtype not in DTYPES or not 0 < vocabulary <= np.iinfo(DTYPES[dtype]).max + 1:
        raise ValueError(
            f"tokens of the type {dtype!r} cannot hold a vocabulary of {vocabulary:,}: it takes "
            f"{smallest_dtype(vocabulary)}"
        )


def smallest_dtype(vocabulary: int) -> str:
    """The name of the type for a vocabulary, which is its largest id and 1.

    Raises:
        ValueError: There is none.
    """
    for name, dtype in DTYPES.items():
        if vocabulary <= np.iinfo(dtype).max + 1:
            return name
    raise ValueError(f"a vocabulary of {vocabulary:,} has ids of more than 32 bits")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """A tokenizer's largest id, and 1."""
    return max(tokenizer.get_vocab().values()) + 1


class PreparedTokens:
    """The tokens of one side of a corpus, as if they were one array; threads may share it.

    Args:
        folder: The prepared corpus.
        manifest: What it holds.
        kind: "train" or "validation".

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file has another size than when it was written.
    """

    def __init__(self, folder: Path, manifest: Manifest, kind: str):
        shards: Sequence[Shard] = getattr(manifest, kind)
        self._dtype, self._vocabulary = DTYPES[manifest.dtype], manifest.vocabulary
        self._paths = [folder / shard_name(kind, number) for number in range(len(shards))]
        self._ends = np.cumsum([0, *(shard.tokens for shard in shards)])
        for path, shard in zip(self._paths, shards, strict=True):
            expected, size = shard.tokens * self._dtype.itemsize, check_file(path)
            if size != expected:
                raise ValueError(
                    f"{shown_name(path)} has {size:,} bytes, and had {expected:,} when it was "
                    "written: fetch it again, or prepare the texts again"
                )
        self._files: dict[int, int] = {}
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        assert step == 1
        read = np.empty(max(0, stop - start), self._dtype)
        number = int(np.searchsorted(self._ends, start, side="right")) - 1
        done = 0
        while done < len(read):
            first = start + done - int(self._ends[number])
            count = min(len(read) - done, int(self._ends[number + 1]) - start - done)
            self._read(number, first, read[done : done + count])
            done += count
            number += 1
        return read

    def _read(self, number: int, first: int, into: np.ndarray) -> None:
        """Fills an array with a file's tokens from one on."""
        view, offset = into.data.cast("B"), first * self._dtype.itemsize
        while view:
            # Not mapped into memory: of a mapped file Linux reads megabytes around each window.
            count = os.preadv(self._file(number), [view], offset)
            if not count:
                raise ValueError(
                    f"{shown_name(self._paths[number])} became shorter: fetch it again"
                )
            view, offset = view[count:], offset + count
        if len(into) and (largest := int(into.max())) >= self._vocabulary:
            raise ValueError(
                f"{shown_name(self._paths[number])} has the token {largest}, of a vocabulary of "
                f"{self._vocabulary}: it is damaged; fetch it again"
            )

    def _file(self, number: int) -> int:
        with self._opening:
            if number not in self._files:
                file = os.open(self._paths[number], os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
                self._files[number] = file
            return self._files[number]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


class PreparedSources(NamedTuple):
    """Prepared corpora as a model sees them; see `tokenized.TokenizedSources`.

    Attributes:
        corpus_hash: 16 hexadecimal digits over all tokens, and the sources' names.
        tokenizer: The tokenizer of all.
        train: The training tokens by source.
        validation: The tokens of the held-out documents.
    """

    corpus_hash: str
    tokenizer: Tokenizer
    train: dict[str, PreparedTokens]
    validation: dict[str, PreparedTokens]


def open_sources(
    paths: Mapping[str, Path | None], *, pretrained: Path | None = None
) -> PreparedSources:
    """Opens prepared corpora, in a time that does not depend on their size.

    Args:
        paths: Their folders by name; a lone one may have the name "".
        pretrained: Folder of the model or the run to go on with, whose tokenizer has to be theirs.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A folder holds texts, or a corpus that is unfinished or damaged; or the
            tokenizers differ.
    """
    manifests: dict[Path, Manifest] = {}
    for path in paths.values():
        if path is None or not is_prepared(path):
            raise ValueError(
                f"--data {path}: its texts are no tokens yet, and prepared corpora are mixed with "
                "nothing else: prepare it as well, with their tokenizer (python -m "
                "examples.moonlight.data.prepare)"
            )
        manifests[path] = read_manifest(path)
    (first, one), *others = manifests.items()
    for path, manifest in others:
        if manifest.tokenizer != one.tokenizer:
            raise ValueError(
                f"{shown_name(path)} has another tokenizer than {shown_name(first)}: prepare one "
                f"of them again, with --tokenizer {shown_name(first)}"
            )
    if digest_of(first / TOKENIZER) != one.tokenizer:
        raise ValueError(f"{first / TOKENIZER} is damaged: fetch it again")
    tokenizer = read_tokenizer(first / TOKENIZER)
    if pretrained is not None and load_tokenizer(pretrained).to_str() != tokenizer.to_str():
        raise ValueError(
            f"{shown_name(first)} was prepared with another tokenizer than that of {pretrained}: "
            f"prepare it again, with --tokenizer {pretrained}"
        )
    by_name = {name: path for name, path in paths.items() if path is not None}
    hashes = {name: manifests[path].corpus_hash for name, path in by_name.items()}
    together = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
    return PreparedSources(
        hashes[""] if [*hashes] == [""] else together,
        tokenizer,
        *(
            {name: PreparedTokens(path, manifests[path], kind) for name, path in by_name.items()}
            for kind in KINDS
        ),
    )


def check_digests(folder: Path, tell: Callable[[int], object] = lambda _: None) -> Manifest:
    """Reads a prepared corpus whole, and compares it with what was written.

    Args:
        folder: The corpus.
        tell: Is given the bytes read so far, now and then.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: It is unfinished, or a file is not as it was written.
    """
    manifest = read_manifest(folder)
    expected = {TOKENIZER: manifest.tokenizer}
    for kind in KINDS:
        PreparedTokens(folder, manifest, kind)
        for number, shard in enumerate(getattr(manifest, kind)):
            expected[shard_name(kind, number)] = shard.sha256
    read = 0
    for name, digest in expected.items():
        start = read
        if digest_of(folder / name, lambda count, start=start: tell(start + count)) != digest:
            raise ValueError(
                f"{shown_name(folder / name)} is damaged: its SHA-256 is not that of {MANIFEST}; "
                "fetch it again, or prepare the texts again"
            )
        read += (folder / name).stat().st_size
    return manifest


def digest_of(path: Path, tell: Callable[[int], object] = lambda _: None) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Args:
        path: The file.
        tell: Is given the bytes read so far, now and then.
    """
    digest, read = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(16 * MEBIBYTE):
            digest.update(block)
            read += len(block)
            tell(read)
    return digest.hexdigest()
