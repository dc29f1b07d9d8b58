"""Turn matrices in the dtype that they have.

XLA is free to turn what a matrix is computed from instead, or what is computed of it: there that
would be float32, gradients and momenta before the cast, and the parameters after the scale. Layouts
that are given stop it. Where sharding is automatic the partitioner would gather what has one (jax
0.10); inside a `shard_map` it has no say.
"""

from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Inexact


def turn(x: Inexact[Array, "*batch rows cols"]) -> Inexact[Array, "*batch cols rows"]:
    """The transposed matrices, written out."""
    in_order = Layout(tuple(range(x.ndim)))
    return with_layout_constraint(with_layout_constraint(x, in_order).mT, in_order)
