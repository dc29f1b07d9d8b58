"""Run one part of a plan on this device: what all routes have in common.

The program is the same on all devices; what differs between them, such as which slots are empty,
they look up in tables by their own coordinates. Parts that are alike (`max_group_bytes` makes many
of one) share a program too: what differs between those they look up by the chunk that is at work.

Pieces keep their rows and columns on the way. Flattened, they would move the same bytes; but the
TPU keeps arrays in tiles of rows and columns, and its compiler takes minutes over the long vectors.
Only where a group's matrices are cut in pieces of several shapes do they travel flat.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from muon_jax._mesh.collectives import all_gather, axes_index
from muon_jax._mesh.layout import Cut
from muon_jax._mesh.plan import Everywhere, Exchange, Group, length
from muon_jax._mesh.specs import Sizes
from muon_jax._update_rule import UpdateRule

Pieces = Inexact[Array, "count *piece"]
"""This device's piece of each of a part's directions."""

Directions = Inexact[Array, "slots rows cols"]
"""Whole matrices on this device, turned wide."""

Results = Inexact[Array, "slots _ cols"]
"""What Newton-Schulz gave on this device: whole matrices, or their rows where they are shared."""

Outcome = Inexact[Array, "stacks count *_"]
"""A part's results as the parameter's shards cut them, of each of the gathered stacks."""

AnyPart = TypeVar("AnyPart", bound=Everywhere | Exchange)


class PartRunner(abc.ABC, Generic[AnyPart]):
    """Takes the pieces of one part's directions through phases 3 to 6 (`distributed`).

    Attributes:
      part: the part; of several that are alike, the first.
      group: the group that it belongs to.
      key: what the group's matrices have in common.
      sizes: the mesh.
      rule: what is done to each matrix.
      state_cuts: how the momentum of each matrix of the group is cut.
      param_cuts: how the parameter of each matrix of the group is cut.
    """

    def __init__(
        self,
        group: Group,
        alike: Sequence[AnyPart],
        chunk: jax.Array | int,
        sizes: Sizes,
        rule: UpdateRule,
    ):
        """Bind a runner to the part of number `chunk` among those that are alike."""
        self.part = alike[0]
        self.group = group
        self.key = group.key
        self.sizes = sizes
        self.rule = rule
        self.state_cuts = [m.state_cut for m in group.members for _ in range(m.matrices)]
        self.param_cuts = [m.param_cut for m in group.members for _ in range(m.matrices)]
        self._starts = [part.start for part in alike]
        self._chunk = chunk

    def run(self, pieces: Pieces) -> tuple[Outcome, Float[Array, "stacks count"] | None]:
        """The results as the parameter's shards cut them, and their measured factors."""
        with jax.named_scope("muon.exchange"):  # phase 3
            directions = self.to_owners(pieces)
        with jax.named_scope("muon.newton_schulz"):  # phase 4
            results = self.orthogonalize(directions)
            measured = self.rule.measure(directions, results) if self.rule.is_measured else None
        back = self.back(results)  # phases 5 and 6
        return back, None if measured is None else self.factors_to_all(measured)

    @abc.abstractmethod
    def to_owners(self, pieces: Pieces) -> Directions:
        """Phase 3: the whole matrices that this device is to orthogonalize."""

    @abc.abstractmethod
    def orthogonalize(self, directions: Directions) -> Results:
        """Phase 4: the results of the matrices on this device."""

    @abc.abstractmethod
    def back(self, results: Results) -> Outcome:
        """Phases 5 and 6: from every device's results to the parameter's shard on each."""

    @abc.abstractmethod
    def factors_to_all(self, measured: Float[Array, "slots"]) -> Float[Array, "stacks count"]:
        """Every matrix's measured factor, on every device."""

    # --- Tables and cuts -------------------------------------------------------------------------

    def length(self, axes: Sequence[str]) -> int:
        """The number of coordinates along `axes`."""
        return length(axes, self.sizes)

    def cut_for(
        self,
        axes: Sequence[str],
        cuts: Sequence[Cut],
        owners: np.ndarray | None,
        piece: tuple[int, ...],
        matrices: Directions,
    ) -> Inexact[Array, "devices slots *piece"]:
        """Cut the matrices on this device into pieces, one for each coordinate along `axes`."""
        if not axes:
            return matrices[None]

        def split(cut: Cut) -> jax.Array:
            pieces = cut.split(matrices, axes, self.sizes)
            return pieces.reshape(*pieces.shape[:2], *piece)

        return self.by_cut(cuts, owners, split, axis=1)

    def by_cut(
        self,
        cuts: Sequence[Cut],
        owners: np.ndarray | None,
        function: Callable[[Cut], jax.Array],
        axis: int,
    ) -> jax.Array:
        """Apply `function` with the cut of each matrix.

        Args:
          cuts: the cut of each matrix of the group.
          owners: the table that says which matrices this device has, None for all of the part.
          function: a function of matrices that are all cut alike.
          axis: the axis of its result along which the matrices lie.
        """
        here = [cuts[start : start + self.part.matrices] for start in self._starts]
        kinds = [*dict.fromkeys(cut for chunk in here for cut in chunk)]
        out = function(kinds[0])
        if len(kinds) == 1:
            return out
        # The program is one for all devices and all chunks, while a slot may hold a matrix that is
        # cut in any of these ways: all are computed, and each slot takes its own.
        kind_of = np.array([[*(kinds.index(cut) for cut in chunk), 0] for chunk in here])
        if owners is None:
            mine = jnp.asarray(kind_of)[self._chunk]
        else:
            mine = jnp.asarray(kind_of[:, owners])[self._chunk, axes_index(self.key.team)]
        mine = mine[: out.shape[axis]]
        shape = [1] * out.ndim
        shape[axis] = len(mine)
        for number, kind in enumerate(kinds[1:], start=1):
            out = jnp.where(mine.reshape(shape) == number, function(kind), out)
        return out

    def arrange(self, x: Any, have: Sequence[str], want: Sequence[str], rest: int) -> Any:
        """Reorder device coordinates: all but the last `rest` axes run over `have`, row-major."""
        x = x.reshape(*(self.sizes[axis] for axis in have), *x.shape[x.ndim - rest :])
        order = [have.index(axis) for axis in want]
        return x.transpose(*order, *range(len(have), x.ndim))


class EverywhereRunner(PartRunner[Everywhere]):
    """The routes `local` and `replicated`: every device of the team has all matrices.

    Where the team is one device, the gather over its cut axes is over none, and moves nothing.
    """

    def to_owners(self, pieces: Pieces) -> Directions:
        """Gather all pieces of all matrices."""
        axes = self.key.cut_axes
        received = all_gather(pieces, axes)
        join = lambda cut: cut.join(received, axes, self.sizes)  # noqa: E731
        return self.by_cut(self.state_cuts, None, join, axis=0)

    def orthogonalize(self, directions: Directions) -> Results:
        """All of them, as one device alone does."""
        return self.rule.iteration(directions)

    def back(self, results: Results) -> Outcome:
        """Nothing returns: each device cuts its piece out. Results of other stacks are gathered."""
        kept = self.key.kept_axes
        with jax.named_scope("muon.gather"):
            cut = self.cut_for(kept, self.param_cuts, None, self.group.param_piece, results)
            return all_gather(cut[axes_index(kept)], self.key.gathered_stack_axes)

    def factors_to_all(self, measured: Float[Array, "count"]) -> Float[Array, "stacks count"]:
        """Every device of the team has them: other stacks' are gathered."""
        with jax.named_scope("muon.gather"):
            return all_gather(measured, self.key.gathered_stack_axes)
