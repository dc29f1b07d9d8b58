"""The zoo's table in the docs: `python -m tests.zoo.table` writes docs/routing_zoo.md."""

import pathlib

from tests.zoo.checker import counts, outcomes, patterns_of, read
from tests.zoo.entries import Family, families
from tests.zoo.use_checker import all_built, outcomes_of
from tests.zoo.use_table import section

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "routing_zoo.md"

_TOP = """\
# The zoo: where the leaves of published models go

Names, shapes and the right verdict of every leaf of {models} models lie in
`tests/zoo/families`, each with its source; a test holds the library's
verdict by names and shapes against them, leaf by leaf. What `by_use` reads of their losses
[stands below](#read-from-their-programs). This page is what `python -m tests.zoo.table` makes of
them.
They are published, but for a few made up of a library's layers or names: their sources say so.

- **right**: the group is right, and for Muon the reduced and the output axes.
- **exchanged**: the matrices are right, and fan-in is taken for fan-out: `[out, in]` weights of
  PyTorch and Equinox. The default scale, of `max(fan_in, fan_out)`, is the same for both.
- **asks**: names and shapes leave it open, so the library raises; what it says to write, pasted,
  gives the right verdict. Patterns are the rules that it says to write for all of these leaves.
- **warned**: taken for a matrix, which it is not; `init` says that it looks like a table, and what
  to write.
- **wrong**: none, or the test fails.

| model | kind | library | leaves | right | exchanged | asks | patterns | warned | wrong |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|
"""


def page(
    all_families: list[Family], results: dict[str, dict[str, int]], rules: dict[str, int]
) -> str:
    """The page, of each family's counts of outcomes and number of rules."""
    columns, loud = ("right", "exchanged", "asks"), ("warned", "wrong")
    order = sorted(all_families, key=lambda family: (family.kind, family.library, family.title))
    rows = []
    for family in order:
        result = results[family.name]
        numbers = [len(family.leaves), *(result.get(column, 0) for column in columns)]
        numbers += [rules[family.name], *(result.get(column, 0) for column in loud)]
        cells = [f"[{family.title}](../tests/zoo/families/{family.name}.txt)"]
        cells += [family.kind, family.library, *map(str, numbers)]
        rows.append(f"| {' | '.join(cells)} |")
    total = [sum(len(family.leaves) for family in order)]
    total += [sum(result.get(column, 0) for result in results.values()) for column in columns]
    total += [sum(rules.values())]
    total += [sum(result.get(column, 0) for result in results.values()) for column in loud]
    rows.append(f"| **{len(order)} models** | | | {' | '.join(map(str, total))} |")
    sources = [f"- {family.title} ({family.library}): {family.source}" for family in order]
    return (
        _TOP.format(models=len(order))
        + "\n".join(rows)
        + "\n\n## Sources\n\n"
        + "\n".join(sources)
        + "\n"
    )


if __name__ == "__main__":
    everything = families()
    read_all = {family.name: read(family) for family in everything}
    by_names = page(
        everything,
        {family.name: counts(outcomes(family, read_all[family.name])) for family in everything},
        {name: len(patterns_of(result[2] or "")) for name, result in read_all.items()},
    )
    by_use = {name: counts(outcomes_of(name)) for name in all_built()}
    PAGE.write_text(by_names + section(everything, by_use))
