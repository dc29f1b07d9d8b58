"""One step of AdamW's moments, with a state that is a fixed point, and ZeRO-1 on a mesh.

The mathematics is `optax.scale_by_adam`'s. Element by element it needs no neighbours, so on a mesh
each device runs it on its shards, and the float32 updates are gathered.

Optax drops the moments of a leaf whose gradient is None or masked, lets the first moment take the
gradient's dtype after the first step, casts a complex one to a real `mu_dtype`, and squares float16
gradients in float16, where the square of 1e-4 is 0: the update would be infinite.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muon_jax._common.checks import Scalar
from muon_jax._leaves import Leaf
from muon_jax._mesh.gather import gather_bytes, gather_to_params
from muon_jax._mesh.shards import on_shards
from muon_jax._mesh.specs import local_shape
from muon_jax._momentum import accumulator_dtype, momentum_dtype
from muon_jax._step import Arrays, Step


@dataclasses.dataclass(frozen=True)
class AdamStep(Step):
    """The settings of a step of AdamW, besides those of any step.

    Attributes:
      numbers: `b1` and `b2`, the decays of both moments; `eps`, which is added to the root; and
        `eps_root`, which is added under it.
    """

    numbers: tuple[Scalar, Scalar, Scalar, Scalar]
    state = optax.ScaleByAdamState
    kept = 2

    def moments(self, param: jnp.dtype) -> tuple[jnp.dtype, ...]:
        """The dtypes of the first and the second moment of a parameter of this dtype."""
        return momentum_dtype(self.mu_dtype, param), accumulator_dtype(param)

    def run(
        self, count: Any, leaves: list[Leaf], dtypes: list[Any], gradients: Arrays, *kept: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        """The updates and both moments; see `Step`."""
        zero1, settings = self.zero1, (self.numbers, count)
        if zero1 is None:
            return _step(dtypes, settings, gradients, *kept)
        layouts = [leaf.lies for leaf in leaves]

        def body(*args: Any) -> tuple[Arrays, Arrays, Arrays]:
            updates, mu, nu = _step(dtypes, *args)
            return gather_to_params(updates, layouts, zero1.sizes), mu, nu

        return on_shards(zero1.mesh, body, settings, layouts, gradients, *kept)

    def gather_bytes(self, params: Sequence[Any], leaves: Sequence[Leaf]) -> int:
        """Bytes that one device sends to gather the updates: a function of shapes and dtypes."""
        assert self.zero1 is not None
        layouts, sizes = [leaf.lies for leaf in leaves], self.zero1.sizes
        dtypes = [param.dtype for param in params]
        shards = [
            [jax.ShapeDtypeStruct(local_shape(x.shape, x.state, sizes), d) for d in (dtype, *kept)]
            for x, dtype, kept in zip(layouts, dtypes, map(self.moments, dtypes), strict=True)
        ]
        columns = [[shard[i] for shard in shards] for i in range(1 + self.kept)]
        step = functools.partial(_step, dtypes, (self.numbers, jnp.int32(0)))
        return gather_bytes(jax.eval_shape(step, *columns)[0], layouts, sizes)


def _step(
    dtypes: Sequence[jnp.dtype], settings: Any, gradients: Arrays, mu: Arrays, nu: Arrays
) -> tuple[Arrays, Arrays, Arrays]:
    """Optax's step, of leaves or of their shards, with moments that keep their dtypes."""
    numbers, count = settings
    gradients = [g.astype(jnp.float32) if g.dtype == jnp.float16 else g for g in gradients]
    # Optax takes powers of floats by integers, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        state: Any = optax.ScaleByAdamState(count, mu, nu)
        updates, state = optax.scale_by_adam(*numbers).update(gradients, state)
    updates = [
        u.astype(dtype) if dtype == jnp.float16 else u
        for u, dtype in zip(jax.tree.leaves(updates), dtypes, strict=True)
    ]
    like = lambda new, old: [n.astype(o.dtype) for n, o in zip(new, old, strict=True)]  # noqa: E731
    return updates, like(state.mu, mu), like(state.nu, nu)
