"""What a tuned model is asked: messages, and those of a file with the answers that are expected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from examples.finetune.data.conversations import with_system
from examples.finetune.data.sources import load_conversations
from examples.finetune.data.template import load_template
from examples.moonlight.generation.chat import (
    TEMPLATE,
    ChatSource,
    Encoder,
    Message,
    jinja_template,
    load_chat_template,
)
from examples.moonlight.generation.template_process import Limits


class Question(NamedTuple):
    """A conversation up to where an answer is due.

    Attributes:
        messages: The conversation.
        label: The answer that a file has; None of a prompt.
    """

    messages: tuple[Message, ...]
    label: str | None

    @classmethod
    def read(cls, record: Sequence[Any]) -> "Question":
        """A question from what JSON made of it."""
        messages, label = record
        return cls(tuple(Message(*message) for message in messages), label)


def load_encoder(folder: Path, tokenizer: Tokenizer) -> Encoder:
    """How a model's folder writes conversations; as in fine-tuning where it does not say.

    Raises:
        ValueError: The template cannot be compiled, or no token ends a message.
    """
    source = load_template(folder, tokenizer).source
    if source is None:
        return load_chat_template(folder, tokenizer)
    return jinja_template(ChatSource(folder / TEMPLATE, source, {}), tokenizer, Limits())


def questions_of(
    prompts: Sequence[str], files: Sequence[str], system: str | None, seed: int
) -> list[Question]:
    """What is to be answered.

    Args:
        prompts: A user's messages, each by itself.
        files: Files of conversations, whose last answers are asked for.
        system: For those that have no system message.
        seed: Chooses the N of FILE#N.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A record is none; the message names file and line.
    """
    first = () if system is None else (Message("system", system),)
    questions = [Question((*first, Message("user", text)), None) for text in prompts]
    if files:
        for conversation in load_conversations(files, seed=seed).conversations:
            *messages, answer = with_system(conversation, system).messages
            questions.append(Question(tuple(messages), answer.content))
    return questions
