"""The tokenizer of a model's folder, and text back from tokens while they are drawn.

A folder has a `tokenizer.json`, or, as Moonlight's, a tiktoken file: `tiktoken.model`, with one
base64 token and its rank a line, and the names of the special ids in `tokenizer_config.json`. From
that file `tokenizers` rebuilds the byte-pair encoding, tiktoken itself not needed.

Texts with runs of more than 25,000 characters without white space are the exception: Moonlight's
own code cuts them before it tokenizes, this does not.
"""

import base64
import binascii
import contextlib
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import (
    MEBIBYTE,
    check_inside,
    is_there,
    lone_surrogate,
    read_bytes,
    shown,
)

TOKENIZER, TIKTOKEN, CONFIG = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"

# In bytes. A tokenizer.json of 256,000 tokens has 34 MB, Moonlight's tiktoken file 2.6 MB.
MAX_TOKENIZER = 256 * MEBIBYTE
MAX_TIKTOKEN = 64 * MEBIBYTE

# Tables have a row per id, up to the largest: at most this many more than twice the tokens.
_SPARE_IDS = 1024

# An id as a key of JSON.
_ID = re.compile("0|[1-9][0-9]{0,18}")

# How text is cut before merging; a tiktoken file leaves it out. Published with the weights of
# moonshotai/Moonlight-16B-A3B (tokenization_moonshot.py): runs of Han, words with a contraction,
# numbers of up to three digits, punctuation, line ends, white space.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_HEAD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_TAIL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
MOONLIGHT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_HEAD}*{_TAIL}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_HEAD}+{_TAIL}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a model's folder.

    Args:
        folder: Holds `tokenizer.json`, or `tiktoken.model` and perhaps `tokenizer_config.json`.

    Returns:
        The tokenizer; its ids are the rows of the model's embedding.

    Raises:
        FileNotFoundError: The folder has neither file.
        ValueError: A file is malformed; the message names it, and the line.
    """
    if is_there(path := folder / TOKENIZER):
        return read_tokenizer(path)
    if is_there(path := folder / TIKTOKEN):
        return _from_tiktoken(path, _special_tokens(folder / CONFIG))
    raise FileNotFoundError(
        f"{folder} has no tokenizer: neither {TOKENIZER} nor {TIKTOKEN}; copy the one that the "
        "model was trained with there"
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`.

    How it would cut or fill texts to a length is not taken over, as transformers does not either.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is malformed, or its largest id is far from its number of tokens.
    """
    check_inside(path, path.parent)
    content = read_bytes(path, limit=MAX_TOKENIZER)
    with tokenizers_errors(f"{path}: not a tokenizer of Hugging Face's"):
        tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab = tokenizer.get_vocab()
    token = max(vocab, key=vocab.__getitem__, default=None)
    if token is None:
        raise ValueError(f"{path}: the tokenizer has no tokens")
    if vocab[token] > 2 * len(vocab) + _SPARE_IDS:
        raise ValueError(
            f"{path}: the token {shown(token)} has the id {vocab[token]:,}, and there are "
            f"{len(vocab):,} tokens: ids count from 0; fetch the file again"
        )
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text.

    Raises:
        ValueError: The text is none, or the tokenizer fails: its patterns may be such that a text
            takes forever, and `tokenizers` then gives up.
    """
    if (at := lone_surrogate(text)) is not None:
        raise ValueError(
            f"the text holds a lone surrogate, {text[at]!a}, at character {at}, which is no "
            "character: remove it"
        )
    with tokenizers_errors(f"the tokenizer cannot encode the text {shown(text)}"):
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def listed_ids(fields: Mapping[str, Any], name: str, path: Path, *, least: int = 0) -> list[int]:
    """The ids of special tokens in a configuration: of one, of several, or of none.

    Args:
        fields: The file's content.
        name: The field's name.
        path: The file, for messages.
        least: The smallest id; some files have -1 for none.

    Raises:
        ValueError: It is neither an id nor a list of ids.
    """
    value = fields.get(name)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and least <= item < 2**31 for item in listed):
        raise ValueError(f"{path}: {name}: expected an id or a list of ids, got {shown(value)}")
    return listed


@contextlib.contextmanager
def tokenizers_errors(message: str) -> Iterator[None]:
    """Turns what `tokenizers` raises into a ValueError: it has no error of its own, and panics."""
    try:
        yield
    except BaseException as error:
        if not _is_tokenizers_own(error):
            raise
        raise ValueError(f"{message} ({shown(str(error))})") from error


def _is_tokenizers_own(error: BaseException) -> bool:
    """Whether it is an exception, or Rust's panic, which is none and has no public name."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class TextStream:
    """Text as its tokens come: the pieces, joined, are the text of all of them.

    A piece never ends inside a character: the bytes of an unfinished one are held back.

    Args:
        tokenizer: Decodes the tokens; special ones have no text.
        prompt: The tokens before the first: some decoders strip the space that begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._stream = decoders.DecodeStream(ids=self._ids, skip_special_tokens=True)
        self._told = len(tokenizer.decode(self._ids))

    def step(self, token: int) -> str:
        """The text that became certain with one more token, often empty."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._told += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back and never finished, as replacement characters."""
        return self._tokenizer.decode(self._ids)[self._told :]


# --------------------------------------------------------------------------------------------------
# tiktoken
# --------------------------------------------------------------------------------------------------


def _from_tiktoken(path: Path, special: dict[int, str]) -> Tokenizer:
    """Rebuilds the encoding of a tiktoken file.

    tiktoken merges, while it can, the neighbours whose union has the lowest rank, but takes a piece
    that is a token as it is. `tokenizers` wants, instead of ranks, the pairs that it may merge. One
    per token is enough: whatever stands beside a token's bytes, as long as nothing is merged across
    their ends they are merged in the order in which they are merged alone.
    """
    ranks = _read_ranks(path)
    characters = _byte_characters()

    def as_text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    halves = (_last_merge(token, ranks) for token in ranks)
    merges = [(as_text(parts[0]), as_text(parts[1])) for parts in halves if len(parts) == 2]
    vocab = {as_text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(MOONLIGHT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, path, special)
    return tokenizer


def _add_special(tokenizer: Tokenizer, path: Path, special: dict[int, str]) -> None:
    """Names the ids after those of the file's tokens; ids in between are named as well."""
    count, where = tokenizer.get_vocab_size(), f"{path.with_name(CONFIG)}: added_tokens_decoder"
    low, high = min(special, default=count), max(special, default=-1)
    if low < count:
        raise ValueError(
            f"{where} calls {low} {shown(special[low])}, but {path.name} has {count} tokens, and "
            "special ids come after them"
        )
    if high > 2 * count + _SPARE_IDS:
        raise ValueError(
            f"{where} calls {shown(high)} {shown(special[high])}, but {path.name} has {count} "
            "tokens, and special ids follow them: fetch both files again"
        )
    # Ids follow one another, so those without a name get the one that Moonlight's code gives them.
    names = {i: special.get(i, f"<|reserved_token_{i}|>") for i in range(count, high + 1)}
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names.values()]
    )
    for i, name in names.items():
        if (found := tokenizer.token_to_id(name)) != i:
            raise ValueError(f"{where} calls {i} {shown(name)}, which is the name of {found}, too")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Every token of a tiktoken file with its rank, in the order of ranks."""
    ranks: dict[bytes, int] = {}
    check_inside(path, path.parent)
    content = read_bytes(path, limit=MAX_TIKTOKEN)
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: expected a base64 token and its rank, got {shown(line)}"
            ) from error
        if value != len(ranks) or not token or token in ranks:
            raise ValueError(
                f"{path}, line {number}: expected a new token of rank {len(ranks)}, got "
                f"{shown(token)} of rank {shown(value)}"
            )
        ranks[token] = value
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path}: no token for the byte {missing[0]}, and {len(missing) - 1} more; the file is "
            "cut off, or no byte-level encoding"
        )
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two halves that merging a token's bytes ends with; other lengths if it ends elsewhere.

    Of all pairs of neighbours the one of the lowest rank is merged, the first of several. They wait
    in a heap, since a file may hold tokens of any length. A part is known by where it begins:
    `end[i]` is where it ends, and `before[j]` where the part that ends at j begins.
    """
    size = len(token)
    end, before = list(range(1, size + 1)), list(range(-1, size))
    heap: list[tuple[int, int, int]] = []

    def offer(start: int) -> None:
        if start >= 0 and end[start] < size:
            stop = end[end[start]]
            if (rank := ranks.get(token[start:stop])) is not None:
                heapq.heappush(heap, (rank, start, stop))

    for start in range(size - 1):
        offer(start)
    parts = size
    while parts > 2 and heap:
        _, start, stop = heapq.heappop(heap)
        middle = end[start]
        # Either of the two may have been merged otherwise since; then the pair is no more.
        if not start < middle < stop or before[middle] != start or end[middle] != stop:
            continue
        end[start], before[stop], end[middle] = stop, start, 0
        parts -= 1
        offer(before[start])
        offer(start)
    starts, start = [], 0
    while start < size:
        starts.append(start)
        start = end[start]
    return [token[start : end[start]] for start in starts]


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself if printable, else one from 256 up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(character for character in alphabet if ord(character) > 255)
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def _special_tokens(path: Path) -> dict[int, str]:
    """Names of special ids by id, from `added_tokens_decoder`."""
    special: dict[int, str] = {}
    entries: Any = read_json(path, missing_ok=True).get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: added_tokens_decoder: expected an object, got {shown(entries)}")
    for key, entry in entries.items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not _ID.fullmatch(key) or not isinstance(name, str) or not name:
            raise ValueError(
                f'{path}: added_tokens_decoder: expected "id": {{"content": "name"}}, got '
                f"{shown(key)}: {shown(entry)}"
            )
        special[int(key)] = name
    return special
