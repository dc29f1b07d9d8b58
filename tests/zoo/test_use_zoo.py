"""The zoo's models as programs: `by_use` reads every leaf as it should, or asks."""

import dataclasses

import pytest

from tests.compiled_once import unchecked_shapes
from tests.zoo import entries
from tests.zoo.built.blocks import Built, Part, cross_entropy
from tests.zoo.checker import counts
from tests.zoo.table import PAGE
from tests.zoo.use_checker import all_built, built_part, outcomes_of, read_use, use_outcomes
from tests.zoo.use_table import HEADING, section, totals

__all__ = ["unchecked_shapes"]  # Reading programs calls many small functions.
DOCS = PAGE.parent / "routing.md"


@pytest.mark.parametrize("name", all_built())
def test_no_leaf_is_read_wrongly(name):
    wrong = [path for path, outcome in outcomes_of(name).items() if outcome == "wrong"]
    assert not wrong


def test_the_page_says_what_was_read():
    results = {name: counts(outcomes_of(name)) for name in all_built()}
    _, heading, rest = PAGE.read_text().partition(HEADING)
    assert heading + rest == section(entries.families(), results), "run: python -m tests.zoo.table"
    right, otherwise, asks, wrong = totals(results)
    said = (
        f"{len(results)} of its models as programs: of {right + otherwise + asks + wrong} leaves "
        f"{right} are read as the zoo has them, {otherwise} otherwise, as they should, {asks} are "
        "asked for, and none is wrong"
    )
    assert said in " ".join(DOCS.read_text().split())


def test_as_wide_as_it_says():
    assert len(all_built()) >= 55
    assert {name.split("_")[0] for name in all_built()} >= {"hk", "eqx", "flax", "bonsai", "t5x"}


# --- The checker itself ---------------------------------------------------------------------------

ENTRY = entries.read_family(
    "case",
    "title: a case\nkind: case\nlibrary: none\nsource: none\n\n"
    "embed 9x4 adam\nlayers/{0..5}/w 4x4 muon 0>1\nlayers/{0..5}/out 4x4 muon 1>0\nhead 4x9 adam",
)


def case_loss(p, ids):
    x = p["embed"][ids]
    for layer in (p / "layers").many():
        x = (x @ layer["w"]) @ layer["out"].T
    return cross_entropy(x @ p["head"], ids)


def case(verdicts, **options):
    """The outcomes with other verdicts for some leaves."""
    leaves = dict(ENTRY.leaves)
    for path, words in verdicts.items():
        leaves[path] = (leaves[path][0], entries.read_verdict(words.split(), path))
    model = Built(case_loss, **options)
    part = built_part(dataclasses.replace(ENTRY, leaves=leaves), model)
    return use_outcomes(part, model, read_use(part, model))


def test_the_checker_counts_the_layers_that_were_built():
    assert case({}) == dict.fromkeys(case({}), "right")
    assert len(case({})) == 10
    assert len(case({}, depth=None)) == 14


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("layers/0/w", "muon 1>0"),
        ("layers/0/w", "adam"),
        ("layers/1/out", "muon 0>1"),
        ("head", "muon 0>1"),
        ("embed", "muon 0>1"),
    ],
)
def test_the_checker_rejects_other_verdicts(path, words):
    assert case({path: words})[path] == "wrong"
    right = " ".join(line.split(" ", 2)[2] for line in LINES if line.split()[0] == path)
    assert case({path: words}, otherwise={f"^{path}$": right})[path] == "otherwise"
    assert case({path: words}, otherwise={f"^{path}$": words})[path] == "wrong"


LINES = ["embed 9x4 adam", "layers/0/w 4x4 muon 0>1", "layers/1/out 4x4 muon 1>0", "head 4x9 adam"]


def test_the_checker_rejects_what_is_not_the_entry():
    model = Built(case_loss, params={"embed": None})
    roles = read_use(ENTRY, Built(lambda p, ids: case_loss(Part(p.leaves), ids)))
    part = built_part(ENTRY, model._replace(params=None))
    with pytest.raises(ValueError, match="other leaves than its entry"):
        use_outcomes(part, model, roles)


def test_the_checker_counts_what_was_asked():
    def loss(p, ids):
        return case_loss(Part({**p.leaves, "layers/0/w": p["layers/0/w"] + p["layers/0/w"].T}), ids)

    model = Built(loss)
    part = built_part(ENTRY, model)
    outcomes = use_outcomes(part, model, read_use(part, model))
    assert [path for path, outcome in outcomes.items() if outcome == "asks"] == ["layers/0/w"]
