"""The wait for a first step, at toy size."""

import json

import pytest

from benchmarks import first_step


@pytest.mark.one_stack
def test_a_second_process_loads_what_the_first_compiled(tmp_path, capsys):
    output = tmp_path / "first_step.json"
    args = first_step.Args(cases=("a",), peers=("muon_jax",), repeats=1, scale=8, output=output)
    (row,) = first_step.main(args)
    assert json.loads(output.read_text())["rows"] == [row]
    # Measured 0.30: a toy traces as long as it loads.
    assert 0 < row["loaded"]["processor"] < row["new"]["processor"]
    assert "muon_jax" in capsys.readouterr().out


def test_unknown_names_are_refused(tmp_path):
    for asked in ({"cases": ("z",)}, {"peers": ("torch",)}):
        with pytest.raises(ValueError, match="unknown: "):
            first_step.main(first_step.Args(output=tmp_path / "none.json", **asked))


def test_a_process_that_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"a, muon_jax: .*ZeroDivisionError"):
        first_step.in_a_process("a", "muon_jax", 0, tmp_path)
