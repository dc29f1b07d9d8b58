"""Take a batch in chunks, one after the other: one program, and the memory of one chunk.

Between chunks bfloat16 lies as its bits (`_common.bits` says why). The derivative of a loop over
them is given by hand: it is that of the same loop over values.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Num

from muon_jax._common.bits import from_bits, to_bits

BatchFunction = Callable[[Inexact[Array, "batch rows cols"]], Inexact[Array, "batch rows cols"]]

Transport = Callable[[Any], Any]
"""To bits or back, or to nothing else."""


def even(count: int, capacity: int) -> list[int]:
    """`count` in as few nearly equal runs as `capacity` allows, the longer ones first."""
    runs = -(-count // capacity)
    return [count // runs + (number < count % runs) for number in range(runs)]


def in_chunks(
    function: BatchFunction, stacks: list[Inexact[Array, "_ rows cols"]], capacity: int
) -> Inexact[Array, "batch rows cols"]:
    """Apply a function of batches to at most `capacity` matrices at a time, of all stacks together.

    The chunks have one length or two that differ by one, and each length is a loop of its own: the
    program holds `function` twice at most, and no chunk is padded.

    Args:
      function: keeps shape and dtype, and treats each matrix by itself.
      stacks: the matrices, of one shape and dtype.
      capacity: at least 1.
    """
    lengths = even(sum(len(stack) for stack in stacks), capacity)
    if len(lengths) == 1:
        return function(concatenate(stacks))

    def loops(stacks: list[jax.Array], narrow: Transport, widen: Transport) -> jax.Array:
        stored, start = concatenate([narrow(stack) for stack in stacks]), 0
        for length, equal in itertools.groupby(lengths):
            count = len([*equal])

            def chunk(number: Any, stored: Any, start: int = start, length: int = length) -> Any:
                first = start + number * length
                taken = lax.dynamic_slice_in_dim(stored, first, length)
                # Each result takes the place of its matrix: the batch is held once.
                done = narrow(function(widen(taken)))
                return lax.dynamic_update_slice_in_dim(stored, done, first, 0)

            stored = lax.fori_loop(0, count, chunk, stored)
            start += count * length
        return widen(stored)

    return _on_bits(loops, stacks)


def map_chunks(function: Callable[[Any, Any], Any], chunks: Inexact[Array, "chunks *_"]) -> Any:
    """Apply a function of a chunk's number and its array to each, and stack what it returns."""

    def loop(
        given: list[jax.Array], narrow: Callable[[Any], Any], widen: Callable[[Any], Any]
    ) -> Any:
        def one(chunk: tuple[Any, Any]) -> Any:
            number, stored = chunk
            return narrow(function(number, widen(stored)))

        (chunks,) = given
        return widen(lax.map(one, (jnp.arange(len(chunks)), narrow(chunks))))

    return _on_bits(loop, [chunks])


def concatenate(parts: list[Num[Array, "_ _ _"]]) -> Num[Array, "_ _ _"]:
    """One array of all parts; of one part, the part."""
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _on_bits(loop: Callable[..., Any], arrays: list[jax.Array]) -> Any:
    """``loop(arrays, narrow, widen)``, which stores bits and is differentiated as if values."""
    same = lambda tree: tree  # noqa: E731
    if arrays[0].dtype != jnp.bfloat16:
        return loop(arrays, same, same)

    @jax.custom_jvp
    def stored(arrays: list[jax.Array]) -> Any:
        return loop(arrays, to_bits, from_bits)

    @stored.defjvp
    def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        return jax.jvp(lambda arrays: loop(arrays, same, same), primals, tangents)

    return stored(arrays)
