"""The optimizer behind `muon`: it decides on each leaf once per trace, then acts.

What is decided, which matrices a leaf holds and where it lies, depends on the parameters; so the
chains that Optax runs are made anew in each `init` and `update`, for the leaves that come.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from muon_jax._adam_step import AdamStep
from muon_jax._common.prefix import resolve_mask
from muon_jax._common.trees import PyTree
from muon_jax._gradients import gradient_leaves
from muon_jax._leaves import Leaf, decide_leaves
from muon_jax._muon_step import MuonStep
from muon_jax._routes import OptimizerName, Route
from muon_jax._routing.route_leaves import warn_of_tables
from muon_jax._state_checks import check_state_of


class Decided(NamedTuple):
    """What is decided of the parameters.

    Attributes:
      leaves: where each leaf goes, and where it lies.
      structure: the parameters' tree structure.
      mask: a tree of booleans, which leaves decay; None for all.
    """

    leaves: list[Leaf]
    structure: Any
    mask: Any

    @property
    def routes(self) -> list[Route]:
        """Where each leaf goes."""
        return [leaf.route for leaf in self.leaves]

    @property
    def labels(self) -> PyTree:
        """The optimizer of each leaf, as a tree."""
        return self.structure.unflatten([route.optimizer for route in self.routes])

    def leaves_of(self, optimizer: OptimizerName) -> list[Leaf]:
        """The leaves that one optimizer updates."""
        return [leaf for leaf in self.leaves if leaf.route.optimizer == optimizer]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The settings of `muon`.

    Attributes:
      route: a function from the parameters to their routes and their tree's structure.
      muon: the step of the matrices.
      adam: the step of the rest.
      mask: `weight_decay_mask`.
      chains: a function from what is decided to the transformation.
    """

    route: Callable[[PyTree], tuple[list[Route], Any]]
    muon: MuonStep
    adam: AdamStep
    mask: Any
    chains: Callable[[Decided], optax.GradientTransformationExtraArgs]

    def decide(self, params: PyTree) -> Decided:
        """Route every leaf and lay it out."""
        routes, structure = self.route(params)
        leaves = decide_leaves(self.muon.zero1, params, routes)
        return Decided(leaves, structure, resolve_mask(self.mask, params, structure))

    def decide_first(self, params: PyTree) -> Decided:
        """The same once, before any step: it warns of what may be wrong, and asks the scales."""
        decided = self.decide(params)
        warn_of_tables(decided.routes)
        self.muon.check(decided.leaves_of("muon"))
        return decided

    def init(self, params: PyTree) -> optax.OptState:
        """The state of Muon and of AdamW."""
        decided = self.decide_first(params)
        state = self.chains(decided).init(params)
        if self.muon.zero1 is None:
            return state
        # Counts of schedules, which would otherwise move onto the mesh with the first update.
        leaves, structure = jax.tree.flatten(state)
        scalars = iter(self.muon.zero1.replicate([x for x in leaves if not x.ndim]))
        return structure.unflatten([x if x.ndim else next(scalars) for x in leaves])

    def update(
        self, updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        """From gradients to updates."""
        if params is None:
            raise ValueError(
                "muon decays weights and needs them: call tx.update(grads, state, params)."
            )
        decided = self.decide(params)
        routes, structure = decided.routes, decided.structure
        check_state_of(state, routes)
        leaves = jax.tree.leaves(params)
        gradients = gradient_leaves(structure, updates, leaves, routes)
        # Optax's weight decay wants the parameter of a masked gradient masked too.
        params_to_decay = structure.unflatten(
            g if isinstance(g, optax.MaskedNode) else p
            for g, p in zip(gradients, leaves, strict=True)
        )
        return self.chains(decided).update(updates, state, params_to_decay, **extra)
