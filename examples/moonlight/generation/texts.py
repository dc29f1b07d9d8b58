"""From a generator's tokens to texts that are told while they grow: many prompts, or one talk.

Of several processes each draws the same tokens. What process 0 reads, from a terminal or by a
template, it tells the others.
"""

import contextlib
import signal
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence

from tokenizers import Tokenizer

from examples.moonlight.common.processes import group
from examples.moonlight.common.processes.agreement import gather, of_first
from examples.moonlight.data.tokenizer import TextStream, encode_text
from examples.moonlight.generation.chat import Encoder, Message
from examples.moonlight.generation.decoding import Generator


def encode_prompt(tokenizer: Tokenizer, prompt: str, window: int) -> list[int]:
    """The prompt's tokens, if a window has room for them and at least one more.

    Raises:
        ValueError: The prompt is empty or fills the window, or the tokenizer fails at it.
    """
    ids = encode_text(tokenizer, prompt)
    if not 0 < len(ids) < window:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; it needs at least 1 and fewer than the window's "
            f"{window}"
        )
    return ids


class InOrder:
    """Tells texts that grow at the same time one after the other.

    Args:
        count: Texts in all.
        tell: Called with a text's number and a piece of it, at once if all texts before it have
            ended. The first piece of each is empty.
    """

    def __init__(self, count: int, tell: Callable[[int, str], object]):
        self._count, self._tell = count, tell
        self._waiting: defaultdict[int, str] = defaultdict(str)
        self._ended: set[int] = set()
        self._current = 0
        tell(0, "")

    def add(self, number: int, piece: str) -> None:
        """A piece of one text."""
        if number != self._current:
            self._waiting[number] += piece
        elif piece:
            self._tell(number, piece)

    def end(self, number: int) -> None:
        """One text has ended."""
        self._ended.add(number)
        while self._current in self._ended:
            self._current += 1
            if self._current < self._count:
                self._tell(self._current, "")
                self.add(self._current, self._waiting[self._current])


def continue_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    tell: Callable[[int, str], object] = lambda number, piece: None,
) -> list[str]:
    """Continues any number of prompts, batch by batch.

    Args:
        generator: Draws the tokens.
        tokenizer: Turns them into text.
        prompts: Token ids.
        max_new_tokens: Tokens to add to each, at most.
        stop_ids: Tokens that end a text.
        tell: Called with a prompt's number and a piece of its continuation as soon as it is known
            and all texts before it have been told; see `InOrder`.

    Returns:
        The continuations, without the prompts.
    """
    texts = [""] * len(prompts)
    ordered = InOrder(len(prompts), tell)

    def add(number: int, piece: str) -> None:
        texts[number] += piece
        ordered.add(number, piece)

    def end(number: int, stream: TextStream) -> None:
        add(number, stream.finish())
        ordered.end(number)

    for first in range(0, len(prompts), generator.batch):
        batch = prompts[first : first + generator.batch]
        growing = {first + i: TextStream(tokenizer, prompt) for i, prompt in enumerate(batch)}
        for tokens in generator.stream(
            batch, max_new_tokens=max_new_tokens, stop_ids=stop_ids, first_row=first
        ):
            for number, token in enumerate(tokens, start=first):
                if token is not None:
                    add(number, growing[number].step(token))
                elif number in growing:
                    end(number, growing.pop(number))
        for number, stream in growing.items():
            end(number, stream)
    return texts


def converse(
    generator: Generator,
    tokenizer: Tokenizer,
    encode: Encoder,
    *,
    system: str | None,
    max_new_tokens: int,
    stop_ids: Collection[int],
    read: Callable[[], str | None],
    tell: Callable[[str], object],
    note: Callable[[str], object],
) -> list[Message]:
    """Answers messages until there are no more. What was said stays in the generator's cache.

    Args:
        generator: Draws the tokens; of one row.
        tokenizer: Turns them into text.
        encode: The chat template; see `encoder_of_first`.
        system: What goes before all messages.
        max_new_tokens: Tokens of an answer, at most.
        stop_ids: Tokens that end an answer.
        read: Waits for the user's next message; None is the end. Of several processes the first
            calls it.
        tell: Called with pieces of an answer as soon as they are known.
        note: Called with what else the user should know.

    Returns:
        The conversation, as far as the model still sees it.
    """
    first = [] if system is None else [Message("system", system)]
    turns: list[Message] = []
    room = min(max_new_tokens, generator.length // 2)
    while (text := of_first(read)) is not None:
        if not text.strip():
            continue
        turns.append(Message("user", text))
        ids = encode([*first, *turns])
        if len(ids) + room > generator.length:
            alone = len(encode([*first, turns[-1]]))
            if alone + room > generator.length:
                turns.pop()
                note(
                    f"that message makes {alone} tokens and leaves no room for an answer in the "
                    f"cache's {generator.length}: shorten it, or raise --max-length"
                )
                continue
            while len(ids) + room > generator.length:
                del turns[:2]  # a question and its answer
                ids = encode([*first, *turns])
            note("the conversation outgrows the cache: its beginning is forgotten")
        stream, pieces = TextStream(tokenizer, ids), []
        try:
            with _interruption() as check:
                for (token,) in generator.stream(
                    [ids], max_new_tokens=max_new_tokens, stop_ids=stop_ids, keep=True
                ):
                    if token is not None and (piece := stream.step(token)):
                        pieces.append(piece)
                        tell(piece)
                    check()
        except KeyboardInterrupt:
            note("stopped")
        if rest := stream.finish():
            pieces.append(rest)
            tell(rest)
        turns.append(Message("assistant", "".join(pieces)))
    return [*first, *turns]


def encoder_of_first(make: Callable[[], Encoder]) -> Encoder:
    """A chat template that process 0 alone makes and runs.

    One that asks for the time, or draws lots, so has the same tokens everywhere.

    Args:
        make: Makes it.
    """
    encode = make() if group.is_first() else None

    def tokens(messages: Sequence[Message]) -> list[int]:
        def encoded() -> list[int]:
            assert encode is not None  # called by the first alone
            return encode(messages)

        return of_first(encoded)

    return tokens


@contextlib.contextmanager
def _interruption() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt after Ctrl-C.

    A process that is alone is interrupted by Python as ever, and need not ask. Of several, all ask
    after the same token, and so all are interrupted there, or none.
    """
    if group.count() == 1:
        yield lambda: None
        return
    came: list[int] = []

    def check() -> None:
        if gather(bool(came))[0]:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
