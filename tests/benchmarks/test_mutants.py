"""The mutations of `benchmarks.mutants` are those of today's library."""

import pytest

from benchmarks.mutants.mutations import MUTANTS, ROOT, fits


@pytest.mark.parametrize("name", MUTANTS)
def test_every_patch_still_fits_in_one_place(name):
    mutant = MUTANTS[name]
    assert fits(mutant), f"{name}: muon_jax/{mutant.file} holds its text not exactly once"
    assert mutant.old != mutant.new
    assert (ROOT / mutant.tests.split()[0]).is_file()


def test_there_are_enough_of_them():
    assert len(MUTANTS) >= 31
