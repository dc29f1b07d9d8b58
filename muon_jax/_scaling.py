"""Update scales: from the shape of a matrix to the factor on its orthogonalized update.

A full-rank orthogonal ``[A, B]`` matrix has RMS ``1/sqrt(max(A, B))`` (Liu et al. 2025, Lemma 1),
so without a scale the update RMS would depend on the shape. ``A`` and ``B`` are those of one
matrix: never of a stack, a fused block or a shard.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.core import Tracer

from muon_jax._common.checks import Scalar, check_arity, check_scalar

ShapeFunction = Callable[[int, int], Scalar]

ADAMW_RMS = 0.2
"""The low end of AdamW's own update RMS, 0.2 to 0.4 (Liu et al. 2025, Section 2.2)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdjustedLR:
    """``rms * sqrt(max(fan_in, fan_out))``: the same update RMS for every shape.

    Liu et al. 2025, Eq. 4 ("Adjusted LR"), Moonlight's choice and the default of `muon`.

    Attributes:
      rms: the update RMS to aim at, 0 or more.

    Examples:
      >>> AdjustedLR(0.2).factor(fan_in=64, fan_out=16)
      1.6
      >>> tx = muon(3e-4, update_scale=AdjustedLR(0.18))
    """

    rms: Scalar = ADAMW_RMS

    def factor(self, fan_in: int, fan_out: int) -> Scalar:
        """The factor on a `[fan_in, fan_out]` matrix, a scalar."""
        return self.rms * math.sqrt(max(fan_in, fan_out))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedScale:
    """The same factor for every matrix, such as ``0.2 * sqrt(hidden_size)``.

    Liu et al. 2025, Eq. 5 ("Baseline").

    Attributes:
      value: the factor, 0 or more.

    Examples:
      >>> hidden_size = 1024
      >>> tx = muon(3e-4, update_scale=FixedScale(0.2 * hidden_size**0.5))
    """

    value: Scalar

    def factor(self, fan_in: int, fan_out: int) -> Scalar:
        """The factor on any matrix, a scalar."""
        del fan_in, fan_out
        return self.value


@dataclasses.dataclass(frozen=True)
class ByShape:
    """A factor computed by a function of ``(fan_in, fan_out)``."""

    function: ShapeFunction

    def factor(self, fan_in: int, fan_out: int) -> Scalar:
        """The factor on a `[fan_in, fan_out]` matrix, a scalar; TypeError for anything else."""
        return self.checked(fan_in, fan_out, "its matrices")

    def checked(self, fan_in: int, fan_out: int, where: str) -> Scalar:
        """The same, where the error names whose factor is no finite number of at least 0."""
        value = self.function(fan_in, fan_out)
        check_scalar(f"update_scale({fan_in}, {fan_out}), the factor of {where},", value)
        return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateNorm:
    """``rms / RMS(O)``: exactly this update RMS, measured on each matrix at each step.

    Liu et al. 2025, Eq. 6 ("Update Norm"). A zero matrix stays zero.

    Attributes:
      rms: the update RMS, 0 or more.

    Examples:
      A matrix of rank one, whose polar factor alone would have a smaller RMS:

      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> tx = scale_by_muon(update_scale=UpdateNorm(0.25))
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> round(float(update_rms(updates)["kernel"]), 3)
      0.25
    """

    rms: Scalar = ADAMW_RMS


def width_transfer(fan_in: int, fan_out: int) -> float:
    """``sqrt(max(1, fan_out / fan_in))``, Jordan's and Optax's scale (`consistent_rms=None`)."""
    return math.sqrt(max(1.0, fan_out / fan_in))


UpdateScale = AdjustedLR | FixedScale | ByShape | UpdateNorm


@dataclasses.dataclass(frozen=True, repr=False)
class DefaultRMS:
    """A number as a default, told apart from the same number written by the user.

    No subclass of float: `optax.inject_hyperparams` would take it for a hyperparameter and give
    back an array of another dtype.
    """

    value: float

    def __repr__(self) -> str:
        return repr(self.value)

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, DefaultRMS) else other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __float__(self) -> float:
        return self.value


DEFAULT_RMS = DefaultRMS(ADAMW_RMS)


def resolve_update_scale(
    consistent_rms: Scalar | DefaultRMS | None,
    update_scale: UpdateScale | ShapeFunction | None,
) -> UpdateScale:
    """The one scale that `consistent_rms` and `update_scale` ask for.

    Raises:
      ValueError: where both are given, or a static `consistent_rms` is negative or not finite.
      TypeError: where `update_scale` is neither a scale nor a function of two numbers.
    """
    if update_scale is None:
        if consistent_rms is None:
            return ByShape(width_transfer)
        if isinstance(consistent_rms, DefaultRMS):
            return AdjustedLR(consistent_rms.value)
        check_scalar("consistent_rms", consistent_rms)
        return AdjustedLR(consistent_rms)
    if not isinstance(consistent_rms, DefaultRMS):
        raise ValueError(
            f"consistent_rms={consistent_rms} and update_scale={update_scale} are two scales for "
            "one update: pass one of them."
        )
    if isinstance(update_scale, AdjustedLR | UpdateNorm):
        check_scalar(f"rms of {type(update_scale).__name__}", update_scale.rms)
        return update_scale
    if isinstance(update_scale, FixedScale):
        check_scalar("value of FixedScale", update_scale.value)
        return update_scale
    if callable(update_scale) and not isinstance(update_scale, type):
        check_arity("update_scale", update_scale, "(fan_in, fan_out)", 2)
        return ByShape(update_scale)
    raise TypeError(
        "update_scale must be AdjustedLR, UpdateNorm, FixedScale or a function of "
        f"(fan_in, fan_out); got {update_scale!r}."
    )


def check_update_scale(scale: UpdateScale, fan_in: int, fan_out: int, where: str) -> None:
    """Raise where a function gives no factor for the `[fan_in, fan_out]` matrices of a leaf."""
    if isinstance(scale, ByShape):
        scale.checked(fan_in, fan_out, where)


def describe_update_scale(scale: UpdateScale, fan_in: int, fan_out: int) -> str:
    """The factor on a `[fan_in, fan_out]` matrix, as `routing_report` prints it."""
    if isinstance(scale, UpdateNorm):
        return f"{_number(scale.rms)}/RMS(O)"
    return _number(scale.factor(fan_in, fan_out))


def _number(value: Scalar) -> str:
    return "traced" if isinstance(value, Tracer) else f"{float(value):.4g}"
