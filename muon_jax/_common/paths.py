"""One name for a leaf, whatever container it lies in.

Linen, NNX, dicts, lists and dataclasses spell their key paths differently, and NNX spells one leaf
in two ways: ``.../kernel.value`` while `tx.init` sees its Variables, ``.../kernel`` in
`tx.update`. A leaf's route must not depend on that.
"""

import collections
import re
from collections.abc import Callable
from typing import Any

import jax
from optax import MaskedNode

Path = tuple[str, ...]


def is_absent(node: Any) -> bool:
    """Whether a tree node stands for a leaf that is not there: None, or masked by Optax."""
    return node is None or isinstance(node, MaskedNode)


def flatten_with_names(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[Path, Any]], Any]:
    """Flatten a tree to its leaves with their normalised paths, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    siblings = collections.Counter(keys[:-1] for keys, _ in leaves)
    return [(_names(keys, siblings[keys[:-1]] == 1), leaf) for keys, leaf in leaves], structure


def show(path: Path) -> str:
    """A path as reports, patterns and errors write it: ``layers/0/attn/q_proj/kernel``."""
    return "/".join(path) or "(the whole tree)"


def unflattened(path: Path) -> Path:
    """A path by its names, where flat trees hold it in one key: "layers/0/w", "layers.0.w"."""
    return tuple(part for name in path for part in re.split(r"[/.]", name))


def _names(keys: tuple[Any, ...], alone: bool) -> Path:
    # Only a single attribute can be an NNX Variable's value: a dict may well hold a key "value",
    # as Flax's attention does, and a dataclass a field of that name beside others.
    if alone and keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
