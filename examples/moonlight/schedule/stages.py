"""Moonlight's three stages of pre-training, and the plain cosine, as plans at any size.

"Muon is Scalable for LLM Training" (arXiv 2502.16982) states them in tokens:

  0 to 33B       the rate rises to 4.2e-4 in 2k steps of 2048 sequences of 8K
  33B to 5.2T    cosine to 4.2e-5; 2048 sequences until 200B, then 4096
  5.2T to 5.7T   the rate rises to 1e-4 in 100 steps, then falls linearly to 0 in 500B tokens;
                 4096 sequences of the best data; the routers' biases stay as they are

What that leaves open, and what is chosen here:

- 2,000 steps of 2048 x 8192 tokens are 33.55B: stage 1 *is* the warmup, and ends with it.
- The cosine runs over tokens, as the stage's ends do. Over steps, the first 3% of the tokens, in
  half as large batches, would take 6% of it.
- The second rise begins where the cosine ended, at 4.2e-5.
- "In 500B tokens" counts its 100 steps (3.4B): the rate is 0 at 5.7T.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table

from examples.moonlight.schedule.outline import Outline, Ramp, Stage
from examples.moonlight.schedule.plan import Plan
from examples.moonlight.schedule.recipe import Recipe

B, T = 10**9, 10**12

_WARMUP, _SECOND_RISE = 2_000 * 2048 * 8192, 100 * 4096 * 8192

MOONLIGHT = Outline(
    stages=(
        Stage("warmup", _WARMUP, _WARMUP, 4.2e-4, 4.2e-4, "linear", bias_rate=1e-3),
        Stage("decay", 5_200 * B, 0, 4.2e-4, 4.2e-5, "cosine", bias_rate=1e-3),
        Stage("cooldown", 5_700 * B, _SECOND_RISE, 1e-4, 0.0, "linear", bias_rate=0.0),
    ),
    ramp=(Ramp(200 * B, 2048), Ramp(5_700 * B, 4096)),
    sequence_length=8192,
)

# One stage, as of most experiments: 5% of linear warmup, then a cosine to a tenth of the peak, as
# Moonlight's long stage ends (4.2e-4 to 4.2e-5).
COSINE = Outline(
    stages=(Stage("training", T, T // 20, 1.0, 0.1, "cosine", bias_rate=1e-3),),
    ramp=(Ramp(T, 1),),
    sequence_length=1,
)

OUTLINES = {"cosine": COSINE, "moonlight": MOONLIGHT}


def make_plan(
    recipe: Recipe, *, bias_rate: float, mixes: Sequence[Mapping[str, float]] = ()
) -> Plan:
    """The schedule of a run, step by step.

    Args:
        recipe: What the run trains with.
        bias_rate: Step of the router biases; where a stage holds them still, it is 0 all the same.
        mixes: Weights of the data's sources: of all stages, or of each; none: by their sizes.

    Raises:
        ValueError: There are not as many mixes as stages; or `Outline.plan` refuses.
    """
    outline = OUTLINES[recipe.schedule].scaled(
        recipe.total_tokens,
        sequence_length=recipe.sequence_length,
        max_batch=recipe.batch_size * recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        bias_rate=bias_rate,
        warmup_steps=recipe.warmup_steps,
    )
    stages = outline.stages
    if len(mixes) not in (0, 1, len(stages)):
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(
            f"--mix was given {len(mixes)} times; give it once, for all stages, or once for each "
            f"of {names}"
        )
    if mixes:
        mixes = list(mixes) * len(stages) if len(mixes) == 1 else mixes
        stages = [dataclasses.replace(s, mix=mix) for s, mix in zip(stages, mixes, strict=True)]
    plan = dataclasses.replace(outline, stages=tuple(stages)).plan()
    return plan if recipe.cooldown_at is None else plan.cooled_down_at(recipe.cooldown_at)


def plan_table(plan: Plan, recipe: Recipe) -> Table:
    """A row for every segment; rates are those of its first and its last step."""
    title = f"{plan.steps:,} steps, {plan.tokens(plan.steps):,} tokens"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    names = sorted({name for segment in plan.segments for name in segment.mix})
    columns = ("stage", "to step", "to tokens", "batch", "learning rate", "", "bias")
    for column in columns + ("mix",) * bool(names):
        words = column in ("stage", "", "mix")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    rates = plan.rates(np.array([*itertools.pairwise(plan.starts)]) - [0, 1])
    for start, segment, (first, last) in zip(plan.starts, plan.segments, rates, strict=False):
        end = start + segment.steps
        weights = " : ".join(f"{segment.mix.get(name, 0):g}" for name in names)
        table.add_row(
            segment.stage,
            f"{end:,}",
            _tokens(plan.tokens(end)),
            f"{segment.batch // recipe.batch_size:,} x {recipe.batch_size}",
            f"{first:.1e} - {last:.1e}",
            segment.curve.shape,
            f"{segment.bias_rate:g}",
            *([weights] if names else []),
        )
    table.caption = f"batch: micro-batches x sequences of {plan.sequence_length:,} tokens"
    if names:
        table.caption += f"; mix: {' : '.join(names)}"
    return table


def _tokens(count: int) -> str:
    for unit, size in (("T", T), ("B", B), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)
