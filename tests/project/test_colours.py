"""One colour code for all pictures, in one module, where each colour has one meaning."""

import re

from examples import colours
from tests.project.test_docs import ROOT

_COLOUR = re.compile(r"""["'](tab:\w+|#[0-9a-fA-F]{6}|C\d|0\.\d+|black|k|r|b|g)["']""")


def test_pictures_take_their_colours_from_one_module():
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "matplotlib" in (source := path.read_text()) and path.name != "colours.py"
        for line in source.splitlines()
        if _COLOUR.search(line)
    }
    assert not found


def test_no_two_things_have_one_colour():
    meanings = [
        *{*colours.OPTIMIZERS.values()},
        *(colours.TRAINING, colours.VALIDATION),
        *(colours.ATTENTION, colours.EXPERTS, colours.DENSE, colours.EMBEDDINGS),
        *colours.PRECONDITIONINGS.values(),
    ]
    assert len({*meanings}) == len(meanings) == 14
