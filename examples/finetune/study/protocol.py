"""What a run of the study is, and the grids: declared before the first result was seen.

Two models are pre-trained, one with each optimizer, at one rate: Muon's update RMS is matched to
AdamW's, as in the paper. Each is then fine-tuned with each optimizer, in full and by LoRA: eight
cells. Each cell has its own learning rate, the one of a grid with the lowest loss on the tuning
questions, in the mean of `TUNING_SEEDS`; then it trains with every one of `SEEDS`, and is measured
on the test questions. Changed since: rates were first chosen by one seed, see REPORT.md.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

Optimizer = Literal["muon", "adamw"]
Tuner = Literal["full", "lora"]

OPTIMIZERS: tuple[Optimizer, ...] = ("muon", "adamw")
TUNERS: tuple[Tuner, ...] = ("full", "lora")

LAYERS, HEADS, HIDDEN, INTERMEDIATE = 3, 4, 64, 192
LORA_RANK, LORA_ALPHA = 8, 32.0
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
WARMUP_RATIO = 0.05
PRETRAINING_RATE = 4e-3
PRETRAINING_BATCH = 64
TUNING_BATCH = 32

# Optimizer steps of one call into XLA; a run is a whole number of calls.
STEPS_PER_CALL = 20

# The reported seeds are others.
TUNING_SEEDS = (0, 6, 7)
SEEDS = (1, 2, 3, 4, 5)

# Changes whenever the same `Run` would give other numbers: results of before are not reused.
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        pretrained_by: The optimizer that the model is pre-trained with.
        pretraining_steps: The steps of that.
        optimizer: The optimizer of the fine-tuning; None for the pre-training itself.
        tuner: What the fine-tuning changes; None for the pre-training itself.
        steps: The steps of the fine-tuning.
        learning_rate: The peak of its learning rate.
        seed: The seed of LoRA's factors and of the order of the questions.
        measured_on: The questions that it is measured on, "tuning" or "test".
    """

    pretrained_by: Optimizer
    pretraining_steps: int
    optimizer: Optimizer | None = None
    tuner: Tuner | None = None
    steps: int = 0
    learning_rate: float = PRETRAINING_RATE
    seed: int = TUNING_SEEDS[0]
    measured_on: Literal["tuning", "test"] = "tuning"

    @property
    def base(self) -> "Run":
        """The pre-training that it begins with."""
        return Run(pretrained_by=self.pretrained_by, pretraining_steps=self.pretraining_steps)

    @property
    def cell(self) -> tuple[str, str, str]:
        """Its tuner, and the optimizers of pre-training and fine-tuning."""
        return str(self.tuner), self.pretrained_by, str(self.optimizer)

    def key(self) -> str:
        """Name by content: the same for the same training, and no other."""
        content = json.dumps({"run": to_json(self), "version": VERSION}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def to_json(run: Run) -> dict[str, Any]:
    """A run as JSON holds it: plain values by field name."""
    return dataclasses.asdict(run)


def from_json(fields: dict[str, Any]) -> Run:
    """The run that `to_json` was given.

    Raises:
        TypeError: The fields are not a run's.
    """
    return Run(**fields)


@dataclasses.dataclass(frozen=True)
class Study:
    """A preset.

    Attributes:
        pretraining_steps: The steps of both pre-trainings.
        steps: The steps of a fine-tuning with each tuner.
        rates: The grid of learning rates of each tuner.
        tuning_seeds: The seeds that a rate is chosen by.
        seeds: The seeds of the reported runs.
    """

    pretraining_steps: int
    steps: dict[str, int]
    rates: dict[str, tuple[float, ...]]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]

    def bases(self) -> list[Run]:
        """The pre-trainings."""
        return [
            Run(pretrained_by=name, pretraining_steps=self.pretraining_steps) for name in OPTIMIZERS
        ]

    def cells(self) -> list[Run]:
        """A fine-tuning of each cell, whose rate is to be found."""
        return [
            dataclasses.replace(base, optimizer=optimizer, tuner=tuner, steps=self.steps[tuner])
            for tuner in TUNERS
            for base in self.bases()
            for optimizer in OPTIMIZERS
        ]

    def tuning(self, cell: Run) -> list[Run]:
        """The runs that a cell's rate is chosen by."""
        return [
            dataclasses.replace(cell, learning_rate=rate, seed=seed)
            for rate in self.rates[str(cell.tuner)]
            for seed in self.tuning_seeds
        ]

    def reported(self, cell: Run, rate: float) -> list[Run]:
        """The runs that are reported."""
        chosen = dataclasses.replace(cell, learning_rate=rate, measured_on="test")
        return [dataclasses.replace(chosen, seed=seed) for seed in self.seeds]


RATES = {
    "full": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
STUDIES = {
    "main": Study(3000, {"full": 400, "lora": 800}, RATES, TUNING_SEEDS, SEEDS),
    "quick": Study(
        1000,
        {"full": 200, "lora": 400},
        {name: rates[1:4] for name, rates in RATES.items()},
        TUNING_SEEDS[:1],
        SEEDS[:3],
    ),
}
