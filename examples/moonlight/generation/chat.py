"""From a conversation to the model's tokens: the chat template of a model's folder.

Moonlight's own is built in: a token for the role, its name, `<|im_middle|>`, the content,
`<|im_end|>`, one message after the other. Any other is the jinja text that the folder has in
`chat_template.jinja`, or as `chat_template` in `tokenizer_config.json`; it runs in jinja2's
sandbox, because it came with the weights from somewhere.
"""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from examples.moonlight.data.tokenizer import CONFIG
from examples.moonlight.files import read_json

TEMPLATE = "chat_template.jinja"

# Moonlight's special tokens; ids 163584 and up in the published vocabulary.
ROLES = {"system": "<|im_system|>", "user": "<|im_user|>", "assistant": "<|im_assistant|>"}
MIDDLE, END = "<|im_middle|>", "<|im_end|>"


class Message(NamedTuple):
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


# A conversation's tokens, up to where the assistant's answer begins.
Encoder = Callable[[Sequence[Message]], list[int]]


def load_chat_template(folder: Path, tokenizer: Tokenizer) -> Encoder:
    """Finds out how a model's folder writes conversations.

    Args:
        folder: The model's. Its own template goes before the built-in one: Moonlight's, for
            instance, adds a system message where there is none.
        tokenizer: The folder's.

    Returns:
        A function from a conversation to the tokens that the assistant's answer follows.

    Raises:
        ValueError: There is no template and the tokenizer lacks Moonlight's tokens, or the template
            cannot be compiled. The function raises for what the template refuses.
    """
    config = read_json(folder / CONFIG, missing_ok=True)
    if (path := folder / TEMPLATE).is_file():
        source = path.read_text(encoding="utf-8")
    else:
        path, source = folder / CONFIG, _default(folder / CONFIG, config.get("chat_template"))
    if source is not None:
        return _jinja_template(path, source, config, tokenizer)
    return moonlight_template(tokenizer)


def moonlight_template(tokenizer: Tokenizer) -> Encoder:
    """Moonlight's template. Contents are text: a special token's name in them stays a name.

    Raises:
        ValueError: The tokenizer lacks one of the template's tokens.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    missing = sorted({*ROLES.values(), MIDDLE, END} - vocab.keys())
    if missing:
        raise ValueError(
            f"no chat template: the folder has neither {TEMPLATE} nor chat_template in {CONFIG}, "
            f"and the tokenizer lacks {', '.join(missing)} of Moonlight's; use --prompt"
        )
    # "Encode special tokens" as text, that is: in a copy, because it is a setting of the whole.
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True

    def opening(role: str) -> list[int]:
        if role not in ROLES:
            raise ValueError(f"a message's role is one of {', '.join(ROLES)}; got {role!r}")
        name = plain.encode(role, add_special_tokens=False).ids
        return [vocab[ROLES[role]], *name, vocab[MIDDLE]]

    def encode(messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for role, content in messages:
            ids += opening(role)
            ids += plain.encode(content, add_special_tokens=False).ids
            ids.append(vocab[END])
        return ids + opening("assistant")

    return encode


def special_token(config: dict[str, Any], name: str) -> str | None:
    """The text of `bos_token`, `eos_token`, ... in a `tokenizer_config.json`."""
    token = config.get(name)
    return token.get("content") if isinstance(token, dict) else token


def _default(path: Path, template: Any) -> str | None:
    """The one template of the configuration, or that called "default" of several."""
    if template is None or isinstance(template, str):
        return template
    try:
        return {entry["name"]: entry["template"] for entry in template}["default"]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{path}: chat_template: expected a text, or a list of {{"name", "template"}} with one '
            'named "default"'
        ) from error


def _jinja_template(
    path: Path, source: str, config: dict[str, Any], tokenizer: Tokenizer
) -> Encoder:
    # Templates are written for the names and the white space that transformers gives them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: text for name in names if (text := special_token(config, name)) is not None}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{path}: the chat template cannot be compiled: its line {error.lineno}: {error}"
        ) from error

    def encode(messages: Sequence[Message]) -> list[int]:
        try:
            text = template.render(
                messages=[message._asdict() for message in messages],
                add_generation_prompt=True,
                tools=None,  # templates ask whether they are none, which an undefined name is not
                documents=None,
                **tokens,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{path}: the chat template refuses this: {error}") from error
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
