"""Newton-Schulz coefficient schedules: where they come from and what they promise.

One step maps every singular value ``s`` of ``X`` to ``a s + b s^3 + c s^5``
(Liu et al. 2025, Section 2.1). A schedule is one ``(a, b, c)`` per step; it should carry all
singular values in (0, 1] close to 1. How close decides the realised update RMS, and with it the
effective learning rate. Of the nominal RMS, five standard steps reach 0.94 on a 512x512 Gaussian
and between 0.75 (64x1024) and 1.00 (256x4096) elsewhere; the other schedules stay within 0.96 and
1.04, but for cubic5 with 0.94 to 1.21.

| name          | steps  | singular values of a Gaussian | source                 |
|               |        | 512x512      | 512x2048       |                        |
|---------------|--------|--------------|----------------|------------------------|
| standard      | any, 5 | .013 - 1.202 | .745 - 1.134   | Jordan 2024; Liu 2025  |
| dion          | 5      | .013 - 1.145 | .978 - 1.032   | arXiv 2504.05295       |
| polar_express | any, 5 | .027 - 1.124 | .870 - 1.124   | arXiv 2505.16932       |
| deepseek_v4   | 10     | 1.000 - 1.001 | 1.000 - 1.001 | DeepSeek-V4            |
| minimax       | 3-6, 5 | .014 - 1.004 | .995 - 1.004   | derived, see MINIMAX   |
| cubic5        | 5      | .003 - 1.300 | .774 - 1.300   | arXiv 2606.00371       |

A step takes three matrix products; one whose c is 0 takes two, so that cubic5 takes 10 of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from muon_jax._common.checks import is_positive_integer

Coefficients = tuple[float, float, float]
Schedule = tuple[Coefficients, ...]

STANDARD: Coefficients = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic, used for every step by Moonlight (Liu et al. 2025, Section 2.1)."""

DION: Schedule = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Five steps tuned together, the preset that Optax calls "dion" (arXiv 2504.05295)."""

POLAR_EXPRESS: Schedule = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Minimax-optimal after every step, for singular values from 1e-3 (arXiv 2505.16932, Alg. 1)."""

POLAR_EXPRESS_SAFETY = 1.01
"""Divides the input of every Polar Express and minimax step but the last: rounding overshoots."""

MINIMAX: dict[int, Schedule] = {
    3: (
        (7.3089110316495365, -20.532771446116513, 14.99338118282365),
        (2.877656482676087, -2.1510332271542083, 0.47201204891027837),
        (2.029276809257575, -1.412452068564515, 0.3915804334444021),
    ),
    4: (
        (8.093368512548254, -23.62043032882427, 17.446151749836247),
        (3.6365855542590424, -2.7219267466089088, 0.5365462883273615),
        (2.661299985777099, -1.9771545218846251, 0.452616406996401),
        (1.9561716388844537, -1.3375077459440725, 0.3838527013298797),
    ),
    5: (
        (8.376717014235254, -24.738441603665844, 18.335235866643337),
        (4.032616899136345, -3.003828110993786, 0.5686483787974992),
        (3.474737031253403, -2.6040655590797197, 0.5231547699204903),
        (2.4548363764025987, -1.8041217595021783, 0.43352644732841206),
        (1.9116695767878393, -1.2901673210255218, 0.3790388656473498),
    ),
    6: (
        (8.470328803848073, -25.108074706661885, 18.62927559911802),
        (4.1828341832939415, -3.108701109889241, 0.580606681350049),
        (3.9618572789615962, -2.9540637463593775, 0.5629761179538965),
        (3.2865862170279576, -2.464720134531282, 0.5073576938614552),
        (2.273749994434035, -1.6446603679080638, 0.4161909274978851),
        (1.888716197351829, -1.2651572253386008, 0.37651892555749067),
    ),
}
"""Polar Express' recipe for as many steps as will be taken: closest to 1 on ``[10^(-k/2), 1]``.

Fewer steps cannot lift singular values as small, and more need not leave the others as far from 1
as a bound of 1e-3 makes them: after four steps of `POLAR_EXPRESS` 0.55, after five 0.11, against
0.013 and 0.004. Derived by `benchmarks.polar_error.derive`. Every number of steps has a bound of
its own, so that none of these schedules is the beginning of another.
"""

CUBIC5: Schedule = (
    (3.36566, -3.34210, 0.0),
    (2.57444, -1.49574, 0.0),
    (2.53690, -1.43126, 0.0),
    (2.44189, -1.27640, 0.0),
    (2.22305, -0.96307, 0.0),
)
"""Five cubic steps: no product ``A A``, and less precision (arXiv 2606.00371)."""

DEEPSEEK_V4_FAST: Coefficients = STANDARD
DEEPSEEK_V4_FINAL: Coefficients = (2.0, -1.5, 0.5)
"""Eight fast steps bring the spectrum near 1; two with p(1) = 1 and p'(1) = 0 settle it there."""

DEFAULT_STEPS = 5


def with_margin(steps: Schedule) -> Schedule:
    """All but the last, with their input divided by the safety factor."""
    return tuple(
        (a / POLAR_EXPRESS_SAFETY, b / POLAR_EXPRESS_SAFETY**3, c / POLAR_EXPRESS_SAFETY**5)
        for a, b, c in steps[:-1]
    )


def _polar_express(steps: int) -> Schedule:
    safe = with_margin(POLAR_EXPRESS)
    return (safe + (POLAR_EXPRESS[-1],) * max(0, steps - len(safe)))[:steps]


def _minimax(steps: int) -> Schedule:
    if steps not in MINIMAX:
        raise ValueError(
            f"The schedule 'minimax' has {min(MINIMAX)} to {max(MINIMAX)} steps; got "
            f"ns_steps={steps}. 'polar_express' takes any number."
        )
    return (*with_margin(MINIMAX[steps]), MINIMAX[steps][-1])


# A schedule of several lengths takes the number of steps; a fixed one has its own.
_ANY_LENGTH = {
    "standard": lambda steps: (STANDARD,) * steps,
    "polar_express": _polar_express,
    "minimax": _minimax,
}
_FIXED = {
    "dion": DION,
    "deepseek_v4": (DEEPSEEK_V4_FAST,) * 8 + (DEEPSEEK_V4_FINAL,) * 2,
    "cubic5": CUBIC5,
}

SCHEDULES = (*_ANY_LENGTH, *_FIXED)
"""The names that `ns_coeffs` accepts."""


def resolve_schedule(ns_coeffs: Any = "standard", ns_steps: int | None = None) -> Schedule:
    """Turn `ns_coeffs` and `ns_steps` into one ``(a, b, c)`` per step.

    Args:
      ns_coeffs: a name from the table above; one ``(a, b, c)``, used for every step; or one
        ``(a, b, c)`` per step (a sequence or an array of shape ``[steps, 3]``).
      ns_steps: the number of steps. None means 5 where the schedule leaves it open, and the
        schedule's own length otherwise.

    Returns:
      A tuple of ``(a, b, c)`` floats, one per step.

    Raises:
      ValueError: for an unknown name, for coefficients of another shape or not finite, for
        `ns_steps` below 1, for a number of steps that the schedule does not have, and where
        `ns_steps` contradicts its length.
      TypeError: where either is traced: they shape the program.
    """
    if isinstance(ns_steps, jax.Array) or any(
        isinstance(leaf, Tracer) for leaf in jax.tree.leaves(ns_coeffs)
    ):
        raise TypeError(
            "ns_coeffs and ns_steps shape the compiled program and must be known when it is "
            "traced, but one of them is traced. Under optax.inject_hyperparams pass "
            'static_args=("ns_coeffs", "ns_steps").'
        )
    if ns_steps is not None and not is_positive_integer(ns_steps):
        raise ValueError(
            f"ns_steps must be a whole number of at least 1, or None; got {ns_steps!r}."
        )
    steps = None if ns_steps is None else int(ns_steps)

    if isinstance(ns_coeffs, str):
        if ns_coeffs in _ANY_LENGTH:
            return _ANY_LENGTH[ns_coeffs](steps or DEFAULT_STEPS)
        if ns_coeffs not in _FIXED:
            raise ValueError(
                f"Unknown Newton-Schulz schedule {ns_coeffs!r}; known are {', '.join(SCHEDULES)}. "
                "Any other schedule is given as one (a, b, c) per step."
            )
        schedule = _FIXED[ns_coeffs]
    else:
        schedule = _as_schedule(ns_coeffs)
        if len(schedule) == 1 and np.ndim(ns_coeffs) == 1:
            return schedule * (steps or DEFAULT_STEPS)
    if steps is not None and steps != len(schedule):
        raise ValueError(
            f"ns_steps={steps} contradicts ns_coeffs, which has {len(schedule)} steps. Leave "
            "ns_steps=None to run all of them, or pass the coefficients of the steps you want."
        )
    return schedule


def _as_schedule(ns_coeffs: Sequence[Any] | np.ndarray | jax.Array) -> Schedule:
    try:
        table = np.asarray(ns_coeffs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ns_coeffs must be a name, (a, b, c), or one (a, b, c) per step; got {ns_coeffs!r}."
        ) from error
    rows = np.atleast_2d(table)
    if rows.ndim != 2 or rows.shape[-1] != 3 or not len(rows):
        raise ValueError(
            "ns_coeffs must be a name, (a, b, c), or one (a, b, c) per step; got values of shape "
            f"{table.shape}."
        )
    if not all(math.isfinite(value) for value in rows.flat):
        raise ValueError(f"ns_coeffs must be finite; got {rows.tolist()}.")
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)
