"""The part of the zoo's page that says what `by_use` reads of the models that are built."""

from collections.abc import Mapping

from tests.zoo.entries import Family
from tests.zoo.use_checker import OUTCOMES

HEADING = "\n## Read from their programs\n"

_TOP = """
{built} of the models stand as programs in [`tests/zoo/built`](../tests/zoo/built/__init__.py), most
in a few lines of JAX on the entry's own leaves, some of Flax's, Haiku's and Equinox's own layers.
`by_use` reads a loss of each, and a test holds every leaf against the entry's verdict. Where layers
in a numbered list are alike the first four are built, and counted.

- **right**: as above; `[out, in]` weights are not exchanged.
- **otherwise**: the program says another role than the verdict by names, as it should. What comes
  last before the loss (CLIP's projections, the outputs of diffusion models and autoencoders) is the
  head and goes to AdamW, and a convolution of a single input channel is a matrix if it is not
  depthwise.
- **asks**: `by_use` raises, with the line to write.
- **wrong**: none, or the test fails.

| model | library | leaves | right | otherwise | asks | wrong |
|---|---|--:|--:|--:|--:|--:|
"""

NOT_BUILT = """
Not built: {names}.
"""


def section(families: list[Family], results: Mapping[str, Mapping[str, int]]) -> str:
    """The section, of the number of leaves of each outcome, for each model that is built."""
    order = sorted(families, key=lambda family: (family.kind, family.library, family.title))
    rows = []
    for family in order:
        if family.name in results:
            counts = [results[family.name].get(outcome, 0) for outcome in OUTCOMES]
            cells = [family.title, family.library, sum(counts), *counts]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    total = totals(results)
    rows.append(f"| **{len(results)} models** | | {' | '.join(map(str, (sum(total), *total)))} |")
    missing = "; ".join(family.title for family in order if family.name not in results)
    top = _TOP.format(built=len(results))
    return HEADING + top + "\n".join(rows) + "\n" + NOT_BUILT.format(names=missing)


def totals(results: Mapping[str, Mapping[str, int]]) -> list[int]:
    """The number of leaves of each outcome, over all models."""
    return [sum(result.get(outcome, 0) for result in results.values()) for outcome in OUTCOMES]
