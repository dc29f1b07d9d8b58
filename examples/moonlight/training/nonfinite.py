"""What a run does about gradients that are not finite: it stops, or leaves such updates out.

Leaving out is `optax.apply_if_finite`: where a gradient has a NaN or an infinity, the parameters
and the state of the optimizer stay as they were, so its schedule does not advance either, and the
router's bias stays too. What a checkpoint holds of the optimizer is the same either way, so that a
run may change its mind when it is resumed.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.moonlight.training.args import Args

OnNonfinite = Literal["stop", "skip"]

# So many in a row are no accident of the data.
MOST_IN_A_ROW = 10

_NEVER_ACCEPT = np.iinfo(np.int32).max


class Skipped(NamedTuple):
    """The updates that a run left out.

    Attributes:
        total: All of them.
        in_a_row: Updates left out since the last that was taken.
    """

    total: int = 0
    in_a_row: int = 0


def guard(
    optimizer: optax.GradientTransformation, on_nonfinite: OnNonfinite
) -> optax.GradientTransformation:
    """The optimizer, which leaves out updates from gradients that are not finite if asked to."""
    if on_nonfinite == "stop":
        return optimizer
    return optax.apply_if_finite(optimizer, _NEVER_ACCEPT)


def wrap(state: Any, on_nonfinite: OnNonfinite, skipped: Skipped, place: Any = None) -> Any:
    """What `guard`'s transformation has as its state, from what its optimizer has as its own.

    Args:
        state: The optimizer's state; or its shardings.
        on_nonfinite: What `guard` was given.
        skipped: The updates that were left out so far.
        place: If `state` is a tree of shardings, that of a scalar.
    """
    if on_nonfinite == "stop":
        return state
    if place is not None:
        return optax.ApplyIfFiniteState(place, place, place, state)
    return optax.ApplyIfFiniteState(
        notfinite_count=np.int32(skipped.in_a_row),
        last_finite=np.bool_(skipped.in_a_row == 0),
        total_notfinite=np.int32(skipped.total),
        inner_state=state,
    )


def unwrap(state: Any) -> tuple[Any, Skipped]:
    """The optimizer's own state, and the updates that were left out; inverts `wrap`."""
    if not isinstance(state, optax.ApplyIfFiniteState):
        return state, Skipped()
    skipped = Skipped(int(state.total_notfinite), int(state.notfinite_count))
    return state.inner_state, skipped


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite, bool `[]`."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def explain(step: int, values: Mapping[str, Any]) -> str:
    """What went wrong at a step, from what it measured; `remedy` belongs behind it."""
    if not values["grads_finite"]:
        return (
            f"step {step}: the gradient is not finite (loss {values['loss']:g}, gradient norm "
            f"{values['grad_norm']:g}). "
        )
    return f"step {step}: the gradient is finite, and the weights or moments after it are not. "


def remedy(newest: int | None, args: Args) -> str:
    """The commands that go on from the newest checkpoint, all of which are finite."""
    another = (
        ""
        if args.on_nonfinite == "skip"
        else (
            "with the same command and --resume --on-nonfinite skip, which leaves such updates "
            "out; or "
        )
    )
    if newest is None:
        return (
            f"Nothing was saved yet: go on {another}with a lower --learning-rate in another "
            "--output-dir"
        )
    return (
        f"The newest checkpoint, of step {newest}, is finite: go on from it {another}with a lower "
        f"rate in a new folder, --branch-from {args.output_dir}@{newest} --learning-rate ... "
        "--output-dir ...; --resume-step goes further back"
    )
