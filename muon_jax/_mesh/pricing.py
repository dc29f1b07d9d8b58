"""What a part costs: the FLOPs of each device, and the bytes that one device sends.

`tests/mesh/test_sharding_report.py` holds both against the compiled program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from muon_jax._mesh.cost import MeshCosts, Traffic, exchanged, others
from muon_jax._mesh.plan import Exchange, GroupKey, Part, Split, length
from muon_jax._mesh.specs import Sizes
from muon_jax._polynomials import Schedule
from muon_jax._products import at_once, of_iteration


class Pricing(NamedTuple):
    """Prices parts on one mesh.

    Attributes:
      sizes: the mesh.
      schedule: the steps of Newton-Schulz.
      costs: how fast the mesh's network is.
    """

    sizes: Sizes
    schedule: Schedule
    costs: MeshCosts

    def flops_of_one(self, key: GroupKey) -> int:
        """FLOPs of Newton-Schulz on one matrix."""
        is_complex = jnp.issubdtype(key.dtype, jnp.complexfloating)
        products = of_iteration(self.schedule, key.rows, key.cols)
        return products.flops(key.rows, key.cols, is_complex=is_complex)

    def no_flops(self) -> np.ndarray:
        """An array shaped like the mesh."""
        return np.zeros(tuple(self.sizes.values()), np.int64)

    def flops(self, key: GroupKey, parts: Sequence[Part]) -> np.ndarray:
        """FLOPs on each device, an array shaped like the mesh."""
        one = self.flops_of_one(key)
        lengths = [size if axis in key.team else 1 for axis, size in self.sizes.items()]
        load = self.no_flops()
        for part in parts:
            if isinstance(part, Split):
                # Sharers stay in step: they multiply the zeros of empty slots too.
                load += part.slots * one // part.ways
            elif isinstance(part, Exchange):
                # A device whose slots are all empty skips them.
                busy = (part.owners >= 0).any(axis=1)
                load += busy.reshape(lengths) * (part.slots * one)
            else:
                load += part.matrices * one
        return load

    def traffic(self, key: GroupKey, part: Part) -> Traffic:
        """Bytes that one device sends."""
        if isinstance(part, Exchange):
            return self._to_owners_and_back(key, part)
        stacks, cut = self._length(key.gathered_stack_axes), self._length(key.cut_axes)
        held = part.matrices * key.bytes
        result = held / self._length(key.kept_axes) * stacks
        return Traffic(
            exchange=held * others(cut),
            gather=result * others(stacks),
            collectives=(cut > 1) + (stacks > 1),
        )

    def _to_owners_and_back(self, key: GroupKey, part: Exchange) -> Traffic:
        stacks, cut = self._length(key.gathered_stack_axes), self._length(key.cut_axes)
        kept = self._length(key.kept_axes)
        there, exchanges = exchanged(key.cut_axes, self.sizes)
        held = part.slots * key.bytes  # whole matrices on one device, empty slots too
        split, rounds, fraction = 0.0, 0, 1
        if isinstance(part, Split):
            # A step gathers the rows of its Gram matrices, two at once those of three matrices as
            # small; then the rows of the iterates, but for the last: if rows are returned, these
            # are.
            taken = at_once(self.schedule, key.rows, key.cols)
            grams = sum(1 if len(steps) == 1 else 3 for steps in taken)
            iterates = len(taken) - part.returns_rows
            rounds = grams + iterates
            gram = part.slots * key.rows**2 * key.dtype.itemsize
            split = (gram * grams + held * iterates) * others(part.ways)
            fraction = part.ways if part.returns_rows else 1
        if part.through_state:
            back, gathered = key.cut_axes, cut // kept * stacks
            result = part.matrices * key.bytes / kept * stacks
        else:
            back, gathered = key.kept_axes, self._length(key.gathered_axes)
            result = held * gathered / fraction
        returns, returning = exchanged(back, self.sizes)
        return Traffic(
            exchange=held * there,
            split=split,
            returned=held * returns,
            gather=result * others(gathered),
            collectives=exchanges + rounds + returning + (gathered > 1),
        )

    def cost(self, traffic: Traffic, flops: float = 0) -> float:
        """The planner's unit, of what one device sends and the busiest one computes."""
        return self.costs.cost(traffic, flops)

    def _length(self, axes: Sequence[str]) -> int:
        return length(axes, self.sizes)
