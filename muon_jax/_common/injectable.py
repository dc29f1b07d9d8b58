"""Let `optax.inject_hyperparams` take factories whose functions are no schedules.

It calls every callable argument with the count of steps, as a schedule: a Mesh (which is callable,
as a decorator), a mask, a scale. A mask of `jax.tree.map` would then see one number, return False,
and no weight would decay, without a word. It asks `inspect.signature` how to bind the arguments,
and there these arguments are put into something that cannot be called.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_NO_SCHEDULES = (
    "mesh",
    "muon_weight_dimension_numbers",
    "param_specs",
    "update_scale",
    "weight_decay_mask",
    "weight_dimension_numbers",
)


@dataclasses.dataclass(frozen=True)
class Held:
    """A function, or another thing that can be called, where it is not to be."""

    value: Any


def unheld(argument: Any) -> Any:
    """The argument that was given."""
    return argument.value if isinstance(argument, Held) else argument


class _HoldingSignature(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        for name in _NO_SCHEDULES:
            if callable(value := bound.arguments.get(name)):
                bound.arguments[name] = Held(value)
        return bound


def injectable(factory: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Mark a factory by its arguments that are no schedules; the function itself is returned."""
    plain = inspect.signature(factory)
    held = _HoldingSignature(
        list(plain.parameters.values()), return_annotation=plain.return_annotation
    )
    setattr(factory, "__signature__", held)  # noqa: B010 -- functions have no such field to type
    return factory
