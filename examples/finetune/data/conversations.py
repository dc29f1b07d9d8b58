"""Records of a dataset, in the three forms that people write them in, as conversations.

A line that is none raises `Malformed`, with file, line and what was expected: a dataset comes from
elsewhere, and a wrong record that is passed over in silence is a model trained on something else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from examples.moonlight.common.untrusted import lone_surrogate, shown
from examples.moonlight.generation.chat import Message

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

FORMATS = (
    'expected {"messages": [{"role", "content"}, ...]}, or {"query", "response"} with "history" '
    'and "system" if there are any, or {"instruction", "output"} with "input"'
)

# Which field makes a record one of a form.
_KEYS = {
    "messages": ("messages",),
    "query and response": ("query", "response"),
    "alpaca": ("instruction", "output"),
}

# ms-swift's fields that change what a model reads, and mean nothing to a model of text alone.
_NOT_TEXT = ("images", "videos", "audios", "objects", "tools")


class Malformed(ValueError):
    """A line that is no conversation.

    Attributes:
        reason: What is wrong, in the same words for all lines of the kind.
    """

    def __init__(self, where: str, reason: str, detail: str):
        super().__init__(f"{where}: {reason}: {detail}")
        self.reason = reason


class Conversation(NamedTuple):
    """Messages in turn: perhaps one of the system, then user and assistant, who has the last word.

    Attributes:
        messages: What is said, by whom.
        counts: For each message, whether it counts for the loss; only the assistant's can.
        origin: File and line, for messages.
    """

    messages: tuple[Message, ...]
    counts: tuple[bool, ...]
    origin: str


def parse_record(record: Any, origin: str) -> Conversation:
    """The conversation that a record describes. Fields that no form has are free, nulls absent.

    Args:
        record: A value of JSON.
        origin: File and line, for messages.

    Raises:
        Malformed: It describes none, or holds what a model of text cannot read.
    """
    if not isinstance(record, dict):
        raise Malformed(origin, "no object", f"{FORMATS}; got {shown(record)}")
    fields = {key: value for key, value in record.items() if value is not None}
    if found := [key for key in _NOT_TEXT if fields.get(key)]:
        raise Malformed(
            origin, "more than text", f"{', '.join(found)}: the models here read text only"
        )
    forms = [form for form, keys in _KEYS.items() if any(key in fields for key in keys)]
    if len(forms) != 1:
        reason = "several forms at once" if forms else "no known form"
        raise Malformed(origin, reason, f"{FORMATS}; got the fields {shown(list(record))}")
    if forms == ["messages"]:
        messages, counts = _messages(fields, origin)
    else:
        messages, counts = _pairs(fields, _KEYS[forms[0]], origin)
    _check_order(messages, origin)
    return Conversation(tuple(messages), tuple(counts), origin)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with a system message before it, unless it has its own."""
    if not system or conversation.messages[0].role == SYSTEM:
        return conversation
    return conversation._replace(
        messages=(Message(SYSTEM, system), *conversation.messages),
        counts=(False, *conversation.counts),
    )


def _messages(fields: Mapping[str, Any], origin: str) -> tuple[list[Message], list[bool]]:
    """The form that says the role of each message."""
    listed = fields["messages"]
    if not isinstance(listed, list) or not listed:
        raise Malformed(
            origin, "no messages", f"messages: expected a list of objects, got {shown(listed)}"
        )
    messages, counts = _system(fields, origin)
    for number, entry in enumerate(listed):
        name = f"messages[{number}]"
        if not isinstance(entry, dict):
            detail = f'{name}: expected {{"role", "content"}}, got {shown(entry)}'
            raise Malformed(origin, "a message that is no object", detail)
        role = entry.get("role")
        if role not in (SYSTEM, USER, ASSISTANT):
            detail = f"{name}: expected {SYSTEM}, {USER} or {ASSISTANT}, got {shown(role)}"
            raise Malformed(origin, "unknown role", detail)
        messages.append(Message(role, _text(entry.get("content"), f"{name}.content", origin)))
        counts.append(_loss(entry.get("loss"), role, f"{name}.loss", origin))
    return messages, counts


def _pairs(
    fields: Mapping[str, Any], keys: Sequence[str], origin: str
) -> tuple[list[Message], list[bool]]:
    """The forms of one question and one answer, and of those before them."""
    asked, answered = keys
    messages, counts = _system(fields, origin)
    history = fields.get("history", [])
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    )
    if not pairs:
        detail = f"history: expected [[query, response], ...], got {shown(history)}"
        raise Malformed(origin, "wrong history", detail)
    question = _text(fields.get(asked), asked, origin)
    if asked == "instruction" and fields.get("input", "") != "":
        question += "\n" + _text(fields["input"], "input", origin)
    turns = [
        *((_text(q, "history", origin), _text(a, "history", origin)) for q, a in history),
        (question, _text(fields.get(answered), answered, origin)),
    ]
    for query, response in turns:
        messages += [Message(USER, query), Message(ASSISTANT, response)]
        counts += [False, True]
    return messages, counts


def _system(fields: Mapping[str, Any], origin: str) -> tuple[list[Message], list[bool]]:
    """The system message of a field of its own; tables of records have it empty where none is."""
    if fields.get("system", "") == "":
        return [], []
    return [Message(SYSTEM, _text(fields["system"], "system", origin))], [False]


def _text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise Malformed(origin, "no text", f"{name}: expected a text, got {shown(value)}")
    if not value.strip():
        raise Malformed(origin, "empty text", f"{name}: expected some text, got {shown(value)}")
    if (at := lone_surrogate(value)) is not None:
        detail = f"{name}: {value[at]!a} at character {at} is no character and has no UTF-8"
        raise Malformed(origin, "half a character", detail)
    return value


def _loss(value: Any, role: str, name: str, origin: str) -> bool:
    if value is None:
        return role == ASSISTANT
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        detail = f"{name}: expected true or false, or 1 or 0, got {shown(value)}"
        raise Malformed(origin, "wrong loss", detail)
    if value and role != ASSISTANT:
        detail = f"{name}: only an {ASSISTANT}'s message counts for the loss; this is of {role}"
        raise Malformed(origin, "wrong loss", detail)
    return bool(value)


def _check_order(messages: Sequence[Message], origin: str) -> None:
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == SYSTEM else roles
    if turns and turns == [USER, ASSISTANT] * (len(turns) // 2):
        return
    said = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    detail = f"expected [{SYSTEM},] {USER}, {ASSISTANT}, ..., {USER}, {ASSISTANT}; got {said}"
    raise Malformed(origin, "wrong order of roles", detail)
