"""Cut an array in pieces, by kernels that XLA:CPU compiles once for all of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact


def cut(
    x: Inexact[Array, "..."], bounds: Sequence[tuple[int, int]], axis: int, *, is_local: bool
) -> list[Inexact[Array, "..."]]:
    """``x[start:stop]`` along an axis, for each of the bounds.

    XLA:CPU compiles alike kernels once, and constants in their code make them unlike: 288 leaves
    had 288 kernels that differed in a number, and took 6.2 s to compile instead of 0.6. So a CPU
    reads from an array where a piece of one lies.

    Args:
      x: the array, in the order of the bounds.
      bounds: where each piece starts and stops.
      axis: the axis that is cut.
      is_local: whether all of the axis lies on each device. Elsewhere, XLA would gather it for a
        piece whose place it does not know.
    """

    def at_constants(x: jax.Array) -> list[jax.Array]:
        return [lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in bounds]

    def ones_at_arrays(x: jax.Array) -> list[jax.Array]:
        return [
            lax.dynamic_slice_in_dim(x, _from_array(start), 1, axis)
            if stop - start == 1
            else lax.slice_in_dim(x, start, stop, axis=axis)
            for start, stop in bounds
        ]

    if len(bounds) == 1 or not is_local:
        return at_constants(x)
    return lax.platform_dependent(x, cpu=ones_at_arrays, default=at_constants)


def _from_array(number: int) -> jax.Array:
    """A number that no compiler finds out, so that it becomes no constant of a kernel.

    XLA folds an array of one entry, or of equal ones, in spite of the barrier (jax 0.10).
    """
    found, _ = lax.optimization_barrier(jnp.asarray([number, number + 1], jnp.uint32))
    return found
