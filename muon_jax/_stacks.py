"""Find the stacks in a parameter tree: names whose leaves carry one more leading axis.

``layers/mlp/kernel`` of shape [12, 512, 2048] is twelve matrices, if "layers" holds a stack. A name
alone does not say so: "blocks" may be a plain module, "moe" a whole model, and MaxText stacks its
layers along axis 1. So a name is believed only with evidence from the leaves below it: all have an
axis more than a vector at least, all have the same length along it, and one at least is then still
a matrix.
"""

import re
from collections.abc import Sequence

from muon_jax._paths import Path

_LAYERS = re.compile(r"\w*(layers|blocks|stages|stack|stacked|repeats?)|h")
_EXPERTS = re.compile(r"\w*experts|experts?_[a-z]\w*")
_MOE = re.compile(r"\w*moe\w*")
_FUSED = re.compile(r"\w*qkv\w*|\w*gate_up\w*|c_attn|to_kv|kv_proj|in_proj\w*|fused\w*")


def looks_fused(name: str) -> bool:
    """Whether a name says that several matrices lie side by side in one leaf."""
    return bool(_FUSED.fullmatch(name))


def find_stacks(leaves: Sequence[tuple[Path, tuple[int, ...]]]) -> list[tuple[str, ...]]:
    """The names of the stacks that each leaf lies in, outermost first.

    Args:
      leaves: lower-case names on the path, indices included, and the shape, of every leaf.

    Returns:
      For each leaf, one name for each of its leading stack axes.
    """
    prefixes = {
        path[: i + 1]
        for path, _ in leaves
        for i, name in enumerate(path)
        if any(word.fullmatch(name) for word in (_LAYERS, _EXPERTS, _MOE))
        and not (i + 1 < len(path) and path[i + 1].isdigit())
    }
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


def _is_stack(name: str, members: list[tuple[Path, tuple[int, ...]]], axis: int) -> bool:
    shapes = [shape for _, shape in members]
    if not shapes or min(map(len, shapes)) < axis + 2 or max(map(len, shapes)) < axis + 3:
        return False
    if len({shape[axis] for shape in shapes}) > 1:
        return False
    # A single leaf agrees with itself: it is believed, unless its name says that another axis may
    # be of blocks, as in [512, 3, 512] under "h/c_attn".
    return (
        len(members) > 1
        or bool(_EXPERTS.fullmatch(name))
        or not any(looks_fused(part) for part in members[0][0])
    )
