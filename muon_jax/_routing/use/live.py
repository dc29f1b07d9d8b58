"""Which equations of a program its wanted results hang on.

A loss comes with metrics, and a model with statistics that it updates: what is computed for these
alone says nothing of a parameter's role.
"""

from typing import Any

from jax.extend.core import Literal


def live_equations(jaxpr: Any, wanted: tuple[bool, ...]) -> frozenset[int]:
    """The `id`s of the equations that the wanted results need."""
    return _live(jaxpr, wanted)[0]


def _live(jaxpr: Any, wanted: tuple[bool, ...]) -> tuple[frozenset[int], list[bool]]:
    needed = {
        var
        for var, want in zip(jaxpr.outvars, wanted, strict=True)
        if want and not isinstance(var, Literal)
    }
    live = set()
    for eqn in reversed(jaxpr.eqns):
        outs = tuple(var in needed for var in eqn.outvars)
        if any(outs):
            live.add(id(eqn))
            ins = _inputs_needed(eqn, outs)
            needed |= {
                var
                for var, need in zip(eqn.invars, ins, strict=True)
                if need and not isinstance(var, Literal)
            }
    return frozenset(live), [var in needed for var in jaxpr.invars]


def _inputs_needed(eqn: Any, outs: tuple[bool, ...]) -> list[bool]:
    inner = called(eqn)
    if inner is None:
        return [True] * len(eqn.invars)
    return _live(getattr(inner, "jaxpr", inner), outs)[1]


def called(eqn: Any) -> Any | None:
    """The program that an equation runs once, on its own operands; None for other equations."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    program = getattr(inner, "jaxpr", inner)
    fits = program is not None and (len(program.invars), len(program.outvars)) == (
        len(eqn.invars),
        len(eqn.outvars),
    )
    return inner if fits else None


CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    }
)
"""The primitives that run one program once."""
