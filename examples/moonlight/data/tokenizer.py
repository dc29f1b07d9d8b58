"""The tokenizer of a model's folder, and text back from tokens while they are drawn.

A folder has a `tokenizer.json`, or, as Moonlight's, a tiktoken file: `tiktoken.model`, with one
base64 token and its rank a line, and the names of the special ids in `tokenizer_config.json`. From
that file `tokenizers` rebuilds the byte-pair encoding, tiktoken itself not needed.

Texts with runs of more than 25,000 characters without white space are the exception: Moonlight's
own code cuts them before it tokenizes, this does not.
"""

import base64
import binascii
import itertools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from examples.moonlight.files import read_json

TOKENIZER, TIKTOKEN, CONFIG = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"

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
    if (path := folder / TOKENIZER).is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"{path}: not a tokenizer of Hugging Face's ({error})") from error
    if (path := folder / TIKTOKEN).is_file():
        return _from_tiktoken(path, _special_tokens(folder / CONFIG))
    raise FileNotFoundError(
        f"{folder} has no tokenizer: neither {TOKENIZER} nor {TIKTOKEN}; copy the one that the "
        "model was trained with there"
    )


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
    low = min(special, default=len(ranks))
    if low < len(ranks):
        raise ValueError(
            f"{path.with_name(CONFIG)}: added_tokens_decoder calls {low} {special[low]!r}, but "
            f"{path.name} has {len(ranks)} tokens, and special ids come after them"
        )
    # Ids follow one another, so those without a name get the one that Moonlight's code gives them.
    tokenizer.add_special_tokens(
        [
            AddedToken(special.get(i, f"<|reserved_token_{i}|>"), special=True, normalized=False)
            for i in range(len(ranks), max(special, default=-1) + 1)
        ]
    )
    return tokenizer


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Every token of a tiktoken file with its rank, in the order of ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: expected a base64 token and its rank, got {line[:80]!r}"
            ) from error
        if value != len(ranks) or not token or token in ranks:
            raise ValueError(
                f"{path}, line {number}: expected a new token of rank {len(ranks)}, got "
                f"{token!r} of rank {value}"
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
    """The two halves that merging a token's bytes ends with; other lengths if it ends elsewhere."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = (left + right for left, right in itertools.pairwise(parts))
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself if printable, else one from 256 up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(character for character in alphabet if ord(character) > 255)
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def _special_tokens(path: Path) -> dict[int, str]:
    """Names of special ids by id, from `added_tokens_decoder`."""
    special: dict[int, str] = {}
    for key, entry in read_json(path, missing_ok=True).get("added_tokens_decoder", {}).items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(name, str) or not name:
            raise ValueError(
                f'{path}: added_tokens_decoder: expected "id": {{"content": "name"}}, got '
                f"{key!r}: {entry!r}"
            )
        special[int(key)] = name
    return special
