"""Let `optax.inject_hyperparams` take a factory that has a `mesh` argument.

It calls every callable argument as a schedule, and a Mesh is callable (as a decorator). It asks
`inspect.signature` how to bind the arguments, and there the mesh is put into something that is not.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from jax.sharding import Mesh

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class HeldMesh:
    """A mesh that cannot be called."""

    mesh: Mesh


def unheld(mesh: Any) -> Any:
    """The mesh that was given."""
    return mesh.mesh if isinstance(mesh, HeldMesh) else mesh


class _HoldingSignature(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        if isinstance(mesh := bound.arguments.get("mesh"), Mesh):
            bound.arguments["mesh"] = HeldMesh(mesh)
        return bound


def injectable(factory: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Mark a factory whose `mesh` is no schedule; the function itself is returned."""
    plain = inspect.signature(factory)
    held = _HoldingSignature(
        list(plain.parameters.values()), return_annotation=plain.return_annotation
    )
    setattr(factory, "__signature__", held)  # noqa: B010 -- functions have no such field to type
    return factory
