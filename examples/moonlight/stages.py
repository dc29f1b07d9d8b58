r"""Moonlight's three stages of pre-training, and the plain cosine, as plans at any size.

    python -m examples.moonlight.stages --preset moonlight-16b-a3b
    python -m examples.moonlight.stages --preset small --total-tokens 100000000
    python -m examples.moonlight.stages --preset tiny --schedule moonlight --png schedule.png

print the published plan, in steps and tokens, that of a shorter training, and what `tiny` trains
by in the published shape. What they are, and where they come from, is said in
`schedule/stages.py`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import rich

from examples.moonlight.common.command_line import CommandLine
from examples.moonlight.schedule.plan import Plan
from examples.moonlight.schedule.stages import make_plan, plan_table
from examples.moonlight.training.args import Args, resolve
from examples.moonlight.training.plots import draw_plan


@dataclasses.dataclass(frozen=True)
class ShowArgs:
    """Prints the plan that a training would follow."""

    preset: Literal["tiny", "mini", "small", "moonlight-16b-a3b"] = "moonlight-16b-a3b"
    """Architecture, with its recipe."""
    schedule: Literal["cosine", "moonlight"] | None = None
    """Shape of the plan; left out, the preset's."""
    total_tokens: int | None = None
    """Tokens in all; left out, the preset's."""
    png: Path | None = None
    """Where to draw it, too."""


def show(args: ShowArgs) -> Plan:
    """Prints a plan, and draws it if asked to."""
    asked = Args(
        output_dir=Path(),
        preset=args.preset,
        schedule=args.schedule,
        total_tokens=args.total_tokens,
    )
    recipe = resolve(asked)
    plan = make_plan(recipe, bias_rate=asked.bias_rate)
    rich.print(plan_table(plan, recipe))
    if args.png is not None:
        draw_plan(args.png, plan, title=f"Moonlight {args.preset}, {recipe.schedule} schedule")
        rich.print(f"drawn in {args.png}")
    return plan


COMMAND_LINE = CommandLine("examples.moonlight.stages", ShowArgs, __doc__)


def main() -> None:
    """The program."""
    COMMAND_LINE.run(show)


if __name__ == "__main__":
    main()
