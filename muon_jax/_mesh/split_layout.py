"""Where the parts of a split axis lie: heads side by side along an axis that a mesh may shard.

An axis of `parts * width` entries, sharded over mesh axes, major first, is seen as
`[parts, width]`. With 16 heads of 128:

    over 4 devices     4 whole heads each: shards of a stack of heads
    over 16, 2         one head each, cut in two by the second axis: pieces of a matrix
    over 32            half a head each, by one axis that no layout of [16, 128] can name: those
                       axes are *gathered* first, and then hold copies, as the team of a matrix does

Axes that the optimizer adds for its state take whole heads, or none.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from muon_jax._matrices import LeafViews
from muon_jax._mesh.collectives import all_gather, axes_index
from muon_jax._mesh.specs import Sizes, Spec, local_shape


class SplitLayout(NamedTuple):
    """Where a leaf lies as `[.., parts, rest, ..]`, once what cuts parts has been gathered.

    Attributes:
      shape: the leaf's shape with the two axes.
      param: the parameter's spec, of that shape.
      state: its state's.
      axis: the leaf's axis that is split.
      gathered: the mesh axes that cut it inside of parts and that the specs leave out, major first;
        the parameter's and the state's are the same.
      local: the length of the leaf's axis that one device holds before they are gathered.
    """

    shape: tuple[int, ...]
    param: Spec
    state: Spec
    axis: int
    gathered: tuple[str, ...]
    local: int

    def gather(self, shard: Inexact[Array, "*shard"]) -> Inexact[Array, "*wider"]:
        """Inside a `shard_map`: the shard with whole parts."""
        if not self.gathered:
            return shard
        with jax.named_scope("muon.heads"):
            pieces = jnp.moveaxis(all_gather(shard, self.gathered), 0, self.axis)
        before, after = shard.shape[: self.axis], shard.shape[self.axis + 1 :]
        return pieces.reshape(*before, -1, *after)

    def own(self, wider: Inexact[Array, "*wider"]) -> Inexact[Array, "*shard"]:
        """The inverse of `gather`: this device's piece."""
        if not self.gathered:
            return wider
        start = axes_index(self.gathered) * self.local
        return lax.dynamic_slice_in_dim(wider, start, self.local, axis=self.axis)

    def sent(self, itemsize: int, sizes: Sizes) -> float:
        """Bytes that one device sends so that the momentum's parts are whole."""
        count = math.prod(sizes[axis] for axis in self.gathered)
        whole = math.prod(local_shape(self.shape, self.state, sizes))
        return whole * itemsize * (count - 1) / count


def whole_parts(spec: Spec, views: LeafViews, sizes: Sizes) -> int:
    """How many whole parts one device holds along the split axis; 0 where some are cut."""
    assert views.split is not None
    parts = views[0].shape[views.split]
    whole, left = divmod(parts, math.prod(sizes[axis] for axis in spec[views.split]))
    return 0 if left else whole


def split_layout(param: Spec, state: Spec, views: LeafViews, sizes: Sizes) -> SplitLayout:
    """See both specs of a leaf as specs of its views' shape."""
    axis, shape = views.split, views[0].shape
    assert axis is not None
    specs, gathered = [], ()
    for spec in (param, state):
        parts, width, gathered = _apart(spec[axis], shape[axis], sizes)
        specs.append((*spec[:axis], parts, width, *spec[axis + 1 :]))
    length = shape[axis] * shape[axis + 1]
    local = length // math.prod(sizes[name] for name in param[axis])
    return SplitLayout(shape, specs[0], specs[1], axis, gathered, local)


def _apart(
    axes: Sequence[str], parts: int, sizes: Sizes
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that shard whole parts, those that cut single ones alike, and the rest."""
    count = 0
    for name in axes:
        if parts % sizes[name]:
            break
        parts //= sizes[name]
        count += 1
    rest = tuple(name for name in axes[count:] if sizes[name] > 1)
    return tuple(axes[:count]), rest if parts == 1 else (), () if parts == 1 else rest
