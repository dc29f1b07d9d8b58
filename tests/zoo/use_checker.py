"""Holds what `by_use` reads of the zoo's built models against the zoo's verdicts, leaf by leaf."""

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable

import muon_jax
from muon_jax import FusedBlocks, UseRoles, by_use
from muon_jax._common.paths import show
from tests.zoo import built
from tests.zoo.built.blocks import Built, Part
from tests.zoo.checker import params_of
from tests.zoo.entries import Family, Verdict, family, read_verdict

OUTCOMES = ("right", "otherwise", "asks", "wrong")


@functools.cache
def all_built() -> dict[str, Callable[[], Built]]:
    """The models that are built, by the names of their entries, each as what builds it."""
    found: dict[str, Callable[[], Built]] = {}
    for module in pkgutil.iter_modules(built.__path__, f"{built.__name__}."):
        more = getattr(importlib.import_module(module.name), "BUILT", {})
        assert not {*more} & {*found}
        found |= {
            name: model if callable(model) else functools.partial(Built, *model)
            for name, model in more.items()
        }
    return found


_LAYER = re.compile(r"(?:^|/)(?:(?:moe_)?layers?|blocks?|h|self_attends)[/_](\d+)/")


def built_part(entry: Family, model: Built) -> Family:
    """The entry as far as it is built: of layers in a numbered list, the first few."""
    depth = model.depth if model.params is None else None
    kept = {
        path: leaf
        for path, leaf in entry.leaves.items()
        if depth is None or not (layer := _LAYER.search(path)) or int(layer[1]) < depth
    }
    return dataclasses.replace(entry, leaves=kept)


def read_use(entry: Family, model: Built) -> tuple[UseRoles, set[str], str | None]:
    """The roles, the leaves that `by_use` asked for, and its message.

    What it asks for is answered with the line that it says to write.
    """
    params, loss = params_of(entry), lambda p, *batch: model.loss(Part(p), *batch)
    if model.params is not None:
        params, loss = model.params, model.loss
    try:
        return by_use(loss, params, *model.batch), set(), None
    except ValueError as error:
        message = str(error)
        if "declared=" not in message:
            raise
    code = message.split("declared=", 1)[1].removesuffix(")")
    roles = by_use(loss, params, *model.batch, declared=eval(code, {"muon_jax": muon_jax}))
    asked = {show(x.path) for x in roles.readings if x.reason == "declared"}
    return roles, asked, message


def use_outcomes(
    entry: Family, model: Built, result: tuple[UseRoles, set[str], str | None]
) -> dict[str, str]:
    """The outcome of every leaf: one of `OUTCOMES`.

    Axes of length 1 say nothing, and are left out.
    """
    roles, asked, _ = result
    readings = {show(reading.path): reading for reading in roles.readings}
    if {path: reading.shape for path, reading in readings.items()} != {
        path: shape for path, (shape, _) in entry.leaves.items()
    }:
        raise ValueError(f"{entry.name}: what was built has other leaves than its entry.")
    out = {}
    for path, (shape, verdict) in entry.leaves.items():
        long = {axis for axis, size in enumerate(shape) if size > 1}
        spec = readings[path].spec
        if isinstance(spec, FusedBlocks):
            spec = spec.dimension_numbers
        found = None
        if spec is not None:
            found = tuple(_axes(axes, len(shape)) & long for axes in spec)
        if path in asked:
            out[path] = "asks"
        elif found == _long(verdict, long):
            out[path] = "right"
        else:
            others = [
                words for pattern, words in model.otherwise.items() if re.search(pattern, path)
            ]
            other = read_verdict(others[0].split(), path) if others else None
            is_other = other is not None and found == _long(other, long)
            out[path] = "otherwise" if is_other else "wrong"
    return out


@functools.cache
def outcomes_of(name: str) -> dict[str, str]:
    """The outcome of every leaf of a model, by its name."""
    model = all_built()[name]()
    part = built_part(family(name), model)
    return use_outcomes(part, model, read_use(part, model))


def _long(verdict: Verdict, long: set[int]) -> tuple[set[int], ...] | None:
    return None if verdict.axes is None else tuple({*axes} & long for axes in verdict.axes)


def _axes(axes: int | tuple[int, ...], rank: int) -> set[int]:
    return {axis % rank for axis in ((axes,) if isinstance(axes, int) else axes)}
