"""The zoo: every leaf of its entries goes where it should, or is asked for with the remedy."""

import dataclasses
import functools

import pytest

from muon_jax import MuonDimensionNumbers, routing_report
from muon_jax._matrices import leaf_views
from muon_jax._routes import Route
from tests.zoo import entries
from tests.zoo.cases import CASES
from tests.zoo.checker import counts, outcome, outcomes, params_of, patterns_of, read
from tests.zoo.table import PAGE, page
from tests.zoo.use_table import HEADING

FAMILIES = {family.name: family for family in entries.families()}
KINDS = {"language", "vision", "speech", "diffusion", "mixture of experts", "state space"}
HEAD = "title: a case\nkind: case\nlibrary: none\nsource: none\n\n"


def case(lines):
    return entries.read_family("case", HEAD + lines)


@functools.cache
def read_of(name):
    return read(FAMILIES[name])


@functools.cache
def outcomes_of(name):
    return outcomes(FAMILIES[name], read_of(name))


def described(family, result):
    alone, behind, _ = result
    wrong = [path for path, text in outcomes(family, result).items() if text == "wrong"]
    said = [
        f"{path} {family.leaves[path]}: {alone[path].reason if path in alone else 'asks'}, "
        f"{behind[path].spec}"
        for path in wrong[:8]
    ]
    return "\n".join([f"{len(wrong)} of {family.name}:", *said]) if wrong else ""


@pytest.mark.parametrize("name", FAMILIES)
def test_no_leaf_of_the_zoo_is_wrong(name):
    assert not described(FAMILIES[name], read_of(name))


@pytest.mark.parametrize("lines", [lines for lines, _ in CASES])
def test_what_was_once_wrong_is_right_or_asked_for(lines):
    family = case(lines)
    assert not described(family, read(family))


@pytest.mark.parametrize(("lines", "wrong"), CASES)
def test_the_checker_rejects_what_was_once_wrong(lines, wrong):
    family = case(lines)
    path, (shape, verdict) = next(iter(family.leaves.items()))
    right = route_of(path, shape, verdict)
    bad = route_of(path, shape, entries.read_verdict(wrong.split(), "case"))
    assert outcome(verdict, bad, bad) == "wrong"
    assert outcome(verdict, None, bad) == "wrong"
    good = outcome(verdict, None if verdict.asks else right, right)
    assert good == ("asks" if verdict.asks else "right")


def route_of(path, shape, verdict):
    if verdict.axes is None:
        return Route((path,), shape, "made up")
    spec = MuonDimensionNumbers(*verdict.axes)
    return Route((path,), shape, "made up", spec, leaf_views(shape, spec, path))


def test_the_checker_rejects_an_exchange_and_a_question_that_were_not_said():
    verdict = entries.read_verdict(["muon", "1>0"], "case")
    other = route_of("w", (4, 8), entries.read_verdict(["muon", "0>1"], "case"))
    assert outcome(verdict, other, other) == "wrong"
    assert outcome(dataclasses.replace(verdict, exchanged=True), other, other) == "exchanged"
    assert outcome(verdict, None, route_of("w", (4, 8), verdict)) == "wrong"


def test_the_zoo_is_as_wide_as_it_says():
    assert len(FAMILIES) >= 40
    assert {family.kind for family in FAMILIES.values()} >= KINDS
    assert all(family.source for family in FAMILIES.values())
    libraries = " ".join(family.library for family in FAMILIES.values())
    for library in ("Flax", "Equinox", "Haiku", "MaxText", "t5x", "Levanter", "EasyLM", "bonsai"):
        assert library in libraries


@pytest.mark.parametrize("name", ["gemma_2b", "maxtext_llama2_scanned", "alphafold"])
def test_the_remedy_of_separate_heads_is_enough(name):
    """Pasted, it answers all that was asked, and heads become a batch."""
    family, joint = FAMILIES[name], read_of(name)[1]
    routes = read(family, "per_head")[1]
    assert len(routes) == len(family.leaves)
    heads = [path for path in routes if routes[path].spec != joint[path].spec]
    batches = [
        (routes[path].views[0].matrices[0], joint[path].views[0].matrices[0]) for path in heads
    ]
    assert all(each >= whole for each, whole in batches)  # Gemma 2B has one head of keys
    assert any(each > whole for each, whole in batches)


def test_a_few_patterns_cover_many_leaves():
    for name in FAMILIES:
        if message := read_of(name)[2]:
            asked = sum(result == "asks" for result in outcomes_of(name).values())
            assert len(patterns_of(message)) <= min(6, asked)


def test_the_page_is_what_the_zoo_says():
    results = {name: counts(outcomes_of(name)) for name in FAMILIES}
    rules = {name: len(patterns_of(read_of(name)[2] or "")) for name in FAMILIES}
    by_names, _, _ = PAGE.read_text().partition(HEADING)
    assert by_names == page(list(FAMILIES.values()), results, rules), (
        "run: python -m tests.zoo.table"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("w 2x2 adam\nw 2x2 adam", "there twice"),
        ("w 2x2 muon", "expected a verdict"),
        ("w 2x2 muon 0", "expected a verdict"),
    ],
)
def test_bad_entries_raise(text, why):
    with pytest.raises(ValueError, match=why):
        case(text)


def test_an_entry_is_a_tree_that_the_report_takes():
    family = FAMILIES["flax_lm1b"]
    report = routing_report(params_of(family))
    assert len(report.rows) == len(family.leaves)
    assert "logitdense" in str(report)
