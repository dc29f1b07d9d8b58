"""Run one part of a plan: pieces to the owners, Newton-Schulz there, results back.

A part's matrices all take one route (`_plan`). The program is the same on all devices; what differs
between them, such as which slots are empty, they look up in tables by their own coordinates.

Pieces keep their rows and columns on the way. Flattened, they would move the same bytes; but the
TPU keeps arrays in tiles of rows and columns, and its compiler takes minutes over the long vectors.
Only where a group's matrices are cut in pieces of several shapes do they travel flat.

Parts that are alike (`max_group_bytes` makes many of one) run in a loop: the program holds one of
them, and what one needs is free before the next.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from muon_jax._collectives import RowShare, all_gather, all_to_all, axes_index
from muon_jax._layout import Cut, Sizes
from muon_jax._loops import map_chunks
from muon_jax._matrix_update import MatrixUpdate
from muon_jax._plan import Group, Part, returns_rows


class PartRunner:
    """Runs the parts of one group: to the owners, through Newton-Schulz, and back."""

    def __init__(self, group: Group, sizes: Sizes, update: MatrixUpdate):
        self.shape = group.shape
        self.sizes = sizes
        self.update = update
        self.sources = [m.source for m in group.members for _ in range(m.matrices)]
        self.targets = [m.target for m in group.members for _ in range(m.matrices)]
        # While a run of parts is in hand: the part that is at work, and where each part begins.
        self.chunk: jax.Array | int = 0
        self.starts: tuple[int, ...] = ()
        self.source_piece = _common_shape([m.source for m in group.members])
        self.target_piece = _common_shape([m.target for m in group.members])

    def run(
        self, run: Sequence[Part], pieces: Inexact[Array, "count *piece"]
    ) -> tuple[Inexact[Array, "stacked count *_"], Float[Array, "stacked count"] | None]:
        """Run parts that are alike and follow each other, with the outcome of one large part."""
        part, chunks = run[0], len(run)
        self.starts = tuple(one.start for one in run)

        def one(chunk: jax.Array | int, pieces: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            self.chunk = chunk
            return self.one(part, pieces)

        if chunks == 1:
            return one(0, pieces)
        outcome = map_chunks(one, pieces.reshape(chunks, part.matrices, *pieces.shape[1:]))

        def joined(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 0, 1)
            return x.reshape(len(x), chunks * part.matrices, *x.shape[3:])

        return jax.tree.map(joined, outcome)

    def one(
        self, part: Part, pieces: Inexact[Array, "count *piece"]
    ) -> tuple[Inexact[Array, "stacked count *_"], Float[Array, "stacked count"] | None]:
        """The results as the parameter's shards cut them, and their measured factors."""
        with jax.named_scope("muon.exchange"):
            matrices = self.to_owners(part, pieces)
        with jax.named_scope("muon.newton_schulz"):
            results = self.orthogonalize(part, matrices)
            measured = None
            if self.update.is_measured:
                measured = self.update.measure(matrices, results)
        if part.owners is None:
            back = self.from_everyone(part, results)
        elif part.through_state:
            back = self.back_through_state(part, results)
        else:
            back = self.back(part, results)
        return back, None if measured is None else self.back_to_all(part, measured)

    # --- To the owners ---------------------------------------------------------------------------

    def to_owners(
        self, part: Part, pieces: Inexact[Array, "count *piece"]
    ) -> Inexact[Array, "slots rows cols"]:
        axes = self.shape.pieces
        if part.owners is None:
            received = all_gather(pieces, axes)
        else:
            received = all_to_all(self.addressed(part, pieces), axes)
        return self.by_cut(
            part, self.sources, lambda cut: cut.join(received, axes, self.sizes), axis=0
        )

    def addressed(
        self, part: Part, pieces: Inexact[Array, "count *piece"]
    ) -> Inexact[Array, "devices slots *piece"]:
        """The pieces that this copy sends to each coordinate along `pieces`, slot by slot."""
        axes = self.shape.pieces
        copies = [axis for axis in self.shape.team if axis not in axes]
        table = self.arrange(part.owners, self.shape.team, [*copies, *axes], rest=1)
        table = table.reshape(self.length(copies), self.length(axes), part.slots)
        if not copies and np.array_equal(table.ravel(), np.arange(part.matrices)):
            return pieces.reshape(*table.shape[1:], *pieces.shape[1:])
        # The last piece, of zeros, is what empty slots hold.
        padded = jnp.pad(pieces, ((0, 1), *[(0, 0)] * (pieces.ndim - 1)))
        index = jnp.asarray(np.where(table < 0, part.matrices, table))
        return padded[index[axes_index(copies)]]

    # --- On the owners ---------------------------------------------------------------------------

    def orthogonalize(
        self, part: Part, matrices: Inexact[Array, "slots rows cols"]
    ) -> Inexact[Array, "slots _ cols"]:
        iteration = self.update.iteration
        if part.ways > 1:
            assert part.axis is not None
            share = RowShare(part.axis, self.sizes[part.axis], part.ways, self.shape.dtype)
            rows = iteration(matrices, share)
            return rows if self.returns_rows(part) else share.gather(rows)
        if part.is_full:
            return iteration(matrices)
        assert part.owners is not None
        busy = np.any(part.owners >= 0, axis=1, keepdims=True)
        return lax.cond(self.own_row(busy)[0], iteration.__call__, jnp.zeros_like, matrices)

    # --- And back --------------------------------------------------------------------------------

    def from_everyone(
        self, part: Part, results: Inexact[Array, "count rows cols"]
    ) -> Inexact[Array, "stacked count *_"]:
        kept = self.shape.kept
        with jax.named_scope("muon.gather"):
            cut = self.cut_for(part, self.targets, kept, self.target_piece, results)
            return all_gather(cut[axes_index(kept)], self.shape.stacked)

    def back(
        self, part: Part, results: Inexact[Array, "slots _ cols"]
    ) -> Inexact[Array, "stacked count *_"]:
        kept, gathered = self.shape.kept, self.shape.gathered
        with jax.named_scope("muon.return"):
            returned = all_to_all(
                self.cut_for(part, self.targets, kept, self.target_piece, results), kept
            )
        with jax.named_scope("muon.gather"):
            rest = returned.ndim - 1
            out = all_gather(returned, gathered)
            have, want = (*gathered, *kept), (*self.shape.stacked, *self.shape.team)
            out = self.arrange(out, have, want, rest)
            if self.returns_rows(part):
                out = self.join_rows(part, out)
            out = out.reshape(self.length(self.shape.stacked), -1, *out.shape[1 - rest :])
            return self.in_order(part, out)

    def back_through_state(
        self, part: Part, results: Inexact[Array, "slots rows cols"]
    ) -> Inexact[Array, "stacked count *_"]:
        pieces, gathered = self.shape.pieces, self.shape.gathered
        with jax.named_scope("muon.return"):
            returned = all_to_all(
                self.cut_for(part, self.sources, pieces, self.source_piece, results), pieces
            )
            mine = self.in_order(part, returned.reshape(1, -1, *returned.shape[2:]))[0]
        with jax.named_scope("muon.gather"):
            out = all_gather(mine, gathered)
            stacked = self.length(self.shape.stacked)
            inner = gathered[len(self.shape.stacked) :]
            out = out.reshape(stacked, -1, *mine.shape)

            def join(cut: Cut) -> jax.Array:
                joined = [cut.only(inner).join(one, inner, self.sizes) for one in out]
                return jnp.stack([one.reshape(part.matrices, *self.target_piece) for one in joined])

            return self.select(self.sources, part, None, join, axis=1)

    def back_to_all(
        self, part: Part, measured: Float[Array, "slots"]
    ) -> Float[Array, "stacked count"]:
        with jax.named_scope("muon.gather"):
            if part.owners is None:
                return all_gather(measured, self.shape.stacked)
            axes = (*self.shape.stacked, *self.shape.team)
            out = all_gather(measured, axes).reshape(self.length(self.shape.stacked), -1, 1)
            return self.in_order(part, out)[..., 0]

    def join_rows(
        self, part: Part, out: Inexact[Array, "*devices slots own cols"]
    ) -> Inexact[Array, "..."]:
        """Put together the rows of each matrix, which neighbours along `part.axis` hold."""
        assert part.axis is not None
        *devices, slots, own, cols = out.shape
        where = len(self.shape.stacked) + self.shape.team.index(part.axis)
        split = [*devices[:where], devices[where] // part.ways, part.ways, *devices[where + 1 :]]
        out = jnp.moveaxis(out.reshape(*split, slots, own, cols), where + 1, -3)
        return out.reshape(*out.shape[:-3], part.ways * own, cols)

    def in_order(
        self, part: Part, slots: Inexact[Array, "stacked slots *_"]
    ) -> Inexact[Array, "stacked count *_"]:
        """Take the matrices out of the slots of all devices, in the group's order."""
        assert part.owners is not None
        owners = part.owners
        if self.returns_rows(part):
            owners = self.one_sharer(part)
        flat = owners.ravel()
        first = [int(np.flatnonzero(flat == number)[0]) for number in range(part.matrices)]
        if first == [*range(slots.shape[1])]:
            return slots
        return slots[:, np.asarray(first)]

    def one_sharer(self, part: Part) -> np.ndarray:
        """The owners' table with one row for each set of sharers."""
        assert part.axis is not None and part.owners is not None
        lengths = [self.sizes[axis] for axis in self.shape.team]
        table = part.owners.reshape(*lengths, part.slots)
        where = self.shape.team.index(part.axis)
        return np.take(table, np.arange(0, lengths[where], part.ways), axis=where)

    # --- Tables and cuts -------------------------------------------------------------------------

    def length(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def returns_rows(self, part: Part) -> bool:
        return returns_rows(self.shape, part, whole_result=self.update.is_measured)

    def arrange(self, x: Any, have: Sequence[str], want: Sequence[str], rest: int) -> Any:
        """Reorder device coordinates: all but the last `rest` axes run over `have`, row-major."""
        x = x.reshape(*(self.sizes[axis] for axis in have), *x.shape[x.ndim - rest :])
        order = [have.index(axis) for axis in want]
        return x.transpose(*order, *range(len(have), x.ndim))

    def own_row(self, table: np.ndarray) -> jax.Array:
        """This device's row of a table over the team."""
        return jnp.asarray(table)[axes_index(self.shape.team)]

    def cut_for(
        self,
        part: Part,
        cuts: Sequence[Cut],
        axes: Sequence[str],
        piece: tuple[int, ...],
        matrices: Inexact[Array, "slots rows cols"],
    ) -> Inexact[Array, "devices slots *piece"]:
        """Cut the matrices on this device into pieces along `axes`."""
        if not axes:
            return matrices[None]

        def split(cut: Cut) -> jax.Array:
            pieces = cut.split(matrices, axes, self.sizes)
            return pieces.reshape(*pieces.shape[:2], *piece)

        return self.by_cut(part, cuts, split, axis=1)

    def by_cut(
        self, part: Part, cuts: Sequence[Cut], function: Callable[[Cut], jax.Array], axis: int
    ) -> jax.Array:
        """Apply `function` with the cut of the matrix in each slot of this device."""
        return self.select(cuts, part, part.owners, function, axis)

    def select(
        self,
        cuts: Sequence[Cut],
        part: Part,
        owners: np.ndarray | None,
        function: Callable[[Cut], jax.Array],
        axis: int,
    ) -> jax.Array:
        here = [cuts[start : start + part.matrices] for start in self.starts]
        kinds = [*dict.fromkeys(cut for chunk in here for cut in chunk)]
        out = function(kinds[0])
        if len(kinds) == 1:
            return out
        # The program is one for all devices and all chunks; slots may hold matrices cut in any way.
        kind_of = np.array([[*(kinds.index(cut) for cut in chunk), 0] for chunk in here])
        if owners is None:
            mine = jnp.asarray(kind_of)[self.chunk]
        else:
            mine = jnp.asarray(kind_of[:, owners])[self.chunk, axes_index(self.shape.team)]
        mine = mine[: out.shape[axis]]
        shape = [1] * out.ndim
        shape[axis] = len(mine)
        for number, kind in enumerate(kinds[1:], start=1):
            out = jnp.where(mine.reshape(shape) == number, function(kind), out)
        return out


def _common_shape(cuts: Sequence[Cut]) -> tuple[int, ...]:
    """The shape of a piece, where all these cuts make it the same; else the shape of a flat one."""
    shapes = {cut.local for cut in cuts}
    return shapes.pop() if len(shapes) == 1 else (-1,)
