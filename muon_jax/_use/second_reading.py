"""Beside the reading of the program, that of the names, where the two differ."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from muon_jax._paths import Path
from muon_jax._routing import Heads, PathRules, Route, route_leaves


def note_names(params: Any, routes: Sequence[Route], heads: Heads) -> list[Route]:
    """The routes read from the program, whose reasons say where the names read otherwise."""
    named = _by_names(params, [route.path for route in routes], len(routes), heads)
    return [_noted(route, named.get(route.path)) for route in routes]


def _noted(route: Route, named: Route | None) -> Route:
    if route.reason.startswith("declared"):
        return route
    if named is None:
        return dataclasses.replace(route, reason=f"{route.reason} [the names do not tell]")
    if (route.group, _matrices(route)) == (named.group, _matrices(named)):
        return route
    shapes = " + ".join(f"{batch} of {rows}x{cols}" for batch, rows, cols in _matrices(named))
    says = ", ".join(filter(None, (named.group, shapes, named.reason)))
    return dataclasses.replace(route, reason=f"{route.reason} [the names say: {says}]")


def _matrices(route: Route) -> tuple[tuple[int, int, int], ...]:
    return tuple(view.matrices for view in route.views.views) if route.views else ()


def _by_names(params: Any, paths: list[Path], total: int, heads: Heads) -> dict[Path, Route]:
    """What the names say of each leaf of which they say anything."""
    rules = None
    if len(paths) < total:
        # Declared leaves ask nothing, and are evidence for the others all the same.
        listed = "|".join(re.escape("/".join(path)) for path in paths)
        rules = PathRules(((f"^(?!(?:{listed})$)", None),))
    try:
        routes, _ = route_leaves(params, rules, heads)
    except ValueError:
        if len(paths) < 2:
            return {}
        half = len(paths) // 2
        return _by_names(params, paths[:half], total, heads) | _by_names(
            params, paths[half:], total, heads
        )
    wanted = {*paths}
    return {route.path: route for route in routes if route.path in wanted}
