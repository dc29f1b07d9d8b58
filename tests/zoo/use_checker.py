"""Holds what `by_use` reads of the zoo's built models against the zoo's verdicts, leaf by leaf."""

import dataclasses
import importlib
import pkgutil
import re

import muon_jax
from muon_jax import FusedBlocks, UseRoles, by_use
from muon_jax._paths import show
from tests.zoo import built
from tests.zoo.built.blocks import Built, Part
from tests.zoo.checker import params_of
from tests.zoo.entries import Family

OUTCOMES = ("right", "asks", "last", "wrong")


def all_built() -> dict[str, Built]:
    """The models that are built, by the names of their entries."""
    found: dict[str, Built] = {}
    for module in pkgutil.iter_modules(built.__path__, f"{built.__name__}."):
        more = getattr(importlib.import_module(module.name), "BUILT", {})
        assert not {*more} & {*found}
        found |= more
    return found


def cut(family: Family, depth: int = 4) -> Family:
    """The entry with the first layers alone, where they lie in a numbered list."""
    at = re.compile(
        r"(?:^|/)(?:(?:moe_)?layers?|blocks?|h|self_attends|DiTBlock|MixerBlock)[/_](\d+)/"
    )
    kept = {
        path: leaf
        for path, leaf in family.leaves.items()
        if not (number := at.search(path)) or int(number[1]) < depth
    }
    return dataclasses.replace(family, leaves=kept)


def read_use(family: Family, model: Built) -> tuple[UseRoles, set[str], str | None]:
    """The roles, the leaves that `by_use` asked for, and its message.

    What it asks for is answered with the line that it says to write.
    """
    params, loss = params_of(cut(family)), lambda p, *batch: model.loss(Part(p), *batch)
    if model.params is not None:
        params, loss = model.params, model.loss
    try:
        return by_use(loss, params, *model.batch), set(), None
    except ValueError as error:
        message = str(error)
    code = message.split("declared=", 1)[1].removesuffix(")")
    roles = by_use(loss, params, *model.batch, declared=eval(code, {"muon_jax": muon_jax}))
    asked = {show(x.path) for x in roles.readings if x.reason == "declared"}
    return roles, asked, message


def use_outcomes(
    family: Family, model: Built, result: tuple[UseRoles, set[str], str | None]
) -> dict[str, str]:
    """The outcome of every leaf: one of `OUTCOMES`.

    Axes of length 1 say nothing, and are left out.
    """
    roles, asked, _ = result
    family = family if model.params is not None else cut(family)
    readings = {show(reading.path): reading for reading in roles.readings}
    if {path: reading.shape for path, reading in readings.items()} != {
        path: shape for path, (shape, _) in family.leaves.items()
    }:
        raise ValueError(f"{family.name}: what was built has other leaves than its entry.")
    out = {}
    for path, (shape, verdict) in family.leaves.items():
        long = {axis for axis, size in enumerate(shape) if size > 1}
        spec = readings[path].spec
        if isinstance(spec, FusedBlocks):
            spec = spec.dimension_numbers
        found = None
        if spec is not None:
            found = tuple(_axes(axes, len(shape)) & long for axes in spec)
        right = None
        if verdict.axes is not None:
            right = tuple({*axes} & long for axes in verdict.axes)
        if path in asked:
            out[path] = "asks"
        elif found == right:
            out[path] = "right"
        else:
            is_last = readings[path].role == "head" and re.search(model.last, path)
            out[path] = "last" if is_last else "wrong"
    return out


def _axes(axes: int | tuple[int, ...], rank: int) -> set[int]:
    return {axis % rank for axis in ((axes,) if isinstance(axes, int) else axes)}
