"""Holds the library's verdicts against the zoo's, leaf by leaf."""

import collections
import re

import jax
import jax.numpy as jnp

import muon_jax
from muon_jax._common.paths import show
from muon_jax._routes import Route
from muon_jax._routing.route_leaves import route_leaves
from tests.zoo.entries import Family, Verdict

Routes = dict[str, Route]


def params_of(family: Family) -> dict[str, jax.ShapeDtypeStruct]:
    """The entry as a flat tree, whose keys are whole paths."""
    return {
        path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in family.leaves.items()
    }


def remedy_in(message: str):
    """The value that the error says to write, as the code that a user would paste."""
    code = message.split("muon_weight_dimension_numbers=", 1)[1].split(")\nIf you give rules", 1)[0]
    return eval(code, {"muon_jax": muon_jax})


def read(family: Family, heads: str = "joint") -> tuple[Routes, Routes, str | None]:
    """The routes that stand by themselves, those behind the printed remedy, and the error.

    Where the library asks for nothing both are the same. Where it asks, the first are the routes
    of the leaves that it did not ask for.
    """
    params = params_of(family)
    try:
        routes = by_path(route_leaves(params, heads=heads))
    except ValueError as error:
        message = str(error)
    else:
        return routes, routes, None
    rules = remedy_in(message)
    behind = by_path(route_leaves(params, rules, heads))
    alone = {path: route for path, route in behind.items() if route.reason != "declared"}
    return alone, behind, message


def by_path(routed) -> Routes:
    """Routes by the path of their leaf."""
    return {show(route.path): route for route in routed[0]}


def outcome(verdict: Verdict, route: Route | None, behind: Route) -> str:
    """One of right, exchanged, asks, warned, wrong.

    Args:
      verdict: what is right for the leaf.
      route: where the library sends it by itself; None where it asks.
      behind: where it goes with the remedy that the library prints.
    """
    if route is None:
        return "asks" if verdict.asks and _same(verdict, behind) != "wrong" else "wrong"
    return "wrong" if verdict.asks else _same(verdict, route)


def _same(verdict: Verdict, route: Route) -> str:
    if route.maybe_table and verdict.axes is None:
        return "warned"
    if route.views is None or verdict.axes is None:
        return "right" if (route.views is None) == (verdict.axes is None) else "wrong"
    view = route.views[0]
    found = ({*view.reduction}, {*view.output})
    right = ({*verdict.axes[0]}, {*verdict.axes[1]})
    if verdict.exchanged:
        return "exchanged" if found == right[::-1] else "wrong"
    return "right" if found == right else "wrong"


def outcomes(family: Family, result: tuple[Routes, Routes, str | None]) -> dict[str, str]:
    """The outcome of every leaf, of what `read` returned."""
    alone, behind, _ = result
    return {
        path: outcome(verdict, alone.get(path), behind[path])
        for path, (_, verdict) in family.leaves.items()
    }


def counts(results: dict[str, str]) -> collections.Counter:
    """How many leaves have each outcome."""
    return collections.Counter(results.values())


def patterns_of(message: str) -> list[str]:
    """The patterns of the remedy in a message."""
    return re.findall(r'^ *(?:.*by_path\(\{)?r"(.*?)": ', message, re.MULTILINE)
