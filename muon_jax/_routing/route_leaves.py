"""Decide, leaf by leaf, what is a matrix for Muon and what goes to AdamW.

Precedence: the user's dimension numbers; names with evidence from the shapes beside them
(`readings`); rank. What cannot be known raises, with the leaf's path and the line to write: a
wrong guess would train a wrong model without a word.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from muon_jax._attention.head_axes import split_routes
from muon_jax._attention.split_heads import Heads, OneWord, SplitHeads, resolve_heads
from muon_jax._common.checks import check_pattern
from muon_jax._common.parameters import check_tree, parameter_shape
from muon_jax._common.paths import Path, flatten_with_names, is_absent, show, unflattened
from muon_jax._common.prefix import match_prefix
from muon_jax._matrices import MatrixSpec, is_matrix_spec, leaf_views
from muon_jax._routes import Route
from muon_jax._routing.readings import read_leaves
from muon_jax._routing.remedies import code_pattern, how_to_declare, pattern_for
from muon_jax._routing.roles import Question, Role
from muon_jax._routing.use.readings import Reading, UseRoles


@dataclasses.dataclass(frozen=True)
class PathRules:
    """Dimension numbers for the leaves whose path a pattern finds; made by `by_path`."""

    rules: tuple[tuple[str, MatrixSpec | None], ...]


def by_path(rules: Mapping[str, MatrixSpec | None]) -> PathRules:
    """Declare some leaves by their path, and leave the others to the table of names.

    Args:
      rules: a mapping from a regular expression, searched in paths like ``layers/0/attn/kernel``,
        to the leaf's `MuonDimensionNumbers` or `FusedBlocks`, or to None for AdamW. The first
        pattern that is found decides.

    Returns:
      A value for `muon_weight_dimension_numbers`.

    Raises:
      ValueError: for an invalid pattern; and from the optimizer, for a pattern found in no path.
      TypeError: for a value of another type.

    Examples:
      >>> rules = by_path({"qkv/kernel": FusedBlocks((64, 64, 64)), "patch_embed": None})
      >>> tx = muon(3e-4, muon_weight_dimension_numbers=rules)
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"by_path takes a mapping from patterns to axes; got {rules!r}.")
    for pattern, spec in rules.items():
        check_pattern("by_path", pattern)
        if spec is not None and not is_matrix_spec(spec):
            raise TypeError(
                f"by_path: {pattern!r} maps to {spec!r}; use MuonDimensionNumbers, FusedBlocks, or "
                "None for AdamW."
            )
    return PathRules(tuple(rules.items()))


DimensionNumbers = MatrixSpec | PathRules | UseRoles | Callable[[Any], Any] | Any
"""What `muon_weight_dimension_numbers` takes: one spec, a tree, a function of params, `by_path`,
`by_use`."""


def route_leaves(
    params: Any, dimension_numbers: DimensionNumbers = None, heads: Heads = "joint"
) -> tuple[list[Route], Any]:
    """Route every leaf of `params`.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`s; None and `optax.MaskedNode` are
        absent leaves.
      dimension_numbers: as `muon_weight_dimension_numbers` of `muon`.
      heads: whether the heads of an attention kernel form one matrix or one each, or which modules
        are split into heads.

    Returns:
      One `Route` for each leaf, in the order of `jax.tree.leaves(params)`, and the structure.

    Raises:
      ValueError: for leaves whose matrices cannot be known, for dimension numbers that do not fit
        the leaves, for a tree without leaves, for a Linen model's variables given whole.
      TypeError: for a leaf that is no array of a real or complex floating-point dtype of 16 bits or
        more.
    """
    known = resolve_heads(heads)
    leaves, structure = flatten_with_names(params)
    check_tree(params, [path for path, _ in leaves])
    shapes = [(path, parameter_shape(path, leaf)) for path, leaf in leaves]
    word = "joint" if isinstance(known, SplitHeads) else known
    if isinstance(dimension_numbers, UseRoles):
        readings = [dimension_numbers.of(path, shape) for path, shape in shapes]
        routes, sure = [_route_by_use(reading, word) for reading in readings], range(len(shapes))
    else:
        routes, sure = _routes_by_word(params, leaves, shapes, dimension_numbers, word)
    if isinstance(known, SplitHeads):
        nodes, _ = flatten_with_names(params, is_absent)
        hidden = [path for path, node in nodes if is_absent(node)]
        routes = split_routes(routes, known, sure, hidden)
    return routes, structure


def _routes_by_word(
    params: Any,
    leaves: list[tuple[Path, Any]],
    shapes: list[tuple[Path, tuple[int, ...]]],
    dimension_numbers: DimensionNumbers,
    heads: OneWord,
) -> tuple[list[Route], Collection[int]]:
    """The routes by the user's word, then by names, and the places of those by the former."""
    declared = _declared(params, leaves, dimension_numbers)
    declared_routes = {
        i: _route_declared(path, shape, declared[path])
        for i, (path, shape) in enumerate(shapes)
        if path in declared
    }
    batches = {i: _batch_axes(route) for i, route in declared_routes.items()}
    read = read_leaves(_named(shapes), heads == "per_head", batches)
    routes, asked, by_name = [], [], []
    for i, ((path, shape), role) in enumerate(zip(shapes, read, strict=True)):
        if i in declared_routes:
            routes.append(declared_routes[i])
        elif isinstance(role, Question):
            asked.append((path, shape, role))
        else:
            routes.append(_route_by_role(path, shape, role))
            if len(shape) >= 3 and routes[-1].spec is not None:
                by_name.append((path, shape, role.reason))
    if asked:
        raise ValueError(how_to_declare(asked, [route.path for route in routes], by_name))
    return routes, declared_routes.keys()


def routes_by_name(
    shapes: Sequence[tuple[Path, tuple[int, ...]]], heads: Heads
) -> list[Route | None]:
    """Where names and shapes send each leaf of a tree; None where they leave it open.

    Args:
      shapes: the path and the shape of every leaf.
      heads: as in `route_leaves`.
    """
    read = read_leaves(_named(shapes), resolve_heads(heads) == "per_head")
    return [
        None if isinstance(role, Question) else _route_by_role(path, shape, role)
        for (path, shape), role in zip(shapes, read, strict=True)
    ]


def _named(
    shapes: Sequence[tuple[Path, tuple[int, ...]]],
) -> list[tuple[Path, tuple[int, ...]]]:
    """The names on each path, in lower case."""
    return [(tuple(map(str.lower, unflattened(path))), shape) for path, shape in shapes]


def warn_of_tables(routes: list[Route]) -> None:
    """Warn, once for all of them, of assumed matrices whose sides are those of a table."""
    tables = [route for route in routes if route.maybe_table]
    if not tables:
        return
    listed = ", ".join(f"{show(route.path)} {route.shape}" for route in tables[:10])
    patterns = pattern_for(
        ["/".join(route.path) for route in tables],
        ["/".join(route.path) for route in routes if not route.maybe_table],
    )
    warnings.warn(
        f"{len(tables)} parameter(s) of two axes are taken for matrices though nothing but their "
        f"rank says so, and they look like tables (a vocabulary, coefficients of each channel): "
        f"{listed}{', ...' if len(tables) > 10 else ''}. Tables belong to AdamW: declare "
        f"muon_weight_dimension_numbers=muon_jax.by_path({{{code_pattern(patterns)}: None}}), or, "
        "where they are matrices, MuonDimensionNumbers(-2, -1) in place of None.",
        UserWarning,
        stacklevel=4,
    )


def _batch_axes(route: Route) -> set[int]:
    """The axes of a declared leaf that its matrices are stacked along; all, for AdamW's."""
    if route.views is None:
        return {*range(len(route.shape))}
    return {*route.views.batch_axes}


def _route_by_role(path: Path, shape: tuple[int, ...], role: Role) -> Route:
    if role.spec is None:
        return Route(path, shape, role.reason)
    views = leaf_views(shape, role.spec, show(path))
    _, fan_in, fan_out = views[0].matrices
    if min(fan_in, fan_out) <= 1:
        return Route(path, shape, f"{role.reason}, of one row or column")
    return Route(path, shape, role.reason, role.spec, views, role.maybe_table)


def _route_by_use(reading: Reading, heads: OneWord) -> Route:
    spec, reason = reading.spec, reading.because
    if spec is None:
        return Route(reading.path, reading.shape, reason)
    if heads == "per_head" and reading.head_axes:
        spec, reason = reading.per_head(), f"{reason}, per head"
    views = leaf_views(reading.shape, spec, show(reading.path))
    return Route(reading.path, reading.shape, reason, spec, views)


def _route_declared(path: Path, shape: tuple[int, ...], spec: MatrixSpec | None) -> Route:
    if spec is None:
        return Route(path, shape, "declared")
    if len(shape) < 2:
        raise ValueError(
            f"{show(path)}, shape {shape}: declared as a matrix by {spec}, but it has fewer than "
            "two axes; declare None, which gives it to AdamW."
        )
    return Route(path, shape, "declared", spec, leaf_views(shape, spec, show(path)))


def _declared(
    params: Any, leaves: list[tuple[Path, Any]], dimension_numbers: DimensionNumbers
) -> dict[Path, MatrixSpec | None]:
    """The user's word on each leaf that the user spoke of."""
    if dimension_numbers is None or not leaves:
        return {}
    if isinstance(dimension_numbers, PathRules):
        return declared_by_rules(leaves, dimension_numbers)
    # A parameter tree may be callable itself (an Equinox module); a function is a tree's leaf.
    if callable(dimension_numbers) and jax.tree_util.all_leaves([dimension_numbers]):
        function = dimension_numbers
        if isinstance(function, type) or function is by_path:
            raise TypeError(
                f"muon_weight_dimension_numbers is {function.__name__} itself; call it, as in "
                "MuonDimensionNumbers(-2, -1), FusedBlocks((512, 128, 128)) or "
                'by_path({"embed": None}).'
            )
        dimension_numbers = function(params)
        if dimension_numbers is None:
            raise TypeError(
                "muon_weight_dimension_numbers, a function, returned None, which would give all "
                "parameters to AdamW; return a tree of MuonDimensionNumbers, FusedBlocks and None."
            )
        if isinstance(dimension_numbers, PathRules):
            return declared_by_rules(leaves, dimension_numbers)
    return _declared_by_tree(params, leaves, dimension_numbers)


def declared_by_rules(
    leaves: list[tuple[Path, Any]], rules: PathRules
) -> dict[Path, MatrixSpec | None]:
    """What rules say of each leaf that one of their patterns finds."""
    declared, found = {}, set()
    for path, _ in leaves:
        for pattern, spec in rules.rules:
            if re.search(pattern, "/".join(path)):
                found.add(pattern)
                declared[path] = spec
                break
    unfound = [pattern for pattern, _ in rules.rules if pattern not in found]
    if unfound:
        paths = ", ".join(show(path) for path, _ in leaves[:8])
        raise ValueError(
            f"by_path: the pattern {unfound[0]!r} finds no path that earlier patterns left; "
            f"the paths are {paths}{', ...' if len(leaves) > 8 else ''}."
        )
    return declared


def _declared_by_tree(
    params: Any, leaves: list[tuple[Path, Any]], tree: Any
) -> dict[Path, MatrixSpec | None]:
    entries, _ = flatten_with_names(tree, lambda node: is_absent(node) or is_matrix_spec(node))
    for path, entry in entries:
        if not is_absent(entry) and not is_matrix_spec(entry):
            raise TypeError(
                f"muon_weight_dimension_numbers has {entry!r} at {show(path)}; use "
                "MuonDimensionNumbers, FusedBlocks, or None for AdamW."
            )
    specs = match_prefix(
        "muon_weight_dimension_numbers",
        entries,
        params,
        "A tree speaks of every parameter (None for AdamW); to speak of some, use "
        "muon_jax.by_path.",
    )
    return {path: spec for (path, _), spec in zip(leaves, specs, strict=True)}
