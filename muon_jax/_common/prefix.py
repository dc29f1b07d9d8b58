"""Match a tree that the user gave, or a prefix of one, to the parameters: by path.

Not by structure, for NNX wraps the same leaves differently in `init` and in `update`. What the tree
does not speak of raises, and so does what it speaks of in vain: a misspelt name would otherwise
leave its parameter to a default without a word.
"""

from typing import Any

import jax
import numpy as np

from muon_jax._common.paths import Path, flatten_with_names, is_absent, show


def match_prefix(
    argument: str, tree: list[tuple[Path, Any]], params: Any, remedy: str, *, whole: bool = True
) -> list[Any]:
    """The entry for each leaf.

    Args:
      argument: its name, for errors.
      tree: the entries with their paths; None and `optax.MaskedNode` stand for None.
      params: the parameters. Those that are None or masked, as `optax.partition` hides the leaves
        of other groups, may be spoken of.
      remedy: what to write where an entry is missing, for errors.
      whole: whether these are all parameters that the tree may speak of.

    Returns:
      One entry for each leaf, in the order of ``jax.tree.leaves(params)``.

    Raises:
      ValueError: for a parameter without an entry, or an entry without a parameter.
    """
    entries = {path: None if is_absent(entry) else entry for path, entry in tree}
    leaves, _ = flatten_with_names(params)
    found, used = [], set()
    for path, _ in leaves:
        prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in entries), None)
        if prefix is None:
            raise ValueError(f"{argument} says nothing of {show(path)}. {remedy}")
        used.add(prefix)
        found.append(entries[prefix])
    unused = [path for path, entry in entries.items() if path not in used and entry is not None]
    # Without leaves all are masked, or `optax.tree_map_params` gives its placeholder.
    if whole and unused and leaves:
        hidden = [p for p, node in flatten_with_names(params, is_absent)[0] if is_absent(node)]
        for path in unused:
            if not any(other[: len(path)] == path[: len(other)] for other in hidden):
                listed = ", ".join(show(path) for path, _ in leaves[:8])
                raise ValueError(
                    f"{argument} speaks of {show(path)}, which is no parameter; the parameters are "
                    f"{listed}{', ...' if len(leaves) > 8 else ''}."
                )
    return found


def resolve_mask(mask: Any, params: Any, structure: Any) -> Any:
    """The weight decay mask of every leaf, as a tree of booleans like `params`; None without one.

    Args:
      mask: as `weight_decay_mask` of `muon`.
      params: the parameters.
      structure: their tree's structure.

    Raises:
      TypeError: for an entry that is no boolean; any string would count as True.
      ValueError: where the mask's tree differs from that of the parameters.
    """
    # A parameter tree may be callable itself (an Equinox module); a function is a tree's leaf.
    if mask is None or not structure.num_leaves:
        return mask
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    entries, _ = flatten_with_names(mask, is_absent)
    for path, entry in entries:
        if not is_absent(entry) and not isinstance(entry, bool | np.bool_):
            raise TypeError(
                f"weight_decay_mask has {entry!r} at {show(path)}; expected True (decays) or "
                "False, computed from names and shapes, not from values, which a traced step does "
                "not know."
            )
    remedy = "It is a tree like the parameters', or a prefix of it, of True and False."
    found = match_prefix("weight_decay_mask", entries, params, remedy)
    for (path, _), entry in zip(flatten_with_names(params)[0], found, strict=True):
        if entry is None:
            raise ValueError(f"weight_decay_mask has None at {show(path)}. {remedy}")
    return structure.unflatten(found)
