"""The rule that makes a matrix's update of its direction, whoever computes which part where."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from muon_jax._common.checks import Scalar
from muon_jax._common.dtypes import promote
from muon_jax._orthogonalize import Iteration
from muon_jax._scaling import UpdateNorm, UpdateScale


class UpdateRule(NamedTuple):
    """From the direction, which is orthogonalized, to the update: iterate, measure, scale.

    Orthogonalizing and measuring need whole matrices, in the dtype of the iteration. Scaling comes
    last, in float32 or wider, and needs no more of a matrix than is there: a bfloat16 product would
    round the factor, and the unscaled result travels as bfloat16 without loss.
    """

    iteration: Iteration
    scale: UpdateScale
    adaptive: bool
    beta: Scalar
    nesterov: bool

    @property
    def is_measured(self) -> bool:
        """Whether the factor depends on the values of the whole matrix."""
        return self.adaptive or isinstance(self.scale, UpdateNorm)

    def measure(
        self,
        direction: Inexact[Array, "batch rows cols"],
        result: Inexact[Array, "batch rows cols"],
    ) -> Float[Array, "batch"]:
        """The measured factor of each matrix.

        ``(1 - beta) <U, O>``, the dual norm of the averaged momentum, where `adaptive`; then
        ``rms / RMS(O)``, for `UpdateNorm`.
        """
        wide = result.astype(promote(result.dtype, jnp.float32))
        factor = jnp.ones(len(wide), jnp.finfo(wide.dtype).dtype)
        if self.adaptive:
            dual = jnp.sum(direction.astype(wide.dtype).conj() * wide, axis=(-2, -1)).real
            factor = (1 - jnp.asarray(self.beta, dual.dtype)) * dual
        if isinstance(self.scale, UpdateNorm):
            scaled = wide * factor[:, None, None]
            rms = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(scaled)), axis=(-2, -1)))
            factor = factor * (jnp.asarray(self.scale.rms, rms.dtype) / jnp.where(rms == 0, 1, rms))
        return factor

    def finish(
        self,
        result: Inexact[Array, "batch fan_in fan_out"],
        measured: Float[Array, "batch"] | None,
        matrix: tuple[int, int],
    ) -> Inexact[Array, "batch fan_in fan_out"]:
        """Scale matrices, or pieces of them.

        Args:
          result: what the iteration gave.
          measured: what `measure` gave, where `is_measured`.
          matrix: the fan-in and fan-out of the whole matrix.
        """
        wide = result.astype(promote(result.dtype, jnp.float32))
        if measured is not None:
            wide = wide * measured[:, None, None]
        if isinstance(self.scale, UpdateNorm):
            return wide
        real = jnp.finfo(wide.dtype).dtype
        return wide * jnp.asarray(self.scale.factor(*matrix), real)
