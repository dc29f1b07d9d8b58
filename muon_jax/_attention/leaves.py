"""Find the leaves of attention modules in a parameter tree, and how heads lie in them.

A module is a node of the tree that has the projections its structure names, as in
``layers/0/self_attn`` above ``q_proj/kernel`` and ``k_proj/kernel``. Whatever does not fit raises:
a factor on the wrong axis, or on half of a head's weights, would change a model without a word.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from muon_jax._attention.qk_norms import Leaves, check_no_norm
from muon_jax._attention.structures import AttentionHeads
from muon_jax._common.paths import Path, flatten_with_names, show, unflattened

_KERNEL = re.compile(r"kernel|w")
_BIAS = re.compile(r"bias|b")


@dataclasses.dataclass(frozen=True)
class HeadsLeaf:
    """A kernel or a bias whose columns belong to heads.

    Attributes:
      index: its place among the leaves of the parameters.
      path: its normalised path.
      projection: the name of its projection.
      factors_shape: what the factors `[*stack, heads, width]` are reshaped to, to multiply it.
    """

    index: int
    path: Path
    projection: str
    factors_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AttentionModule:
    """An attention module, or a stack of them.

    Attributes:
      path: its normalised path.
      heads: its structure.
      stack: the lengths of the leading axes that are stacks.
      leaves: its kernels and biases that are clipped.
    """

    path: Path
    heads: AttentionHeads
    stack: tuple[int, ...]
    leaves: tuple[HeadsLeaf, ...]

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """The shape of the module's largest logits, `[*stack, heads]`."""
        return (*self.stack, self.heads.heads)


def find_attention(
    params: Any, attention: Mapping[str, AttentionHeads]
) -> tuple[list[AttentionModule], Any]:
    """Find every module that a pattern names.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`s.
      attention: a mapping from a pattern, searched in modules' paths, to a structure; the
        first that is found decides.

    Returns:
      The modules, in the order of the tree, and the structure of `params`.

    Raises:
      ValueError: for a pattern that is found in no module, and for leaves that do not fit their
        structure or are not known to QK-Clip.
      TypeError: for kernels that are not floating-point.
    """
    named, structure = flatten_with_names(params)
    leaves = [(unflattened(path), tuple(jnp.shape(leaf))) for path, leaf in named]
    dtypes = [jnp.result_type(leaf) for _, leaf in named]
    found = match_modules("qk_clip", [path for path, _ in leaves], attention)
    modules = [_module(node, names, heads, leaves) for node, names, heads in found]
    for leaf in (leaf for module in modules for leaf in module.leaves):
        if not jnp.issubdtype(dtypes[leaf.index], jnp.inexact):
            raise TypeError(
                f"qk_clip: {show(leaf.path)} has dtype {dtypes[leaf.index]}; only floating-point "
                "weights can be scaled."
            )
    return modules, structure


def match_modules(
    argument: str, paths: Iterable[Path], attention: Mapping[str, AttentionHeads]
) -> list[tuple[Path, set[str], AttentionHeads]]:
    """The modules that patterns find, by their query projection.

    Args:
      argument: its name, for errors.
      paths: the paths of the leaves.
      attention: see `find_attention`.

    Returns:
      The path of each module, the names in it, and its structure.

    Raises:
      ValueError: for a pattern that is found in no module.
    """
    paths = [*paths]
    children: dict[Path, set[str]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            children.setdefault(path[:depth], set()).add(name)
    modules, found = [], set()
    for node, names in children.items():
        for pattern, heads in attention.items():
            if _query(heads) in names and re.search(pattern, "/".join(node)):
                found.add(pattern)
                modules.append((node, names, heads))
                break
    for pattern, heads in attention.items():
        if pattern not in found:
            seen = [node for node, names in children.items() if _query(heads) in names]
            kind = "modules that have one" if seen else "parameters"
            listed = ", ".join(map(show, (seen or paths)[:8]))
            raise ValueError(
                f"{argument}: the pattern {pattern!r} finds no module with a projection "
                f"{_query(heads)!r} that earlier patterns left; the {kind} are {listed}"
                f"{', ...' if len(seen or paths) > 8 else ''}. Mend the pattern, or name the "
                f"projection: {type(heads).__name__}(query=...)."
            )
    return modules


def check_projection(
    argument: str, node: Path, names: set[str], projection: str, heads: AttentionHeads
) -> None:
    """Raise where a module lacks a projection of its structure."""
    if projection not in names:
        raise ValueError(
            f"{argument}: {show(node)} has no projection {projection!r} beside "
            f"{_query(heads)!r}; it has {', '.join(sorted(names))}. Tell {type(heads).__name__} "
            "the name."
        )


def leaves_of(paths: Iterable[Path], module: Path) -> list[tuple[int, Path]]:
    """The places of the leaves below a module, and the rest of their paths."""
    depth = len(module)
    return [(i, path[depth:]) for i, path in enumerate(paths) if path[:depth] == module]


def is_bias(rest: Path) -> bool:
    """Whether what is left of a path below a projection names its bias."""
    return _is(_BIAS, rest)


def _query(heads: AttentionHeads) -> str:
    return next(iter(heads.projections))


def _module(node: Path, names: set[str], heads: AttentionHeads, leaves: Leaves) -> AttentionModule:
    kind = type(heads).__name__
    parts: list[HeadsLeaf] = []
    stacks: dict[str, tuple[int, ...]] = {}
    kernel_indices = []
    for projection, (count, width) in heads.projections.items():
        check_projection("qk_clip", node, names, projection, heads)
        own = [
            (index, rest, *leaves[index])
            for index, rest in leaves_of((path for path, _ in leaves), (*node, projection))
        ]
        kernels = [leaf for leaf in own if _is(_KERNEL, leaf[1]) or not leaf[1]]
        biases = [leaf for leaf in own if is_bias(leaf[1])]
        unknown = [show(leaf[2]) for leaf in own if leaf not in kernels + biases]
        if unknown or len(kernels) != 1:
            raise ValueError(
                f"qk_clip: {show((*node, projection))} must be a kernel [..., in, heads * width], "
                "or hold one, called kernel or w, and at most a bias; it holds "
                f"{', '.join(unknown or [show(leaf[2]) for leaf in own])}. Merge adapters (LoRA) "
                "into the kernel, transpose [out, in] weights, or leave qk_clip out."
            )
        (index, _, path, shape), *_ = kernels
        kernel_indices.append(index)
        layout = f"{kind}: {count} heads of width {width} each"
        stack = _kernel_stack(shape, count, width)
        if stack is None:
            raise ValueError(
                f"qk_clip: {show(path)} has shape {shape}; expected [..., in, {count * width}] or "
                f"[..., in, {count}, {width}] by {layout}."
            )
        stacks[projection] = stack
        inner = shape[len(stack) + 1 :]
        parts.append(HeadsLeaf(index, path, projection, (*stack, 1, *inner)))
        for index, _, path, shape in biases:
            if shape not in ((*stack, count, width), (*stack, count * width)):
                raise ValueError(
                    f"qk_clip: {show(path)} has shape {shape}; expected {(*stack, count * width)} "
                    f"or {(*stack, count, width)} by {layout}, and by its kernel."
                )
            parts.append(HeadsLeaf(index, path, projection, shape))
    stack = stacks[_query(heads)]
    if any(other != stack for other in stacks.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in stacks.items())
        raise ValueError(
            f"qk_clip: the projections of {show(node)} are stacked differently, by leading axes of "
            f"{listed}; they must agree."
        )
    fan_ins = [leaves[index][1][len(stack)] for index in kernel_indices]
    check_no_norm(node, heads, leaves, stack, fan_ins)
    return AttentionModule(node, heads, stack, tuple(parts))


def _is(names: re.Pattern[str], rest: Path) -> bool:
    return len(rest) == 1 and bool(names.fullmatch(rest[0]))


def _kernel_stack(shape: tuple[int, ...], count: int, width: int) -> tuple[int, ...] | None:
    if len(shape) >= 3 and shape[-2:] == (count, width):
        return shape[:-3]
    if len(shape) >= 2 and shape[-1] == count * width:
        return shape[:-2]
    return None
