"""What a run is, and what all runs have in common. Fixed before the first result was seen.

Models are the dense family's: width = layers x head width and heads = layers, as in Table 2 of
"Muon is Scalable for LLM Training" (Liu et al. 2025, arXiv 2502.16982), so that sizes differ in
one number. A token is a byte. Every run is compute-optimal unless it says otherwise: 20 tokens per
parameter of the body.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

from muon_jax import SCHEDULES

TOKENS_PER_PARAMETER = 20
VOCABULARY = 256

# Optimizer steps of one call into XLA; a run is a whole number of calls.
STEPS_PER_CALL = 20

# Cosine to a tenth of the peak, after a linear warmup: a run of any length has its own, whole.
WARMUP_FRACTION = 0.05
FINAL_RATE_FRACTION = 0.1

GRADIENT_CLIP = 1.0
ADAM_B1, ADAM_B2, ADAM_EPS = 0.9, 0.95, 1e-8
VALIDATION_WINDOWS = 2048

# Changes whenever the same `Run` would give other numbers, by another model, division of the files
# or default of the library: results of before are neither reused nor reported.
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training, with everything that its result depends on besides the corpus.

    Attributes:
        part: Which files it reads. Rates and batches are tuned on other files than are reported;
            "distinct" are the reported ones without those that repeat others.
        family: "dense" is Llama's; "two_layer" has an MLP of two layers in the place of SwiGLU, as
            in the paper's Table 1; "moe" is Moonlight's, with experts.
        layers: Layers, and heads.
        head_dim: Width of a head; the model is `layers * head_dim` wide.
        sequence_length: Predicted bytes per sequence.
        compute_dtype: The dtype of the products.
        tokens: Bytes to train on, rounded to whole calls of `STEPS_PER_CALL` steps.
        batch: Sequences per step.
        learning_rate: The peak, for all parameters.
        weight_decay: Decoupled, on all parameters.
        seed: The seed of the initial weights and of the data's order. Optimizers share both.
        optimizer: "adamw" or "muon".
        scale: Muon's update scale: Eq. 4 ("adjusted_lr"), Eq. 5 ("baseline"), Eq. 6
            ("update_norm").
        update_rms: The RMS that the scale aims at.
        ns_coeffs: Newton-Schulz schedule by name.
        ns_steps: Its steps; None is the schedule's own number, 5 where it leaves that open.
        muon_too: Leaves given to Muon that belong to AdamW: "embed", "lm_head".
        heads_per_group: How many heads of attention form one matrix of Muon's; None, all of them.
        watch: How often, evenly spread, weights, outputs and spectra are measured on the way.
    """

    part: Literal["tuning", "study", "distinct"]
    layers: int
    tokens: int
    batch: int
    learning_rate: float
    optimizer: Literal["adamw", "muon"]
    seed: int = 0
    family: Literal["dense", "two_layer", "moe"] = "dense"
    head_dim: int = 16
    sequence_length: int = 128
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.1
    scale: Literal["adjusted_lr", "baseline", "update_norm"] = "adjusted_lr"
    update_rms: float = 0.2
    ns_coeffs: str = "standard"
    ns_steps: int | None = None
    muon_too: tuple[str, ...] = ()
    watch: int = 0
    heads_per_group: int | None = None

    def __post_init__(self):
        """Raises ValueError for numbers out of range, or options of Muon's in a run of AdamW."""
        for name in ("learning_rate", "weight_decay", "update_rms"):
            # 1 and 1.0 are equal, and would be two names in the cache.
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "muon_too", tuple(self.muon_too))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {known}")
        for name in _COUNTS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "update_rms"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "seed", "watch"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if self.optimizer == "adamw":
            for name in _OF_MUON:
                default = self.__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is Muon's, and the optimizer is AdamW: "
                        "leave it out, or two runs would differ in name only"
                    )
        if self.heads_per_group is not None and self.layers % self.heads_per_group:
            raise ValueError(
                f"heads_per_group must divide the {self.layers} heads, got {self.heads_per_group}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps: the whole calls nearest to `tokens`, at least one."""
        per_call = STEPS_PER_CALL * self.batch * self.sequence_length
        return STEPS_PER_CALL * max(1, round(self.tokens / per_call))

    @property
    def trained_tokens(self) -> int:
        """Tokens that those steps read."""
        return self.steps * self.batch * self.sequence_length

    def replace(self, **changes: Any) -> "Run":
        """The same run but for some fields."""
        return dataclasses.replace(self, **changes)

    def key(self, corpus: str) -> str:
        """Name by content: the same for the same training on the same corpus, and no other."""
        fields = to_json(self)
        run = {k: x for k, x in fields.items() if k not in _LATER or x != _LATER[k]}
        content = {"run": run, "corpus": corpus, "protocol": PROTOCOL}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# Fields younger than the first results, with what those had: runs of before keep their keys.
_LATER = {"heads_per_group": None}

_COUNTS = (
    "layers",
    "tokens",
    "batch",
    "head_dim",
    "sequence_length",
    "ns_steps",
    "heads_per_group",
)
_OF_MUON = ("scale", "update_rms", "ns_coeffs", "ns_steps", "muon_too", "heads_per_group")

_CHOICES = {
    "part": ("tuning", "study", "distinct"),
    "optimizer": ("adamw", "muon"),
    "family": ("dense", "two_layer", "moe"),
    "compute_dtype": ("float32", "bfloat16"),
    "scale": ("adjusted_lr", "baseline", "update_norm"),
    "ns_coeffs": SCHEDULES,
}

PROTOCOL = {
    "version": VERSION,
    "vocabulary": VOCABULARY,
    "steps_per_call": STEPS_PER_CALL,
    "warmup_fraction": WARMUP_FRACTION,
    "final_rate_fraction": FINAL_RATE_FRACTION,
    "gradient_clip": GRADIENT_CLIP,
    "adam": [ADAM_B1, ADAM_B2, ADAM_EPS],
    "validation_windows": VALIDATION_WINDOWS,
}


def to_json(run: Run) -> dict[str, Any]:
    """A run as JSON holds it: plain values by field name."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def from_json(fields: dict[str, Any]) -> Run:
    """The run that `to_json` was given.

    Raises:
        TypeError, ValueError: The fields are not a run's.
    """
    return Run(**fields)
