"""The shapes of an Orbax checkpoint, from its metadata alone.

Orbax is no dependency of the library, and is imported when a checkpoint is to be read.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from muon_jax._common.paths import flatten_with_names
from muon_jax._planning.tensors import Model, Tensor

_TREE = "_METADATA"  # the file that Orbax writes beside the arrays of one tree
# What programs call their parameters, of a tree that holds more.
_PARAMETERS = ("params", "model", "parameters")


def read_orbax(path: Path, subtree: str | None = None) -> Model:
    """The parameters in a checkpoint.

    Args:
      path: the folder of one tree; or of a step, of a manager or of a run, above it. Of several
        steps it is the last, of several trees the one that is called ``params`` or ``model``.
      subtree: the path of the parameters in the tree, such as ``"state/params"``; None means the
        part called ``params`` or ``model``, or the whole tree where there is none.

    Raises:
      ValueError: where there is no checkpoint, or nothing at `subtree`.
      ModuleNotFoundError: where Orbax is not installed, with the command that installs it.
    """
    folder = _tree_folder(path)
    try:
        import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is an Orbax checkpoint, and Orbax is not installed: "
            "pip install orbax-checkpoint. (Hugging Face directories are read without it.)"
        ) from error
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns of a file that a tree below a step has not
    try:
        with ocp.StandardCheckpointer() as reader:
            metadata: Any = reader.metadata(folder)
    finally:
        logger.setLevel(level)
    item = metadata.item_metadata
    tree = getattr(item, "tree", item)
    where = subtree or _named_parameters(tree)
    for key in where.split("/") if where else ():
        tree = _below(tree, key, where, folder)
    is_array = lambda node: hasattr(node, "shape") and hasattr(node, "dtype")  # noqa: E731
    leaves, _ = flatten_with_names(tree, is_array)
    arrays = [(name, leaf) for name, leaf in leaves if is_array(leaf) and leaf.dtype is not None]
    # An nnx.State that was saved as it is has each array below a key "value".
    wrapped = all(name[-1:] == ("value",) for name, _ in arrays)
    tensors = {
        "/".join(name[:-1] if wrapped else name) or where: Tensor(
            tuple(leaf.shape), jax.numpy.dtype(leaf.dtype).name
        )
        for name, leaf in arrays
    }
    if not tensors:
        raise ValueError(f"{folder} holds no arrays{f' at {where}' if where else ''}.")
    part = f", its {where!r}" if where else ""
    return Model(f"Orbax checkpoint {folder}{part}", tensors, "in_out")


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint, or holds some."""
    found = (path.glob(f"{'*/' * depth}{_TREE}") for depth in range(4))
    return path.is_dir() and any(map(any, found))


def _tree_folder(path: Path) -> Path:
    """The folder of one tree: here, or below the newest step."""
    path = path.absolute()
    while not (path / _TREE).is_file():
        below = sorted(
            child
            for child in path.iterdir()
            if child.is_dir() and not child.name.startswith(".") and is_orbax(child)
        )
        steps = [child for child in below if child.name.rpartition("-")[2].isdigit()]
        named = [child for child in below if child.name in _PARAMETERS]
        if steps and len(steps) == len(below):
            path = max(steps, key=lambda child: int(child.name.rpartition("-")[2]))
        elif named or len(below) == 1:
            path = (named or below)[0]
        else:
            listed = ", ".join(child.name for child in below[:8])
            listed += ", ..." if len(below) > 8 else ""
            raise ValueError(
                f"{path} holds several trees ({listed}): give the folder of the parameters, such "
                f"as {below[0]}."
            )
    return path


def _named_parameters(tree: Any) -> str:
    if not isinstance(tree, Mapping):
        return ""
    return next((name for name in _PARAMETERS if name in tree), "")


def _below(tree: Any, key: str, where: str, folder: Path) -> Any:
    if isinstance(tree, Mapping) and key in tree:
        return tree[key]
    if isinstance(tree, list | tuple) and key.isdigit() and int(key) < len(tree):
        return tree[int(key)]
    there = ", ".join(sorted(map(str, tree))) if isinstance(tree, Mapping) else "an array"
    raise ValueError(f"--subtree {where}: {folder} has no {key!r} there; it has {there}.")
