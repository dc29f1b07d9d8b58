"""Beside the reading of the program, that of the names, where the two differ."""

import dataclasses
from collections.abc import Sequence

from muon_jax._attention.split_heads import Heads
from muon_jax._routes import Route
from muon_jax._routing.route_leaves import routes_by_name


def note_names(routes: Sequence[Route], heads: Heads) -> list[Route]:
    """The routes read from the program, whose reasons say where the names read otherwise."""
    named = routes_by_name([(route.path, route.shape) for route in routes], heads)
    return [_noted(route, other) for route, other in zip(routes, named, strict=True)]


def _noted(route: Route, named: Route | None) -> Route:
    if route.reason.startswith("declared") or route.in_heads:
        return route
    if named is None:
        return dataclasses.replace(route, reason=f"{route.reason} [the names do not tell]")
    if (route.optimizer, _matrices(route)) == (named.optimizer, _matrices(named)):
        return route
    shapes = " + ".join(f"{batch} of {rows}x{cols}" for batch, rows, cols in _matrices(named))
    says = ", ".join(filter(None, (named.optimizer, shapes, named.reason)))
    return dataclasses.replace(route, reason=f"{route.reason} [the names say: {says}]")


def _matrices(route: Route) -> tuple[tuple[int, int, int], ...]:
    return tuple(view.matrices for view in route.views) if route.views else ()
