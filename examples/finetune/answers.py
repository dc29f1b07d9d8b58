"""Answers of a tuned model: to questions one by one, or to what is typed in a terminal."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from examples.finetune.prompts import Question
from examples.moonlight.common.files import write_atomically
from examples.moonlight.common.processes import group
from examples.moonlight.generate import CHAT_LENGTH, ask, cache_length
from examples.moonlight.generation.chat import Encoder, Message
from examples.moonlight.generation.decoding import Generator, check_lengths
from examples.moonlight.generation.model_folder import OpenModel
from examples.moonlight.generation.texts import continue_texts, converse

# What ends a conversation, as in ms-swift.
ENDS = ("exit", "quit")


def answer(
    args: Any,
    opened: OpenModel,
    encode: Encoder,
    prepare: Callable[[int, int], Generator],
    questions: Sequence[Question],
    console: Console,
    aside: Console,
) -> list[str]:
    """Answers conversations one by one."""
    ids = [encode(question.messages) for question in questions]
    longest = opened.config.max_position_embeddings
    length = cache_length(args.max_length, max(map(len, ids)) + args.max_new_tokens, longest)
    check_lengths(ids, length, longest)
    generator = prepare(min(args.batch_size, len(ids)), length)
    told: list[int] = []
    waiting: list[str] = []

    def label(number: int) -> None:
        if (expected := questions[number].label) is not None:
            console.out(f"\n[expected] {expected}", highlight=False)

    def tell(number: int, piece: str) -> None:
        if piece:
            waiting.append(piece)
        else:  # a text begins
            if told:
                console.out("".join(waiting), highlight=False)
                label(told[-1])
                console.out()
            waiting.clear()
            told.append(number)
            console.out(
                f"> {questions[number].messages[-1].content}", style="bold", highlight=False
            )
        if args.stream:
            console.out("".join(waiting), end="", highlight=False)
            waiting.clear()

    answers = continue_texts(
        generator,
        opened.tokenizer,
        ids,
        max_new_tokens=args.max_new_tokens,
        stop_ids=opened.stop_ids,
        tell=tell,
    )
    console.out("".join(waiting), highlight=False)
    label(told[-1])
    if args.result_path is not None and group.is_first():
        lines = [
            json.dumps(
                {
                    "messages": [message._asdict() for message in question.messages],
                    "response": answer,
                    "labels": question.label,
                },
                ensure_ascii=False,
            )
            for question, answer in zip(questions, answers, strict=True)
        ]
        write_atomically(args.result_path, ("\n".join(lines) + "\n").encode())
    aside.print(str(generator.speed), soft_wrap=True)
    return answers


def talk(
    args: Any,
    opened: OpenModel,
    encode: Encoder,
    prepare: Callable[[int, int], Generator],
    system: str | None,
    console: Console,
    aside: Console,
) -> list[str]:
    """Answers what is typed, until the end of the input."""
    longest = opened.config.max_position_embeddings
    generator = prepare(1, cache_length(args.max_length, min(CHAT_LENGTH, longest), longest))
    waiting: list[str] = []

    def tell(piece: str) -> None:
        if args.stream:
            console.out(piece, end="", highlight=False)
        else:
            waiting.append(piece)

    def show() -> None:
        console.out("".join(waiting), end="", highlight=False)
        waiting.clear()

    def read() -> str | None:
        show()
        said = ask(console)
        return None if said is not None and said.strip().lower() in ENDS else said

    said: list[Message] = converse(
        generator,
        opened.tokenizer,
        encode,
        system=system,
        max_new_tokens=args.max_new_tokens,
        stop_ids=opened.stop_ids,
        read=read,
        tell=tell,
        note=lambda text: aside.print(f"[dim]({text})[/]"),
    )
    aside.print(str(generator.speed), soft_wrap=True)
    return [content for role, content in said if role == "assistant"]
