"""Which assumed matrices may be tables: their sides are those of no linear map of the model."""

import collections
from collections.abc import Sequence

from muon_jax._common.paths import Path
from muon_jax._routing import names
from muon_jax._routing.roles import Question, Role

_RATIO = 30  # of a vocabulary to a small model's width, or of channels to their coefficients
_VOCABULARY = 4096  # entries: of the smallest that a model as wide as its vocabulary may have
_FACTOR = 2  # of a vocabulary to the widest of a wide model's own layers

Leaves = Sequence[tuple[Path, tuple[int, ...]]]


def maybe_tables(leaves: Leaves, read: Sequence[Role | Question]) -> set[int]:
    """The places of assumed matrices that look like tables.

    Either one side is more than 30 times the other; or one is a vocabulary's, longer than twice all
    other widths of the model and seen in one or two leaves (an input and an output).

    Args:
      leaves: lower-case names on the path, and the shape, of every leaf.
      read: the role of each, or its question.

    Returns:
      Their places among the leaves.
    """
    seen = collections.Counter(
        length for _, shape in leaves if len(shape) >= 2 for length in {*shape}
    )
    found = set()
    for i, ((path, shape), role) in enumerate(zip(leaves, read, strict=True)):
        if not isinstance(role, Role) or not role.assumed or len(shape) < 2:
            continue
        if names.is_map(names.names_of(path)[-1]):
            continue
        long = max(shape)
        widest = max((length for length in seen if length != long), default=1)
        vocabulary = long >= _VOCABULARY and long > _FACTOR * widest and seen[long] <= 2
        if long > _RATIO * max(1, min(shape)) or vocabulary:
            found.add(i)
    return found
