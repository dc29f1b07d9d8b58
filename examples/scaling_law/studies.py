"""The declared grids. Written before any of their runs; what came out is in REPORT.md."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from examples.scaling_law.models import compute_optimal_tokens, flops_of
from examples.scaling_law.protocol import Run
from examples.scaling_law.store import Record
from examples.scaling_law.tuning import Bowl, TunedLaw, find_bottom, fit_law

OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rates and batches at which AdamW is tuned, one run each, seed 0."""

    rates: tuple[float, ...]
    batches: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of the optimizers over sizes.

    Attributes:
        sizes: Layers of the reported models.
        grids: Sizes at which AdamW is tuned, on the tuning files, with their grids.
        seeds: The seeds of the reported runs.
        fractions: Parts of the compute-optimal tokens, on which Muon trains besides all, each
            run with its own whole schedule.
        part: Which files are reported.
        head_dim: Width of a head.
        sequence_length: Predicted bytes per sequence.
        compute_dtype: The dtype of the products.
    """

    sizes: tuple[int, ...]
    grids: Mapping[int, Grid]
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]
    part: Literal["study", "distinct"] = "study"
    head_dim: int = 16
    sequence_length: int = 128
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def tuning_runs(self) -> dict[int, list[Run]]:
        """Every cell of every grid, by size."""
        return {
            size: [
                self._run(size, "adamw", part="tuning", learning_rate=rate, batch=batch, seed=0)
                for batch in grid.batches
                for rate in grid.rates
            ]
            for size, grid in self.grids.items()
        }

    def bowls(self, records: Mapping[Run, Record]) -> dict[int, Bowl]:
        """The bottom of each grid, by size."""
        return {
            size: find_bottom({(run.learning_rate, run.batch): _loss(records[run]) for run in runs})
            for size, runs in self.tuning_runs().items()
        }

    def tuned(self, records: Mapping[Run, Record]) -> TunedLaw:
        """Rate and batch at every size, from the finished grids."""
        bowls = self.bowls(records)
        return fit_law({self.compute(size): bowl for size, bowl in bowls.items()})

    def compute(self, size: int) -> float:
        """6ND of a compute-optimal run, in FLOPs."""
        return flops_of(self._run(size, "adamw", learning_rate=1.0, batch=1, seed=0)).body

    def runs(self, law: TunedLaw) -> list[Run]:
        """All reported runs: both optimizers at full length, and Muon at the shorter ones."""
        return [
            run
            for size in self.sizes
            for seed in self.seeds
            for run in (
                self.run(law, size, "adamw", seed),
                self.run(law, size, "muon", seed),
                *(self.run(law, size, "muon", seed, fraction) for fraction in self.fractions),
            )
        ]

    def run(
        self, law: TunedLaw, size: int, optimizer: str, seed: int, fraction: float = 1.0
    ) -> Run:
        """One reported run: AdamW's rate and batch, whichever the optimizer."""
        compute = self.compute(size)
        run = self._run(
            size,
            optimizer,
            learning_rate=law.learning_rate(compute),
            batch=law.batch(compute),
            seed=seed,
        )
        return run.replace(tokens=round(fraction * run.tokens))

    def _run(self, size: int, optimizer: Any, *, part: Any = None, **fields: Any) -> Run:
        return Run(
            part=part or self.part,
            layers=size,
            optimizer=optimizer,
            tokens=compute_optimal_tokens(size, self.head_dim),
            head_dim=self.head_dim,
            sequence_length=self.sequence_length,
            compute_dtype=self.compute_dtype,
            **fields,
        )


QUICK = Study(
    sizes=(2, 3),
    grids={2: Grid(RATES[1:4], (1, 2, 4)), 3: Grid(RATES[1:4], (2, 4, 8))},
    seeds=(0, 1),
    fractions=(0.4, 0.6),
)

MAIN = Study(
    sizes=(2, 3, 4, 5),
    grids={
        2: Grid(RATES, (1, 2, 4, 8, 16)),
        3: Grid(RATES, (2, 4, 8, 16)),
        4: Grid(RATES[1:], (4, 8, 16, 32)),
    },
    seeds=(0, 1, 2),
    fractions=(0.4, 0.5, 0.6),
)

# One size more, by the rule that the main study's grids gave.
LARGE = dataclasses.replace(MAIN, sizes=(7,))

# Does it matter that the corpus repeats itself, and that some of the repeats are held out?
DISTINCT = dataclasses.replace(MAIN, sizes=(3,), part="distinct")

# 3M to 49M parameters: two orders of magnitude beyond the main study.
GPU = Study(
    sizes=(4, 6, 8, 10),
    grids={
        4: Grid((1e-3, 2e-3, 4e-3, 8e-3), (8, 16, 32, 64)),
        6: Grid((1e-3, 2e-3, 4e-3, 8e-3), (16, 32, 64, 128)),
    },
    seeds=(0, 1, 2),
    fractions=(0.4, 0.5, 0.6),
    head_dim=64,
    sequence_length=512,
    compute_dtype="bfloat16",
)

STUDIES = {"quick": QUICK, "main": MAIN, "distinct": DISTINCT, "1m": LARGE, "gpu": GPU}


def _loss(record: Record) -> float:
    """Final loss; a run that diverged has infinity."""
    return float("inf") if record["val_loss"] is None else record["val_loss"]
