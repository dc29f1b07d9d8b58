"""Find the stacks in a parameter tree: names whose leaves carry one more leading axis.

``layers/mlp/kernel`` of shape [12, 512, 2048] is twelve matrices, if "layers" holds a stack. A name
alone does not say so: "blocks" may be a plain module, "moe" a whole model, and MaxText stacks its
layers along axis 1. So a name is believed only with evidence from the leaves below it: all have an
axis more than a vector at least, all have the same length along it, and one at least is then still
a matrix. There is a doubt where that length is a width too: [512, 12, 512] and [512, 12, 2048]
have axis 0 in common, and are twelve matrices along axis 1.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from muon_jax._common.paths import Path
from muon_jax._routing import names

_LAYERS = re.compile(r"\w*(layers|blocks|stages|stack|stacked|repeats?)|h")
_EXPERTS = re.compile(r"\w*experts?|experts?_[a-z]\w*")
_MOE = re.compile(r"\w*moe\w*")

Leaves = Sequence[tuple[Path, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """An axis along which a leaf seems to be stacked, though no name is believed to say so.

    Attributes:
      axis: the axis.
      where: the module, or the leaves, that share it.
    """

    axis: int
    where: str


def find_stacks(leaves: Leaves) -> list[tuple[str, ...]]:
    """The names of the stacks that each leaf lies in, outermost first.

    Args:
      leaves: lower-case names on the path, indices included, and the shape, of every leaf.

    Returns:
      For each leaf, one name for each of its leading stack axes.
    """
    prefixes = _prefixes(leaves)
    stacks: list[tuple[str, ...]] = [()] * len(leaves)
    for prefix in sorted(prefixes, key=len):
        members = [i for i, (path, _) in enumerate(leaves) if path[: len(prefix)] == prefix]
        outer = len(stacks[members[0]])
        if _MOE.fullmatch(prefix[-1]) and not _EXPERTS.fullmatch(prefix[-1]):
            # The router and the attention of such a module are no stacks: its own leaves may be.
            members = [
                i
                for i in members
                if len(leaves[i][0]) == len(prefix) + 1 and len(leaves[i][1]) >= outer + 3
            ]
        if _is_stack(prefix[-1], [leaves[i] for i in members], outer):
            for i in members:
                stacks[i] = (*stacks[i], prefix[-1])
    return stacks


def rejected_stacks(leaves: Leaves, stacks: Sequence[Sequence[str]]) -> set[int]:
    """Leaves below a stack's name that share their first axis, and of which no stack is believed.

    Args:
      leaves: lower-case names on the path, and the shape, of every leaf.
      stacks: the names of the stacks that are believed, for each leaf.

    Returns:
      The places of those leaves.
    """
    found: set[int] = set()
    for prefix in _prefixes(leaves):
        members = [i for i, (path, _) in enumerate(leaves) if path[: len(prefix)] == prefix]
        shapes = [leaves[i][1] for i in members]
        if min(map(len, shapes)) >= 2 and len({shape[0] for shape in shapes}) == 1:
            found |= {i for i in members if not stacks[i]}
    return found


def _prefixes(leaves: Leaves) -> set[Path]:
    return {
        path[: i + 1]
        for path, _ in leaves
        for i, name in enumerate(path)
        if any(word.fullmatch(name) for word in (_LAYERS, _EXPERTS, _MOE))
        and not (i + 1 < len(path) and path[i + 1].isdigit())
    }


def _is_stack(name: str, members: list[tuple[Path, tuple[int, ...]]], axis: int) -> bool:
    shapes = [shape for _, shape in members]
    if not shapes or min(map(len, shapes)) < axis + 2 or max(map(len, shapes)) < axis + 3:
        return False
    if len({shape[axis] for shape in shapes}) > 1 or _is_width(shapes, axis):
        return False
    # There are fewer layers or experts than a width has entries: 512 of [8, 64] are heads.
    deep = [shape[axis:] for shape in shapes if len(shape) >= axis + 3]
    if all(1 < math.prod(shape[1:]) // max(shape[1:]) < shape[0] for shape in deep) or _are_windows(
        members, axis
    ):
        return False
    # A single leaf agrees with itself: it is believed, unless its name says that another axis may
    # be of blocks, as in [512, 3, 512] under "h/c_attn".
    return (
        len(members) > 1
        or bool(_EXPERTS.fullmatch(name))
        or not any(names.looks_fused(part) for part in members[0][0])
    )


def _are_windows(members: list[tuple[Path, tuple[int, ...]]], axis: int) -> bool:
    """Whether all leaves are convolutions' own, and the axis they share is their window's."""
    return all(
        names.is_convolution(names.names_of(path)[-1])
        and shape[axis] <= names.LONGEST_WINDOW
        and (
            len(shape) == axis + 3
            or (len(shape) == axis + 4 and shape[axis + 1] in (1, shape[axis]))
        )
        for path, shape in members
    )


def _is_width(shapes: list[tuple[int, ...]], axis: int) -> bool:
    """Whether the axis that all leaves share is as long as one of their widths.

    Twelve layers of twelve heads are no doubt: then the axis behind it is not common to all.
    """
    length = shapes[0][axis]
    again = any(length in shape[axis + 1 :] for shape in shapes if len(shape) >= axis + 3)
    behind = len({shape[axis + 1] for shape in shapes}) == 1
    return again and behind and length > 1


def by_module(leaves: Leaves) -> dict[Path, list[int]]:
    """The places of the leaves below each module, outermost first."""
    modules: dict[Path, list[int]] = {}
    for i, (path, _) in enumerate(leaves):
        for n in range(len(path)):
            modules.setdefault(path[:n], []).append(i)
    return dict(sorted(modules.items(), key=lambda module: len(module[0])))


def shared_axes(
    leaves: Leaves, unknown: set[int], batches: dict[int, set[int]]
) -> dict[int, Stacked]:
    """The axes along which leaves seem to be stacked, by their shapes alone.

    Evidence is a module all of whose leaves have one axis, 0 or 1, of the same length, vectors
    included; or several leaves side by side whose matrices are not known, with the same first axis.

    Args:
      leaves: lower-case names on the path, and the shape, of every leaf.
      unknown: the places of the leaves whose matrices are not known.
      batches: the batch axes of each leaf that is declared.

    Returns:
      The `Stacked` of those leaves, of two or more axes, that have one.
    """
    found: dict[int, Stacked] = {}
    # A leaf declared to be AdamW's has no other axes, and says nothing.
    stacked = {i for i, axes in batches.items() if axes & {0, 1} and len(axes) < len(leaves[i][1])}
    evidence = unknown | stacked
    for prefix, members in by_module(leaves).items() if evidence else ():
        if not evidence & {*members} or found.keys() & {*members}:
            continue
        if (axis := _common(leaves, members, batches)) is not None:
            where = "/".join(prefix) or "the tree"
            found |= dict.fromkeys(members, Stacked(axis, where))
    for module in {names.owner_of(leaves[i][0])[:-1] for i in evidence}:
        beside = [i for i, (path, _) in enumerate(leaves) if path[: len(module)] == module]
        beside = [i for i in beside if names.owner_of(leaves[i][0])[:-1] == module]
        sure = [i for i in beside if i in evidence]
        first = {leaves[i][1][0] for i in sure}
        # There are fewer layers or experts than a width has entries: 512 of [8, 64] are heads.
        if any(leaves[i][1][0] > max(leaves[i][1][1:]) for i in sure):
            continue
        if (
            len(first) > 1
            or any(0 not in batches.get(i, {0}) for i in sure)
            or found.keys() & {*sure}
        ):
            continue
        # Vectors of a stack lie beside it: [12, 2048] beside [12, 512, 2048].
        vectors = [i for i in beside if len(leaves[i][1]) == 2 and leaves[i][1][0] in first]
        if len(sure) > 1 or vectors:
            where = f"the leaves beside it in {'/'.join(module) or 'the tree'}"
            found |= dict.fromkeys([*sure, *vectors], Stacked(0, where))
    return found


def _common(leaves: Leaves, members: list[int], batches: dict[int, set[int]]) -> int | None:
    shapes = [leaves[i][1] for i in members]
    if len(members) < 2 or min(map(len, shapes)) < 2:
        return None
    # Two leaves may share a width: a third axis in one of them alone is no layers'.
    if sum(len(shape) > 2 for shape in shapes) < 2 and not is_stack_of_vectors(leaves, members):
        return None
    axes = [
        axis
        for axis in (0, 1)
        if len({shape[axis] for shape in shapes}) == 1
        and shapes[0][axis] > 1
        and all(axis in batches.get(i, {axis}) for i in members)
    ]
    return min(axes, key=lambda axis: shapes[0][axis], default=None)


def is_stack_of_vectors(leaves: Leaves, members: Sequence[int]) -> bool:
    """Whether some of the leaves are vectors by their names, and have an axis more."""
    return any(
        sum(length > 1 for length in leaves[i][1]) >= 2
        and (
            names.is_bias(leaves[i][0][-1])
            or names.is_gain(leaves[i][0][-1])
            or names.is_norm(names.names_of(leaves[i][0])[-1])
        )
        for i in members
    )
