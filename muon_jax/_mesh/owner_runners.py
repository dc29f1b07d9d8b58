"""The routes on which matrices go to owners: `exchange` and `split`."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from muon_jax._mesh.collectives import RowShare, all_gather, all_to_all, axes_index
from muon_jax._mesh.layout import Cut
from muon_jax._mesh.part_runner import Directions, Outcome, PartRunner, Pieces, Results
from muon_jax._mesh.plan import Exchange, Split

AnyExchange = TypeVar("AnyExchange", bound=Exchange)


class ExchangeRunner(PartRunner[AnyExchange]):
    """Each matrix travels to its owner, and its result to all."""

    # --- Phase 3: to the owners ------------------------------------------------------------------

    def to_owners(self, pieces: Pieces) -> Directions:
        """Send each matrix's piece to its owner, who puts the pieces of all devices together."""
        axes = self.key.cut_axes
        received = all_to_all(self.addressed(pieces), axes)
        join = lambda cut: cut.join(received, axes, self.sizes)  # noqa: E731
        return self.by_cut(self.state_cuts, self.part.owners, join, axis=0)

    def addressed(self, pieces: Pieces) -> Inexact[Array, "devices slots *piece"]:
        """For each coordinate along the cut axes, the pieces that this device sends there.

        Devices that differ along copy axes alone hold the same pieces. Each sends to the owners
        that share its coordinates along those axes: so every owner is served once.
        """
        axes, part = self.key.cut_axes, self.part
        copies = [axis for axis in self.key.team if axis not in axes]
        table = self.arrange(part.owners, self.key.team, [*copies, *axes], rest=1)
        table = table.reshape(self.length(copies), self.length(axes), part.slots)
        if not copies and np.array_equal(table.ravel(), np.arange(part.matrices)):
            # Already in order: no copy is made of what is to be sent.
            return pieces.reshape(*table.shape[1:], *pieces.shape[1:])
        # The last is what empty slots hold.
        padded = jnp.pad(pieces, ((0, 1), *[(0, 0)] * (pieces.ndim - 1)))
        index = jnp.asarray(np.where(table < 0, part.matrices, table))
        return padded[index[axes_index(copies)]]

    # --- Phase 4: on the owners ------------------------------------------------------------------

    def orthogonalize(self, directions: Directions) -> Results:
        """Orthogonalize whole matrices, unless all slots of this device are empty."""
        iteration = self.rule.iteration
        if not self.part.padding:
            return iteration(directions)
        busy = np.any(self.part.owners >= 0, axis=1, keepdims=True)
        return lax.cond(self.own_row(busy)[0], iteration.__call__, jnp.zeros_like, directions)

    def own_row(self, table: np.ndarray) -> jax.Array:
        """This device's row of a table over the team."""
        return jnp.asarray(table)[axes_index(self.key.team)]

    # --- Phases 5 and 6: and back ----------------------------------------------------------------

    def back(self, results: Results) -> Outcome:
        """Return pieces along the axes that cut the parameter, and gather over all others."""
        if self.part.through_state:
            return self.back_through_state(results)
        kept, gathered = self.key.kept_axes, self.key.gathered_axes
        with jax.named_scope("muon.return"):  # phase 5
            piece, owners = self.group.param_piece, self.part.owners
            cut = self.cut_for(kept, self.param_cuts, owners, piece, results)
            returned = all_to_all(cut, kept)
        with jax.named_scope("muon.gather"):  # phase 6
            rest = returned.ndim - 1
            out = all_gather(returned, gathered)
            have, want = (*gathered, *kept), (*self.key.gathered_stack_axes, *self.key.team)
            out, owners = self.whole(self.arrange(out, have, want, rest))
            stacks = self.length(self.key.gathered_stack_axes)
            return self.in_order(out.reshape(stacks, -1, *out.shape[1 - rest :]), owners)

    def whole(
        self, out: Inexact[Array, "*devices slots rows cols"]
    ) -> tuple[Inexact[Array, "..."], np.ndarray]:
        """The results, whole, with the table that says which matrix each slot holds."""
        return out, self.part.owners

    def back_through_state(self, results: Results) -> Outcome:
        """Return the momentum's pieces first: what is then gathered has no empty slots."""
        cut_axes, gathered = self.key.cut_axes, self.key.gathered_axes
        with jax.named_scope("muon.return"):  # phase 5
            piece, owners = self.group.state_piece, self.part.owners
            cut = self.cut_for(cut_axes, self.state_cuts, owners, piece, results)
            returned = all_to_all(cut, cut_axes)
            mine = self.in_order(returned.reshape(1, -1, *returned.shape[2:]), owners)[0]
        with jax.named_scope("muon.gather"):  # phase 6
            out = all_gather(mine, gathered)
            stack_axes = self.key.gathered_stack_axes
            out = out.reshape(self.length(stack_axes), -1, *mine.shape)
            inner = gathered[len(stack_axes) :]
            piece = (self.part.matrices, *self.group.param_piece)

            def join(cut: Cut) -> jax.Array:
                joined = [cut.only(inner).join(one, inner, self.sizes) for one in out]
                return jnp.stack([one.reshape(piece) for one in joined])

            return self.by_cut(self.state_cuts, None, join, axis=1)

    def factors_to_all(self, measured: Float[Array, "slots"]) -> Float[Array, "stacks count"]:
        """Gather the factors of all slots of all devices."""
        stack_axes = self.key.gathered_stack_axes
        with jax.named_scope("muon.gather"):
            out = all_gather(measured, (*stack_axes, *self.key.team))
            out = out.reshape(self.length(stack_axes), -1, 1)
            return self.in_order(out, self.part.owners)[..., 0]

    def in_order(self, slots: Inexact[Array, "stacks slots *_"], owners: np.ndarray) -> Outcome:
        """From all slots of all devices to the matrices in the group's order."""
        flat = owners.ravel()
        # Sharers hold the same result: the first of them is taken.
        first = [int(np.flatnonzero(flat == number)[0]) for number in range(self.part.matrices)]
        if first == [*range(slots.shape[1])]:
            return slots
        return slots[:, np.asarray(first)]


class SplitRunner(ExchangeRunner[Split]):
    """The same, but that owners share a matrix and divide its rows."""

    def orthogonalize(self, directions: Directions) -> Results:
        """The rows that this device computes, or the whole of what the sharers did."""
        axis = self.part.axis
        share = RowShare(axis, self.sizes[axis], self.part.ways, self.key.dtype)
        rows = self.rule.iteration(directions, share)
        return rows if self.part.returns_rows else share.gather(rows)

    def whole(
        self, out: Inexact[Array, "*devices slots own cols"]
    ) -> tuple[Inexact[Array, "..."], np.ndarray]:
        """Put each matrix's rows together, which neighbours along the part's axis hold."""
        if not self.part.returns_rows:
            return super().whole(out)
        ways, stack_axes, team = self.part.ways, self.key.gathered_stack_axes, self.key.team
        *devices, slots, own, cols = out.shape
        where = len(stack_axes) + team.index(self.part.axis)
        sets = [*devices[:where], devices[where] // ways, ways, *devices[where + 1 :]]
        out = jnp.moveaxis(out.reshape(*sets, slots, own, cols), where + 1, -3)
        # A set of sharers is now one device, and has one row of the table.
        lengths = [self.sizes[axis] for axis in team]
        table = self.part.owners.reshape(*lengths, slots)
        one_each = np.arange(0, self.sizes[self.part.axis], ways)
        owners = np.take(table, one_each, axis=team.index(self.part.axis))
        return out.reshape(*out.shape[:-3], ways * own, cols), owners
