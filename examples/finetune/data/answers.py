"""Where a chat template puts the answers of a conversation, found by rendering its beginnings.

For a template without transformers' `{% generation %}`. An answer begins where the conversation
before it ends, with the prompt for an answer, and ends where the conversation ends that stops with
it. Both beginnings are checked to be beginnings of the whole text; a template that writes a
conversation otherwise once it goes on (some leave out what the model thought) is refused, since a
loss on the wrong tokens would go unnoticed.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tokenizers import Encoding

from examples.finetune.data.conversations import ASSISTANT
from examples.moonlight.common.untrusted import shown, shown_name
from examples.moonlight.generation.chat import Message
from examples.moonlight.generation.template_process import Rendered

# Renders conversations, each with or without the prompt for an answer after it.
Render = Callable[[Sequence[tuple[Sequence[Message], bool]]], list[Rendered]]

_REMEDY = "put {% generation %} and {% endgeneration %} around the answer in the template"


def answer_spans(
    render: Render, messages: Sequence[Message], path: Path
) -> tuple[str, list[tuple[int, int]]]:
    """The part of a rendered conversation that each answer adds to the prompt before it.

    Args:
        render: The template.
        messages: The conversation.
        path: The template's file, for messages.

    Returns:
        The whole text, and of each answer the characters from and to, with all that the template
        writes after the content.

    Raises:
        ValueError: A beginning of the conversation is not rendered as a beginning of the text.
    """
    answers = [i for i, message in enumerate(messages) if message.role == ASSISTANT]
    prompts = [(messages[:i], True) for i in answers]
    ends = [(messages[: i + 1], False) for i in answers]
    rendered = [each.text for each in render([(messages, False), *prompts, *ends])]
    text, befores, afters = rendered[0], rendered[1 : 1 + len(answers)], rendered[-len(answers) :]
    for i, before, after in zip(answers, befores, afters, strict=True):
        if not text.startswith(before):
            _refuse(path, i, "the prompt before it is no beginning of the whole", before, text)
        if not text.startswith(after):
            _refuse(path, i, "it is written otherwise when the conversation goes on", after, text)
        if len(after) <= len(before):
            _refuse(path, i, "it is left out", before, after)
    spans = [(len(before), len(after)) for before, after in zip(befores, afters, strict=True)]
    return text, spans


def end_of_answer(
    encoding: Encoding, text: str, span: tuple[int, int], answer: str, special: Collection[int]
) -> int:
    """Where what counts of an answer ends: with the first special token after its content.

    Where none follows, all that the template writes after the content is what ends it.

    Args:
        encoding: The text's.
        text: The whole conversation, rendered.
        span: What `answer_spans` returned for it.
        answer: The content; templates may strip it.
        special: Ids of the special tokens.

    Returns:
        A character of the text.
    """
    start, stop = span
    at = text.find(answer.strip(), start, stop)
    content_end = start if at < 0 else at + len(answer.strip())
    for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
        if a >= content_end and b <= stop and token in special:
            return b
    return stop


def _refuse(path: Path, number: int, why: str, expected: str, text: str) -> None:
    same = next((i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), None)
    same = min(len(expected), len(text)) if same is None else same
    raise ValueError(
        f"{shown_name(path)}: the chat template does not show where message {number + 1}, an "
        f"answer, lies: {why} (from character {same} on, {shown(expected[same : same + 30])} and "
        f"{shown(text[same : same + 30])}); {_REMEDY}"
    )
