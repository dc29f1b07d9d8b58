"""Many tokens from a model, one after the other: a cache, prefill, decoding.

Prompts go into the cache in chunks of a fixed number of tokens, then every call takes each row's
last token and draws its next. So there are two programs, compiled once for a batch and a length of
cache, whatever the prompts: short rows are filled up, and what fills them is written behind their
end, where the row's own next tokens replace it before anything reads it.

The token of a call is an argument of the next one before the host has seen it, so that the device
need not wait for the host to print it.

Of several processes each calls the same with the same prompts, and each gets the tokens of all: so
they end at the same one.
"""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.moonlight.common.processes.group import barrier
from examples.moonlight.generation.sampling import Sampling, draw
from examples.moonlight.model.execution.sharding import BATCH_AXES, ModelSharding, on_host


@dataclasses.dataclass
class Speed:
    """Tokens of actual texts, and the seconds that they took, compilation apart."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    def __str__(self) -> str:
        """Rates, as a terminal shows them."""
        prefill = self.prefill_tokens / max(self.prefill_seconds, 1e-9)
        text = f"prefill {self.prefill_tokens:,} tokens, {prefill:,.0f} tokens/s"
        if self.decode_tokens:
            decode = self.decode_tokens / max(self.decode_seconds, 1e-9)
            text += f"; decode {self.decode_tokens:,} tokens, {decode:,.1f} tokens/s"
        return f"{text}; compiled in {self.compile_seconds:.1f} s"


class Generator:
    """Continues batches of token sequences.

    Args:
        graphdef: Static half of a model with `init_cache`, `decode` and `logits`.
        params: Its parameters.
        bias: Its router biases, if it has any.
        batch: Rows that go through the model together, filled up to a multiple of the mesh's.
        length: Tokens of the cache: the longest text, prompt and continuation together.
        chunk: Tokens of a prompt that go through the model together.
        sampling: How tokens are drawn.
        sharding: The devices, as the model's execution has them.

    Attributes:
        speed: What all calls of `stream` together took.

    Raises:
        ValueError: `batch`, `length` or `chunk` is not positive.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        bias: nnx.State,
        *,
        batch: int,
        length: int,
        chunk: int = 128,
        sampling: Sampling,
        sharding: ModelSharding | None = None,
    ):
        for name, value in (("batch", batch), ("length", length), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        sharding = sharding or ModelSharding()
        self.speed, self.length, self.batch = Speed(), length, batch
        self._padded = -(-batch // sharding.batch_shards) * sharding.batch_shards
        self._chunk = min(chunk, length)
        self._sharding = sharding
        self._state = (params, bias)
        # Of each row: the tokens that the cache holds, from the first on.
        self._held: list[list[int]] = [[] for _ in range(batch)]
        self._cache: Any = None

        started = time.perf_counter()
        rows, caches = sharding.place(BATCH_AXES), sharding.place(None, BATCH_AXES)

        def make_cache() -> Any:
            return nnx.merge(graphdef, params, bias).init_cache(self._padded, length)

        def advance(state: Any, cache: Any, *inputs: jax.Array) -> tuple[jax.Array, Any]:
            return _advance(nnx.merge(graphdef, *state), cache, *inputs, sampling=sampling)

        def compiled(tokens: int) -> Any:
            number_b, number_b1, tokens_bt = (
                jax.ShapeDtypeStruct((self._padded, *shape), jnp.int32)
                for shape in ((), (1,), (tokens,))
            )
            inputs = (tokens_bt, number_b, number_b, number_b1, number_b)
            jitted = jax.jit(
                advance,
                donate_argnums=1,
                in_shardings=(places, caches, *len(inputs) * [rows]),
                out_shardings=(rows, caches),
            )
            return jitted.lower(self._state, jax.eval_shape(make_cache), *inputs).compile()

        places = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        self._make_cache = jax.jit(make_cache, out_shardings=caches).lower().compile()
        self._decode = compiled(1)
        self._prefill = self._decode if self._chunk == 1 else compiled(self._chunk)
        barrier()  # all have compiled before the first of them waits for another in a collective
        self.speed.compile_seconds = time.perf_counter() - started

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        first_row: int = 0,
        keep: bool = False,
    ) -> Iterator[list[int | None]]:
        """Continues each prompt until a stop token, `max_new_tokens` or the end of the cache.

        Args:
            prompts: Token ids, at most `batch` sequences, each of at least one token and of fewer
                than `length`.
            max_new_tokens: Tokens to add to each, at most.
            stop_ids: Tokens that end a text; they are not part of it.
            first_row: The number of the first prompt among all that there are. Draws depend on it,
                on the seed and on the position, and on nothing else.
            keep: Whatever a prompt has in common with what its row read and wrote last is still in
                the cache: go on from there, as a conversation does.

        Yields:
            The next token of each prompt; None for those that have ended.

        Raises:
            ValueError: There are too many prompts, or one is empty or too long.
        """
        self._check(prompts, max_new_tokens)
        count, started = len(prompts), time.perf_counter()
        length_b = np.ones(self._padded, np.int32)
        length_b[:count] = [len(prompt) for prompt in prompts]
        row_b = first_row + np.arange(self._padded, dtype=np.int32)
        limits = np.minimum(max_new_tokens, self.length - length_b[:count])
        ended = [False] * count
        token_b1 = self._read(prompts, length_b, row_b, keep)
        for step in range(limits.max()):
            drawn_b1, reads_on = token_b1, step + 1 < limits.max()
            if reads_on:
                token_b1 = self._call(
                    self._decode, drawn_b1, length_b, length_b + 1, drawn_b1, row_b
                )
            length_b = length_b + 1
            drawn = on_host(drawn_b1)[:count, 0].tolist()  # waits for it
            tokens: list[int | None] = []
            for row, token in enumerate(drawn):
                if reads_on:
                    self._held[row].append(token)
                ended[row] = ended[row] or token in stop_ids
                tokens.append(None if ended[row] else token)
                ended[row] = ended[row] or step + 1 == limits[row]
            seconds, started = time.perf_counter() - started, time.perf_counter()
            if step == 0:
                self.speed.prefill_seconds += seconds
            else:
                self.speed.decode_seconds += seconds
                self.speed.decode_tokens += sum(token is not None for token in tokens)
            yield tokens
            if all(ended):
                return

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        length_b: np.ndarray,
        row_b: np.ndarray,
        keep: bool,
    ) -> Any:
        """Puts prompts into the cache; returns the token after each, `[batch, 1]`."""
        begin_b = np.zeros_like(length_b)
        for row, prompt in enumerate(prompts):
            if keep and self._cache is not None:
                # The last token is read again: its activations say what comes next.
                begin_b[row] = min(_common(self._held[row], prompt), len(prompt) - 1)
        self._held = [[] for _ in self._held]
        token_b1 = np.zeros((self._padded, 1), np.int32)
        for first in range(0, (length_b - begin_b).max(), self._chunk):
            start_b = begin_b + first
            tokens_bc = np.zeros((self._padded, self._chunk), np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[start_b[row] : start_b[row] + self._chunk]
                tokens_bc[row, : len(part)] = part
            token_b1 = self._call(self._prefill, tokens_bc, start_b, length_b, token_b1, row_b)
        for row, prompt in enumerate(prompts):
            self._held[row] = list(prompt)
        self.speed.prefill_tokens += int((length_b - begin_b)[: len(prompts)].sum())
        return token_b1

    def _call(self, program: Any, *inputs: Any) -> Any:
        cache = self._make_cache() if self._cache is None else self._cache
        self._cache = None  # donated; if the call is interrupted, there is none
        spread = [
            x if isinstance(x, jax.Array) else self._sharding.spread(x, BATCH_AXES) for x in inputs
        ]
        token_b1, self._cache = program(self._state, cache, *spread)
        return token_b1

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be positive, got {max_new_tokens}")
        if not 0 < len(prompts) <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} prompts, got {len(prompts)}")
        check_lengths(prompts, self.length)


def check_lengths(
    prompts: Sequence[Sequence[int]], length: int, longest: int | None = None
) -> None:
    """Checks that every prompt fits into a cache, with room for one token more.

    Args:
        prompts: The tokens of each.
        length: The tokens of the cache.
        longest: The tokens of the longest text that the model reads; None is the cache's.

    Raises:
        ValueError: One is empty or too long.
    """
    longest = longest or length
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: give at least a character")
        if len(prompt) >= longest:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, and the model reads texts of at most "
                f"{longest}, the answer included: shorten it"
            )
        if len(prompt) >= length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, and --max-length {length} leaves no "
                f"room behind it: shorten it, or give up to --max-length {longest}"
            )


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = zip(held, prompt, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(prompt)))


def _advance(
    model: Any,
    cache: Any,
    tokens_bt: jax.Array,
    start_b: jax.Array,
    length_b: jax.Array,
    token_b1: jax.Array,
    row_b: jax.Array,
    *,
    sampling: Sampling,
) -> tuple[jax.Array, Any]:
    """Runs tokens behind the cache, and draws the next one of the rows that end among them.

    Args:
        model: The model.
        cache: Its cache.
        tokens_bt: New tokens.
        start_b: The position of each row's first new one.
        length_b: Tokens of each row's text; the next one's position.
        token_b1: What stays for the rows that do not end here.
        row_b: The number of each row's text.
        sampling: How to draw.

    Returns:
        The next tokens, int32 `[batch, 1]`, and the cache.
    """
    batch, time = tokens_bt.shape
    act_nd, cache = model.decode(tokens_bt, cache, start_b)
    last_b = length_b - 1 - start_b
    index_b11 = jnp.clip(last_b, 0, time - 1)[:, None, None]
    act_bd = jnp.take_along_axis(act_nd.reshape(batch, time, -1), index_b11, axis=1)[:, 0]
    drawn_b = draw(model.logits(act_bd), sampling, row_b, length_b)
    ends_b = (last_b >= 0) & (last_b < time)
    return jnp.where(ends_b[:, None], drawn_b[:, None], token_b1), cache
