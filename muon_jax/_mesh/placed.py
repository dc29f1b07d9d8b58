"""Ask an optimizer's `init` where the arrays of its state lie, whatever it is wrapped in.

On Auto axes an abstract evaluation shows no shardings. So `init`, while it is asked, hands out each
array in a node of its own that says them. Wrappers carry such a node along as they carry the array.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from muon_jax._common.paths import Path, show
from muon_jax._mesh.layout import Layout

# Part of the key of JAX's caches: a program that was traced unasked is not taken for an answer.
asked = jax.make_user_context(False)
"""``with asked(True):`` lets `init` answer; for abstract evaluation alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Where an array of a state lies. It is part of a tree's structure, and equal to itself alone.

    Attributes:
      zero1: the `Zero1` of the optimizer that made the array.
      path: the path of the parameter that the array belongs to; None for a count.
      layout: the layout of that parameter; None for a count.
    """

    zero1: Any
    path: Path | None = None
    layout: Layout | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["place"])
@dataclasses.dataclass(frozen=True)
class Placed:
    """An array and its place."""

    array: Any
    place: Place

    @property
    def spec(self) -> PartitionSpec:
        """The array's spec, as JAX writes it.

        Axes that a wrapper put before those of the parameter, such as those of `jax.vmap`, are
        whole.
        """
        if self.place.layout is None:
            return PartitionSpec()
        shape, kept = tuple(self.array.shape), self.place.layout.shape
        added = len(shape) - len(kept)
        if shape[added:] != kept:
            raise ValueError(
                f"{show(self.place.path or ())}, shape {kept}: something around the optimizer gave "
                f"its state the shape {shape}, which says no longer how it lies on the mesh."
            )
        spec = self.place.layout.state_spec(self.place.zero1.mesh)
        return PartitionSpec(*[None] * added, *spec)


def answer(array: Any, place: Place) -> Any:
    """The array; with its place, where `init` is asked."""
    return Placed(array, place) if asked.value else array
