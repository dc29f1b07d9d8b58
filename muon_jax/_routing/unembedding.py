"""Which leaves are unembedding heads, by their names, their places and the embedding's rows.

A head is the last layer of a module that is called one (``classifier/out_proj``, and then
``classifier/dense`` is hidden), the one leaf whose output is as wide as the embedding has rows, or
the last of a model's own layers, behind others or behind convolutions.
"""

import collections
import itertools
import re
from collections.abc import Sequence

from muon_jax._common.paths import Path
from muon_jax._routing import names

_IMAGE = 4  # channels

Leaves = Sequence[tuple[Path, tuple[int, ...]]]


def find_heads(leaves: Leaves, stacks: Sequence[Sequence[str]]) -> tuple[dict[int, str], set[int]]:
    """The unembedding heads among the leaves, and the hidden layers of modules called heads.

    Args:
      leaves: lower-case names on the path, and the shape without stack axes, of every leaf.
      stacks: the names of each leaf's leading stack axes.

    Returns:
      Why each head is one, by the leaf's place; and the places of the hidden layers.
    """
    heads, hidden = {}, set()
    modules = collections.defaultdict(list)
    for i, (path, shape) in enumerate(leaves):
        if len(shape) >= 2 and names.has_heads(path) and (place := _head_module(path)):
            modules[place[0]].append((i, *place[1:], shape))
    for members in modules.values():
        last = _last_layers(members)
        heads |= dict.fromkeys(last, "unembedding head")
        hidden |= {i for i, *_ in members} - {*last}
    matrices = [
        (i, path, shape)
        for i, (path, shape) in enumerate(leaves)
        if len(shape) == 2 and min(shape) > 1 and path and not names.is_bias(path[-1])
    ]
    tables = {
        shape
        for _, path, shape in matrices
        if names.is_token_embedding(names.names_of(path)[-1])
        and path[-1] != "kernel"
        and shape[0] > shape[1]
    }
    heads |= _as_wide_as_a_table([m for m in matrices if not stacks[m[0]]], tables)
    tops = [m for m in matrices if names.is_top(m[1])]
    for i, path, shape in tops:
        # A head follows hidden layers, and none follows it.
        behind = [j for j, _, other in tops if j != i and shape[1] == other[0]]
        before = [j for j, _, other in tops if j != i and shape[0] == other[1]]
        if (names.is_top_head(path) or before) and not behind:
            heads.setdefault(i, "unembedding head")
    named = heads or any(
        names.is_head(names.names_of(path)[-1]) and names.has_heads(path) for path, _ in leaves
    )
    if not named and (i := _last_of_convolutions(leaves)) is not None:
        heads[i] = "unembedding head, the last layer behind convolutions"
    return heads, hidden - heads.keys()


def _as_wide_as_a_table(
    matrices: Sequence[tuple[int, Path, tuple[int, ...]]], tables: set[tuple[int, ...]]
) -> dict[int, str]:
    """The one leaf, in no repeated module, whose output is as wide as an embedding has rows.

    Several such leaves are an MLP's, whose hidden width is that of the vocabulary by chance.
    """
    found = {}
    for rows, width in tables:
        others = [m for m in matrices if not names.is_embedding(names.names_of(m[1])[-1])]
        wide = [(i, path, shape) for i, path, shape in others if rows in shape]
        if len(wide) != 1:
            continue
        ((i, path, shape),) = wide
        fits = (shape[1] == rows and shape[0] < rows) or shape == (rows, width)
        if fits and not any(re.search(r"\d$", name) for name in path[:-1]):
            found[i] = f"unembedding head, as wide as the embedding's {rows} rows"
    return found


def _head_module(path: Path) -> tuple[Path, str, int] | None:
    """The module of a head that a leaf belongs to, the leaf's layer in it and its index."""
    owner, index = tuple(name for name in names.owner_of(path) if name != "~"), -1
    steps = []
    while owner and (owner[-1].isdigit() or (owner[-1] == "layers" and steps)):
        if owner[-1].isdigit():
            index = int(owner[-1])
        steps.append(owner[-1])
        owner = owner[:-1]
    if not owner:
        return None
    if names.is_head(owner[-1]):
        return owner, "", index
    outer = owner[:-1]
    while outer and (outer[-1].isdigit() or outer[-1] == "layers"):
        outer = outer[:-1]
    if outer and names.is_head_module(outer[-1]):
        if numbered := re.search(r"\d+$", owner[-1]):
            index = int(numbered[0])
        if names.is_plain(owner[-1]):
            return outer, owner[-1], index
        if outer[-1] == "heads":  # one for each task, by its name
            return outer, owner[-1], -1
    return None


def _last_layers(members: list[tuple[int, str, int, tuple[int, ...]]]) -> list[int]:
    if named := [i for i, layer, _, _ in members if names.is_last(layer)]:
        return named
    if all(index >= 0 for _, _, index, _ in members):
        members = sorted(members, key=lambda member: member[2])
        pairs = [(a[3], b[3]) for a, b in itertools.pairwise(members)]
        # Layers behind one another, in either order of the axes; else heads side by side.
        if all(a[-1] == b[0] for a, b in pairs) or all(a[0] == b[-1] for a, b in pairs):
            return [members[-1][0]]
    # A square layer is a hidden one: before the last, or before an embedding that is used again.
    return [i for i, layer, _, shape in members if not layer or len({*shape[-2:]}) > 1]


def _last_of_convolutions(leaves: Leaves) -> int | None:
    """The last linear layer of a model's own, where all of its own layers are convolutions or such.

    Flax names a ResNet's or a small image classifier's head ``Dense_0`` or ``linear2``. A layer
    whose output another leaf takes, as a U-Net's embedding of time, or that convolutions upwards
    follow, as in a decoder, is none.
    """
    own = [
        (i, path, shape)
        for i, (path, shape) in enumerate(leaves)
        if len(path) > 1 and path[-1] == "kernel" and names.is_at_the_top(path)
    ]
    linear = [
        (int(re.sub(r"\D", "", path[-2]) or 0), i)
        for i, path, shape in own
        if len(shape) == 2 and re.fullmatch(r"(dense|linear|fc)(_?\d+)?", path[-2])
    ]
    stem = any(len(shape) == 4 and max(shape[:2]) <= names.LONGEST_WINDOW for _, _, shape in own)
    others = sum(len(shape) == 2 for _, _, shape in own) > len(linear)
    upwards = any(re.search(r"transpose|deconv|upsample", "/".join(path)) for path, _ in leaves)
    # Convolutions that end in an image's channels: the linear layers are of something beside it.
    image = any(len(shape) == 4 and shape[-1] <= _IMAGE for _, _, shape in own)
    if not stem or not linear or others or upwards or image:
        return None
    last = max(linear)[1]
    path, (_, width) = leaves[last]
    taken = any(width in shape for other, shape in leaves if other[:-1] != path[:-1])
    return None if taken else last
