"""What is decided of each leaf, once per trace: what it holds and where it lies; zeros like it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._common.paths import is_absent, show
from muon_jax._common.trees import PyTree
from muon_jax._matrices import LeafViews
from muon_jax._mesh.layout import Layout
from muon_jax._mesh.placed import Place, answer
from muon_jax._mesh.specs import AnyMesh, is_explicit, place
from muon_jax._mesh.zero1 import Zero1
from muon_jax._routes import Route


class Leaf(NamedTuple):
    """What is decided of one leaf: its matrices, if it has some, and its place on a mesh."""

    route: Route
    layout: Layout | None

    @property
    def holds(self) -> LeafViews:
        """The matrices of a leaf that is Muon's."""
        assert self.route.views is not None, self.route
        return self.route.views

    @property
    def lies(self) -> Layout:
        """The layout of a leaf on a mesh."""
        assert self.layout is not None, self.route
        return self.layout


def decide_leaves(zero1: Zero1 | None, params: PyTree, routes: Sequence[Route]) -> list[Leaf]:
    """The leaves of `params`, which `routes` were made for; raise as `resolve_param_specs` does."""
    if zero1 is None:
        return [Leaf(route, None) for route in routes]
    return [*map(Leaf, routes, zero1.layouts(params, routes))]


def decide_in_update(
    zero1: Zero1 | None,
    structure: Any,
    params: PyTree | None,
    gradients: Sequence[Any],
    moments: Sequence[jax.Array],
    routes: Sequence[Route],
) -> list[Leaf]:
    """What `init` decided, from what `update` sees.

    The parameters show where they lie if they are given, else, on Explicit axes, the gradients do.
    The state's own layout says nothing of it.
    """
    if zero1 is None:
        return decide_leaves(None, params, routes)
    told, explicit = zero1.param_specs is not None, is_explicit(zero1.mesh)
    shown = structure.flatten_up_to(params) if params is not None else gradients
    if told or (params is None and not explicit):
        shown = [None] * len(routes)
    like = [
        jax.ShapeDtypeStruct(moment.shape, moment.dtype) if is_absent(leaf) else leaf
        for leaf, moment in zip(shown, moments, strict=True)
    ]
    leaves = decide_leaves(zero1, structure.unflatten(like), routes)
    if params is None and explicit and not told:
        _check_moments(zero1.mesh, moments, leaves)
    return leaves


def _check_moments(mesh: AnyMesh, moments: Sequence[jax.Array], leaves: Sequence[Leaf]) -> None:
    for moment, leaf in zip(moments, leaves, strict=True):
        seen, state = jax.typeof(moment).sharding, leaf.lies.state_spec(mesh)
        if not seen.mesh.empty and seen.spec != state:
            raise ValueError(
                f"{show(leaf.route.path)}, shape {leaf.route.shape}: its momentum lies as "
                f"{seen.spec}, but its gradient is sharded as if it were {state}: the parameter "
                "lies otherwise than the gradient. Pass params to update, or param_specs=."
            )


def new_zeros(
    zero1: Zero1 | None, like: Sequence[Any], leaves: Sequence[Leaf], dtypes: Sequence[jnp.dtype]
) -> list[Any]:
    """Zeros like the parameters, each of a dtype; on a mesh in the state's layout.

    There no device ever holds a whole leaf.
    """
    if zero1 is None:
        return [jnp.zeros_like(p, dtype=d) for p, d in zip(like, dtypes, strict=True)]

    def make() -> list[jax.Array]:
        return [
            place(jnp.zeros(leaf.lies.shape, d), zero1.mesh, leaf.lies.state_spec(zero1.mesh))
            for leaf, d in zip(leaves, dtypes, strict=True)
        ]

    zeros = zero1.on_devices(jax.jit(make)())
    places = [Place(zero1, leaf.route.path, leaf.layout) for leaf in leaves]
    return [*map(answer, zeros, places)]


def new_count(zero1: Zero1 | None) -> Any:
    """A count of no steps; on a mesh, on all of it."""
    count = jnp.zeros([], jnp.int32)
    return count if zero1 is None else answer(zero1.replicate([count])[0], Place(zero1))
