r"""From a conversation to tokens, and which of them count for the loss: what the assistant says.

A model's folder has a chat template, or Moonlight's special tokens, for which one is built in
(`generation/chat.py`). A model that was only pre-trained has neither: it gets ChatML, as far as its
tokenizer can spell it, and the fine-tuned model's folder gets that template (`Template.source`).

    <|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n     with ChatML's tokens
    user\nHi.<|endoftext|>\nassistant\n                          with an end of text alone

In the second, the mark before a role is left out: in letters it would be a dozen tokens of a small
vocabulary. A real token still ends every message, and stops the answer when text is generated.

Contents in a folder's own template are part of its text, as they are for transformers: one that
spells a special token becomes that token. Moonlight's built-in template keeps such names as text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from examples.finetune.data.answers import answer_spans, end_of_answer
from examples.finetune.data.conversations import ASSISTANT, Conversation, with_system
from examples.moonlight.common.files import read_json
from examples.moonlight.common.untrusted import shown
from examples.moonlight.data.tokenizer import CONFIG, tokenizers_errors
from examples.moonlight.generation.chat import (
    END,
    MIDDLE,
    ROLES,
    TEMPLATE,
    ChatSource,
    Message,
    find_template,
    moonlight_template,
    special_token,
)
from examples.moonlight.generation.model_folder import STOP_TOKENS
from examples.moonlight.generation.template_process import Limits, Rendered, TemplateProcess

CHATML_START = "<|im_start|>"

# START and END are replaced by literals.
CHATML = r"""{%- for message in messages -%}
{{ START + message['role'] + '\n' + message['content'] + END + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ START + 'assistant\n' }}
{%- endif -%}
"""


class Sample(NamedTuple):
    """A conversation as a model reads it.

    Attributes:
        tokens: Token ids.
        counts: For each token, whether predicting it counts for the loss.
    """

    tokens: list[int]
    counts: list[bool]


# Token ids of a conversation, and where the assistant's messages lie in them: a span each.
Writer = Callable[[Sequence[Message]], tuple[list[int], list[tuple[int, int]]]]


class Template(NamedTuple):
    """How a model writes conversations.

    Attributes:
        name: Where the template comes from, for messages.
        write: Tokens of a conversation, and the spans of the assistant's messages: each its content
            and the token that ends it.
        source: Jinja text for the fine-tuned model's folder, where the model's own has no template;
            None where the folder of the model, or the built-in template, is enough.
    """

    name: str
    write: Writer
    source: str | None = None


def load_template(folder: Path, tokenizer: Tokenizer, limits: Limits | None = None) -> Template:
    """Finds out how a model writes conversations.

    Args:
        folder: The model's.
        tokenizer: The folder's.
        limits: What the folder's own template may cost; None is `Limits()`.

    Raises:
        ValueError: The template cannot be read or compiled; or there is none, and the tokenizer has
            no token that ends a text.
    """
    limits = limits or Limits()
    if (found := find_template(folder)) is not None:
        return Template(str(found.path), _jinja(found, tokenizer, limits))
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if vocab.keys() >= {*ROLES.values(), MIDDLE, END}:
        return Template("the built-in template of Moonlight", _built_in(tokenizer))
    source = chatml(tokenizer, folder)
    made = ChatSource(folder / TEMPLATE, source, {})
    return Template("ChatML", _jinja(made, tokenizer, limits), source)


def chatml(tokenizer: Tokenizer, folder: Path) -> str:
    """ChatML as a jinja text, with the special tokens that a tokenizer has.

    Args:
        tokenizer: That of a model without a template.
        folder: The model's, whose settings may name the token that ends a text.

    Raises:
        ValueError: No token ends a text.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    path = folder / CONFIG
    named = special_token(read_json(path, missing_ok=True), "eos_token", path)
    ends = [name for name in (END, named, *STOP_TOKENS) if name in vocab]
    if not ends or ends[0] is None:
        raise ValueError(
            f"{folder} has no chat template, and its tokenizer no token that ends a message: add "
            f"a {TEMPLATE}, or name the token as eos_token in {CONFIG}"
        )
    start = CHATML_START if CHATML_START in vocab else ""
    return CHATML.replace("START", ascii(start)).replace("END", ascii(ends[0]))


def encode(conversation: Conversation, template: Template, *, system: str | None = None) -> Sample:
    """The tokens of a conversation, and which of them count.

    Args:
        conversation: Its messages' `counts` say which answers count.
        template: The model's.
        system: `--system`: for conversations that have no system message of their own.

    Raises:
        ValueError: The template refuses the conversation, or does not show where its answers are;
            the message has the conversation's file and line.
    """
    messages, counted, origin = with_system(conversation, system)
    try:
        tokens, spans = template.write(messages)
        counts = [False] * len(tokens)
        for start, stop in _chosen(messages, counted, spans, template):
            counts[start:stop] = [True] * (stop - start)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return Sample(tokens, counts)


def _chosen(
    messages: Sequence[Message],
    counted: Sequence[bool],
    spans: Sequence[tuple[int, int]],
    template: Template,
) -> list[tuple[int, int]]:
    """The spans of the messages that count."""
    wanted = [
        counts
        for message, counts in zip(messages, counted, strict=True)
        if message.role == ASSISTANT
    ]
    if len(spans) == len(wanted):
        return [span for span, counts in zip(spans, wanted, strict=True) if counts]
    if not spans:
        raise ValueError(f"{template.name}: the template marks no answer with {{% generation %}}")
    if all(wanted):
        return list(spans)
    raise ValueError(
        f"{template.name}: the template marks {len(spans)} parts of {len(wanted)} answers, so that "
        "`loss` of a single message cannot be followed: leave `loss` out, or mark each answer once"
    )


def _jinja(source: ChatSource, tokenizer: Tokenizer, limits: Limits) -> Writer:
    process = TemplateProcess(source.text, source.path, limits)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def render(asked: Sequence[tuple[Sequence[Message], bool]]) -> list[Rendered]:
        return process.render_marked(
            [source.variables(messages, prompt=prompt) for messages, prompt in asked]
        )

    def write(messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        if "endgeneration" in source.text:
            ((text, marks),) = render([(messages, False)])
            encoding = _encode(tokenizer, text)
            return encoding.ids, [_token_span(encoding, *mark) for mark in marks]
        text, spans = answer_spans(render, messages, source.path)
        encoding = _encode(tokenizer, text)
        answers = [message.content for message in messages if message.role == ASSISTANT]
        ends = [
            end_of_answer(encoding, text, span, answer, special)
            for span, answer in zip(spans, answers, strict=True)
        ]
        starts = [start for start, _ in spans]
        return encoding.ids, [
            _token_span(encoding, *span) for span in zip(starts, ends, strict=True)
        ]

    return write


def _encode(tokenizer: Tokenizer, text: str) -> Encoding:
    with tokenizers_errors(f"the tokenizer cannot encode the text {shown(text)}"):
        return tokenizer.encode(text, add_special_tokens=False)


def _token_span(encoding: Encoding, start: int, stop: int) -> tuple[int, int]:
    """The tokens that have a character of a span of the text; a whole one of those it cuts."""
    inside = [i for i, (a, b) in enumerate(encoding.offsets) if b > start and a < stop]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _built_in(tokenizer: Tokenizer) -> Writer:
    encoder = moonlight_template(tokenizer)
    # Every conversation is encoded with the beginning of an answer after it.
    opening = len(encoder([]))

    def write(messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [
            (len(encoder(messages[:i])), len(encoder(messages[: i + 1])) - opening)
            for i, message in enumerate(messages)
            if message.role == ASSISTANT
        ]
        return encoder(messages)[:-opening], spans

    return write
