"""Who the model is: `{{NAME}}` and `{{AUTHOR}}` in a dataset, filled in.

ms-swift's convention: one value for all, or two, of which the first goes into Chinese conversations
and the second into all others.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from examples.finetune.data.conversations import Conversation

PLACEHOLDER = re.compile(r"\{\{\s*(NAME|AUTHOR)\s*\}\}")

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")

_FLAGS = {"NAME": "--model_name", "AUTHOR": "--model_author"}


class Filled(NamedTuple):
    """Conversations without placeholders, and how many of them had any."""

    conversations: list[Conversation]
    filled: int


def fill_identity(
    conversations: Sequence[Conversation], *, names: Sequence[str], authors: Sequence[str]
) -> Filled:
    """Fills in the placeholders.

    Args:
        conversations: All of the dataset.
        names: `--model_name`: none, one, or the Chinese and the English one.
        authors: `--model_author`, likewise.

    Raises:
        ValueError: There are more than two values, an empty one, or none for a placeholder that
            occurs; the message has the file and line of the first.
    """
    values = {"NAME": list(names), "AUTHOR": list(authors)}
    for key, given in values.items():
        if len(given) > 2 or not all(value.strip() for value in given):
            raise ValueError(
                f"{_FLAGS[key]}: expected one value, or two for Chinese and English, got {given}"
            )
    filled = [_fill(conversation, values) for conversation in conversations]
    count = sum(a is not b for a, b in zip(filled, conversations, strict=True))
    return Filled(filled, count)


def _fill(conversation: Conversation, values: dict[str, list[str]]) -> Conversation:
    texts = [message.content for message in conversation.messages]
    if not any(PLACEHOLDER.search(text) for text in texts):
        return conversation
    chinese = any(_HAN.search(text) for text in texts)

    def value(match: re.Match[str]) -> str:
        given = values[match[1]]
        if not given:
            raise ValueError(
                f"{conversation.origin}: {match[0]} stands for what {_FLAGS[match[1]]} says: give "
                "it, or leave the dataset out"
            )
        return given[0 if chinese else -1]

    messages = (
        message._replace(content=PLACEHOLDER.sub(value, message.content))
        for message in conversation.messages
    )
    return conversation._replace(messages=tuple(messages))
