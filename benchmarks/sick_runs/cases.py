"""The runs: a healthy one, and one for each mistake, which is one line of its optimizer."""

import dataclasses
from collections.abc import Callable

import optax

from muon_jax import MuonDimensionNumbers, by_path, muon

RATE = 0.05
"""The healthy peak of the learning rate: of 0.01, 0.02, 0.05, 0.3 and 1 it ends lowest."""

MATRIX = MuonDimensionNumbers(-2, -1)
FOLDED = MuonDimensionNumbers((0, 1), 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
      title: what was done, for the picture.
      optimizer: makes the transformation from the schedule of the learning rate.
      rate: the peak of the learning rate.
      dtype: in which the parameters are kept.
      shows: the diagnostics that are drawn, after the loss.
      beside: the run that is drawn in grey.
    """

    title: str
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    shows: tuple[str, ...]
    rate: float = RATE
    dtype: str = "float32"
    beside: str = "healthy"


def _healthy(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), muon(rate))


def _clipped_after(rate: optax.Schedule) -> optax.GradientTransformation:
    direction = optax.chain(muon(1.0, weight_decay=0.0), optax.scale(-1.0))
    return optax.chain(
        direction,
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate),
    )


def _tables_to_muon(rate: optax.Schedule) -> optax.GradientTransformation:
    rules = by_path({"embed": MATRIX, "head": MATRIX})
    return optax.chain(
        optax.clip_by_global_norm(1.0), muon(rate, muon_weight_dimension_numbers=rules)
    )


def _folded(rate: optax.Schedule) -> optax.GradientTransformation:
    rules = by_path({"layers/.*kernel": FOLDED})
    return optax.chain(
        optax.clip_by_global_norm(1.0), muon(rate, muon_weight_dimension_numbers=rules)
    )


def _no_decay(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), muon(rate, weight_decay=0.0))


CASES = {
    "healthy": Case(
        "healthy",
        _healthy,
        (
            "update_rms",
            "adam_rms",
            "weight_rms",
            "max_logit",
            "orthogonality",
            "entropy",
            "arrived",
        ),
    ),
    "rate": Case(
        "a learning rate twenty times too high",
        _healthy,
        ("update_rms", "weight_rms", "max_logit"),
        rate=20 * RATE,
    ),
    # Where lr * weight_decay is small beside a bfloat16 weight's last bit, as in any large model.
    "slow": Case("parameters in float32", _healthy, (), rate=RATE / 5),
    "bfloat16": Case(
        "parameters in bfloat16",
        _healthy,
        ("arrived", "unseen", "weight_rms"),
        rate=RATE / 5,
        dtype="bfloat16",
        beside="slow",
    ),
    "clipped": Case(
        "clipping behind Muon", _clipped_after, ("update_rms", "adam_rms", "weight_rms")
    ),
    "tables": Case(
        "embedding and head routed to Muon",
        _tables_to_muon,
        ("embed_update", "adam_rms", "update_rms"),
    ),
    "folded": Case(
        "a stack of layers as one matrix", _folded, ("orthogonality", "entropy", "update_rms")
    ),
    "decay": Case("no weight decay", _no_decay, ("update_rms", "weight_rms", "max_logit")),
}
