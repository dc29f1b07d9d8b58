"""The wait for a first step, at toy size."""

import json

import pytest

from benchmarks import first_step


@pytest.mark.one_stack
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    output = tmp_path / "first_step.json"
    args = first_step.Args(cases=("a",), peers=("muon_jax",), repeats=1, scale=8, output=output)
    (row,) = first_step.main(args)
    assert json.loads(output.read_text())["rows"] == [row]
    assert min(row[kind][clock] for kind in ("new", "loaded") for clock in row[kind]) > 0
    assert "muon_jax" in capsys.readouterr().out


@pytest.mark.one_stack
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    """It finds all of its programs: nothing is compiled and added."""
    kept = []
    for _ in range(2):
        first_step.in_a_process("a", "muon_jax", 8, tmp_path)
        kept.append({path.name for path in tmp_path.iterdir()})
    assert kept[0] and kept[0] == kept[1]


def test_unknown_names_are_refused(tmp_path):
    for asked in ({"cases": ("z",)}, {"peers": ("torch",)}):
        with pytest.raises(ValueError, match="unknown: "):
            first_step.main(first_step.Args(output=tmp_path / "none.json", **asked))


def test_a_process_that_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"a, muon_jax: .*ZeroDivisionError"):
        first_step.in_a_process("a", "muon_jax", 0, tmp_path)
