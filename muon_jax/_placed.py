"""Ask an optimizer's `init` where the arrays of its state lie, whatever it is wrapped in.

On Auto axes an abstract evaluation shows no shardings. So `init`, while it is asked, hands out each
array in a node of its own that says them. Wrappers carry such a node along as they carry the array.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from muon_jax._layout import Layout
from muon_jax._paths import Path

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

    @property
    def spec(self) -> PartitionSpec:
        """The array's spec, as JAX writes it."""
        return PartitionSpec() if self.layout is None else self.layout.state_spec(self.zero1.mesh)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["place"])
@dataclasses.dataclass(frozen=True)
class Placed:
    """An array and its place."""

    array: Any
    place: Place


def answer(array: Any, place: Place) -> Any:
    """The array; with its place, where `init` is asked."""
    return Placed(array, place) if asked.value else array
