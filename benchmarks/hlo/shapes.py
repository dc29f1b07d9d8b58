"""Arrays as HLO writes them: `f32[64,4]{1,0}`, and tuples of such."""

import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.hlo.brackets import closing, split

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's element type and dimensions, and which memory it lies in: 0 is the main one."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The size in memory, without layout padding."""
        return self.elements * _bits(self.dtype) / 8


# What an instruction returns: an array or a tuple of such.
Shape = Array | tuple["Shape", ...]


def read_shape(text: str) -> Shape:
    """An array or a tuple of them, from its text.

    Raises:
      ValueError: if it is neither.
    """
    text = text.strip()
    if text.startswith("("):
        return tuple(read_shape(part) for part in split(text[1 : closing(text, 0)]))
    found = _SHAPE.match(text)
    if found is None:
        raise ValueError(f"cannot read this HLO shape: {text[:80]!r}")
    dims = [int(size.lstrip("<=")) for size in found[2].split(",") if size]
    return Array(found[1], tuple(dims), int(found[3] or 0))


def arrays_of(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, in order, out of all tuples."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from arrays_of(part)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found is None:
        raise ValueError(f"unknown HLO element type {dtype!r}")
    return int(found[1])
