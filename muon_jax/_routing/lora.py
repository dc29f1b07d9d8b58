"""The two factors of a low-rank adapter: known by name, their axes by the factor beside.

    delta W = A B        A [fan-in axes.., r], B [r, fan-out axes..]

Flax NNX's ``LoRA`` and hand-written ones call them ``lora_a`` and ``lora_b`` (or ``lora_A``); qwix,
and tunix with it, append ``_lora_a`` and ``_lora_b`` to the name of the weight, and give A every
axis that the weight's product sums over and B every axis that stays: ``[heads, head_dim, r]`` and
``[r, d]`` for a projection from heads. Such axes are one side of one matrix, where those of a stack
are none: the rank tells which, because it is A's last axis and follows B's stack::

    A [8, 64, 4]   B [4, 512]      no stack: A's last axis is B's first
    A [6, 64, 4]   B [6, 4, 512]   six of each
    A [4, 64, 4]   B [4, 4, 512]   either: nothing says which
"""

import re
from typing import Literal

from muon_jax._common.paths import Path
from muon_jax._routing import names

Factor = Literal["a", "b"]

_FACTOR = re.compile(r"((?:\w+_)?lora_?)([ab])")
_OTHER = {"a": "b", "b": "a"}


def factor_of(path: Path) -> Factor | None:
    """Which factor a leaf is by its lower-case names; None for any other leaf."""
    match = _FACTOR.fullmatch(names.names_of(path)[-1])
    return None if match is None else "a" if match[2] == "a" else "b"


def find_pairs(leaves: list[tuple[Path, tuple[int, ...]]]) -> list[tuple[int, ...] | None]:
    """The shape of the factor beside each factor; None where there is none, or no factor.

    Args:
      leaves: lower-case names on the path, and the shape without known stacks, of every leaf.
    """
    shapes = dict(leaves)
    found = []
    for path, _ in leaves:
        owner = names.owner_of(path)
        match = _FACTOR.fullmatch(owner[-1]) if owner else None
        other = None
        if match is not None:
            other = shapes.get((*owner[:-1], match[1] + _OTHER[match[2]], *path[len(owner) :]))
        found.append(other)
    return found


def stack_axes(factor: Factor, shape: tuple[int, ...], other: tuple[int, ...] | None) -> int | None:
    """How many leading axes of a factor are a stack's; None where shapes leave it open.

    Args:
      factor: which one it is.
      shape: its shape, of two axes or more.
      other: the shape of the factor beside it.
    """
    if len(shape) == 2:
        return 0
    if other is None:
        return None
    a, b = (shape, other) if factor == "a" else (other, shape)
    possible = [n for n in range(min(len(a), len(b)) - 1) if a[:n] == b[:n] and a[-1] == b[n]]
    return possible[0] if len(possible) == 1 else None
