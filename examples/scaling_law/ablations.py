"""The paper's smaller questions, one factor at a time, in the frame of the study.

Everything but the factor is the tuned Muon run of one size. All are read on the reported files.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from examples.scaling_law.protocol import Run

SIZE = 3
SEEDS = (0, 1)

# Of heads: at a size whose number of heads has a divisor, as the main study's own runs have it.
HEADS_SIZE, HEADS_SEEDS = 4, (0, 1, 2)

UPDATE_RMS = (0.05, 0.1, 0.2, 0.4, 0.8)
RATE_FACTORS = (0.25, 0.5, 1, 2, 4, 8)
BATCHES = (2, 4, 8, 16, 32, 64)
OVERTRAINING = 5
WATCH = 20


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One factor.

    Attributes:
        name: The name in file names and options.
        question: What it asks, and where the paper does.
        variants: Runs of each setting, seed by seed.
    """

    name: str
    question: str
    variants: Mapping[str, tuple[Run, ...]]

    @property
    def runs(self) -> list[Run]:
        """All of them, once each."""
        return list(dict.fromkeys(run for runs in self.variants.values() for run in runs))


def ablations(muon_of: Callable[[int], Run]) -> dict[str, Ablation]:
    """The declared ablations, by name.

    Args:
        muon_of: Maps a number of layers to the run to which they are changes, tuned and
            compute-optimal.
    """
    muon, heads = muon_of(SIZE), muon_of(HEADS_SIZE)
    adamw = muon.replace(optimizer="adamw")
    both = (adamw, muon)
    two_layer = muon.replace(family="two_layer")
    long_adamw, long_muon = (
        run.replace(tokens=OVERTRAINING * muon.tokens, watch=WATCH) for run in both
    )
    watched = [run.replace(watch=WATCH) for run in both]

    def over(
        runs: Iterable[tuple[str, Run]], seeds: tuple[int, ...] = SEEDS
    ) -> dict[str, tuple[Run, ...]]:
        return {name: tuple(run.replace(seed=seed) for seed in seeds) for name, run in runs}

    declared = [
        Ablation(
            "scales",
            "Which update scale, where the MLP has two layers? (Table 1)",
            over(
                (name, two_layer.replace(scale=name))
                for name in ("baseline", "update_norm", "adjusted_lr")
            ),
        ),
        Ablation(
            "update_rms",
            "Which update RMS? (Table 8)",
            over(
                [
                    ("AdamW", adamw),
                    *((f"{rms:g}", muon.replace(update_rms=rms)) for rms in UPDATE_RMS),
                ]
            ),
        ),
        Ablation(
            "newton_schulz",
            "Does better orthogonality help?",
            over(
                [
                    ("standard, 3 steps", muon.replace(ns_steps=3)),
                    ("standard, 5 steps", muon),
                    ("standard, 10 steps", muon.replace(ns_steps=10)),
                    ("dion", muon.replace(ns_coeffs="dion")),
                    ("polar_express", muon.replace(ns_coeffs="polar_express")),
                    ("deepseek_v4", muon.replace(ns_coeffs="deepseek_v4")),
                ]
            ),
        ),
        Ablation(
            "learning_rate",
            "How sensitive is each optimizer to the learning rate?",
            over(
                (
                    f"{run.optimizer} x{factor:g}",
                    run.replace(learning_rate=factor * run.learning_rate),
                )
                for run in both
                for factor in RATE_FACTORS
            ),
        ),
        Ablation(
            "batch",
            "How sensitive is each optimizer to the batch size, at the same rate and tokens?",
            over(
                (f"{run.optimizer} {batch}", run.replace(batch=batch))
                for run in both
                for batch in BATCHES
            ),
        ),
        Ablation(
            "routing",
            "What does it cost to give embedding or head to Muon?",
            over(
                (" and ".join(("matrices", *leaves)), muon.replace(muon_too=leaves))
                for leaves in ((), ("embed",), ("lm_head",), ("embed", "lm_head"))
            ),
        ),
        Ablation(
            "weight_decay",
            f"What does weight decay do in {OVERTRAINING}-fold over-training? (Figure 2)",
            over(
                [
                    ("adamw, 0.1", long_adamw),
                    ("adamw, 0", long_adamw.replace(weight_decay=0.0)),
                    ("muon, 0.1", long_muon),
                    ("muon, 0.01", long_muon.replace(weight_decay=0.01)),
                    ("muon, 0", long_muon.replace(weight_decay=0.0)),
                ]
            ),
        ),
        Ablation(
            "entropy",
            "How evenly do the weights use their singular directions? (Figure 4)",
            over(
                (f"{run.optimizer}, {family}", run.replace(family=family))
                for run in watched
                for family in ("dense", "moe")
            ),
        ),
        Ablation(
            "heads",
            "Is attention a matrix for all heads, for two, or for each? (GLM-5, Kimi K3: each)",
            over(
                [
                    ("all heads", heads),
                    ("groups of two", heads.replace(heads_per_group=2)),
                    ("each head", heads.replace(heads_per_group=1)),
                ],
                HEADS_SEEDS,
            ),
        ),
        Ablation(
            "each_head",
            f"And with the {SIZE} heads of {SIZE} layers?",
            over(
                [("all heads", muon), ("each head", muon.replace(heads_per_group=1))],
                HEADS_SEEDS,
            ),
        ),
    ]
    return {ablation.name: ablation for ablation in declared}
