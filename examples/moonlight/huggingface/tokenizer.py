"""A tokenizer on its way from one folder to another, in the files that transformers looks for."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import check_inside, is_there, read_bytes
from examples.moonlight.data.tokenized import END_OF_TEXT
from examples.moonlight.data.tokenizer import (
    CONFIG,
    MAX_TOKENIZER,
    TOKENIZER,
    listed_ids,
    load_tokenizer,
    read_tokenizer,
)
from examples.moonlight.huggingface.config import CONFIG_FILE, ModelConfig

GENERATION_CONFIG_FILE = "generation_config.json"

# What a model's folder may have of it.
TOKENIZER_FILES = (TOKENIZER, CONFIG, "special_tokens_map.json", "chat_template.jinja")


class TokenIds(NamedTuple):
    """What two files say of special tokens.

    Attributes:
        config: `bos_token_id`, `eos_token_id` and `pad_token_id` of `config.json`, or None each.
        generation: `generation_config.json`; its `eos_token_id` is what ends an answer, which may
            be another one.
    """

    config: dict[str, Any]
    generation: dict[str, Any]


def token_ids(source: Path | None, config: ModelConfig) -> TokenIds:
    """The special tokens of a tokenizer's folder, or the end of text of our own training.

    Args:
        source: A `tokenizer.json`, or a folder that has one; None has no ids.
        config: The model's configuration.

    Raises:
        FileNotFoundError: There is no such file, or no tokenizer in the folder.
        ValueError: The tokenizer has more tokens than the model.
    """
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if source is None:
        return TokenIds(ids, {})
    tokenizer = _read_tokenizer(source)
    tokens = tokenizer.get_vocab_size()
    if tokens > config.vocab_size:
        raise ValueError(
            f"{source} has {tokens} tokens, and the model's vocab_size is {config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    ids["eos_token_id"] = tokenizer.token_to_id(END_OF_TEXT)
    path = source / CONFIG_FILE
    if source.is_dir() and (found := read_json(path, missing_ok=True)):
        for key in ids:
            listed_ids(found, key, path, least=-1)
        ids |= {key: found[key] for key in ids if key in found}
    generation = {key: value for key, value in ids.items() if value is not None}
    path = source / GENERATION_CONFIG_FILE
    if source.is_dir() and (found := read_json(path, missing_ok=True)):
        for key in ids:
            listed_ids(found, key, path, least=-1)
        generation |= found
    return TokenIds(ids, generation)


def write_tokenizer(folder: Path, source: Path, config: ModelConfig) -> None:
    """Copies what a source has into a folder, and writes what transformers needs besides.

    A tiktoken file becomes a `tokenizer.json`: transformers would need code of its model for it.
    """
    for name in TOKENIZER_FILES if source.is_dir() else ():
        path = source / name
        if is_there(path):
            # A link out of the folder would publish what it leads to.
            check_inside(path, source)
            (folder / name).write_bytes(read_bytes(path, limit=MAX_TOKENIZER))
    if (folder / TOKENIZER).exists() and (folder / CONFIG).exists():
        return
    tokenizer = _read_tokenizer(source)
    tokenizer.save(str(folder / TOKENIZER))
    fields: dict[str, Any] = {
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        fields["eos_token"] = END_OF_TEXT
    if (folder / CONFIG).exists():
        fields = read_json(folder / CONFIG)
        fields.pop("auto_map", None)
    write_json(folder / CONFIG, fields | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object, to be read by people too."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _read_tokenizer(source: Path) -> Tokenizer:
    if source.is_dir():
        return load_tokenizer(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a tokenizer.json or a folder")
    return read_tokenizer(source)
