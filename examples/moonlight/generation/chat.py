"""From a conversation to the model's tokens: the chat template of a model's folder.

Moonlight's own is built in: a token for the role, its name, `<|im_middle|>`, the content,
`<|im_end|>`, one message after the other. Any other is the jinja text that the folder has in
`chat_template.jinja`, or as `chat_template` in `tokenizer_config.json`; because it came with the
weights from somewhere, it runs in jinja2's sandbox, and that in a process with limits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import MEBIBYTE, check_inside, is_there, read_text, shown
from examples.moonlight.data.tokenizer import CONFIG, encode_text
from examples.moonlight.generation.template_process import Limits, TemplateProcess

TEMPLATE = "chat_template.jinja"

# In bytes; published ones have up to 50 kB.
MAX_TEMPLATE = MEBIBYTE

# Moonlight's special tokens; ids 163584 and up in the published vocabulary.
ROLES = {"system": "<|im_system|>", "user": "<|im_user|>", "assistant": "<|im_assistant|>"}
MIDDLE, END = "<|im_middle|>", "<|im_end|>"


class Message(NamedTuple):
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


# A conversation's tokens, up to where the assistant's answer begins.
Encoder = Callable[[Sequence[Message]], list[int]]


def load_chat_template(folder: Path, tokenizer: Tokenizer, limits: Limits | None = None) -> Encoder:
    """Finds out how a model's folder writes conversations.

    Args:
        folder: The model's. Its own template goes before the built-in one: Moonlight's, for
            instance, adds a system message where there is none.
        tokenizer: The folder's.
        limits: What the folder's own template may cost; None is `Limits()`.

    Returns:
        A function from a conversation to the tokens that the assistant's answer follows.

    Raises:
        ValueError: There is no template and the tokenizer lacks Moonlight's tokens, or the template
            cannot be compiled. The function raises for what the template refuses, and for one that
            exceeds its limits.
    """
    config = read_json(folder / CONFIG, missing_ok=True)
    path = folder / TEMPLATE
    if is_there(path):
        check_inside(path, folder)
        source = read_text(path, limit=MAX_TEMPLATE)
    else:
        path, source = folder / CONFIG, _default(folder / CONFIG, config.get("chat_template"))
    if source is not None:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: special_token(config, name, folder / CONFIG) for name in names}
        return _jinja_template(path, source, tokens, tokenizer, limits or Limits())
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
            ids += encode_text(plain, content, add_special_tokens=False)
            ids.append(vocab[END])
        return ids + opening("assistant")

    return encode


def special_token(config: dict[str, Any], name: str, path: Path) -> str | None:
    """The text of `bos_token`, `eos_token`, ... in a `tokenizer_config.json`.

    Args:
        config: The file's content.
        name: The token's name.
        path: The file, for messages.

    Raises:
        ValueError: It is neither a text nor an object with one.
    """
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f'{path}: {name}: expected a text, or an object with the text as "content", got '
            f"{shown(token)}"
        )
    return text


def _default(path: Path, template: Any) -> str | None:
    """The one template of the configuration, or that called "default" of several."""
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = [entry.get("template") for entry in template if entry.get("name") == "default"]
        if len(named) == 1 and isinstance(named[0], str):
            return named[0]
    raise ValueError(
        f'{path}: chat_template: expected a text, or a list of {{"name", "template"}} with one '
        'named "default"'
    )


def _jinja_template(
    path: Path, source: str, tokens: dict[str, str | None], tokenizer: Tokenizer, limits: Limits
) -> Encoder:
    process = TemplateProcess(source, path, limits)
    given = {name: text for name, text in tokens.items() if text is not None}

    def encode(messages: Sequence[Message]) -> list[int]:
        text = process.render(
            {
                "messages": [message._asdict() for message in messages],
                "add_generation_prompt": True,
                "tools": None,  # templates ask whether they are none, which an undefined name isn't
                "documents": None,
                **given,
            }
        )
        return encode_text(tokenizer, text, add_special_tokens=False)

    return encode
