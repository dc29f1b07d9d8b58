"""The Python on the pages runs, and prints what stands below it.

Blocks of a page run from the top down in one namespace, in an empty folder, as a reader would run
them. A block that cannot run here says so in its first line, "# Not run here: " and the reason; one
that begins with "# Needs torch." runs where torch is installed.
What a block prints is compared with the `text` block right behind it, if there is one, in which
"..." stands for what is left out. The README goes on from an example: `test_docs` runs it.
"""

import doctest
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
import pytest

from tests.project.test_docs import PAGES, ROOT

FENCE = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.M | re.S)
NOT_RUN = re.compile(r"# Not run here: \w+")
NEEDS = re.compile(r"# Needs (\w+)\.$", re.M)
ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """Python that a page shows, with the lines above it, and what the page says that it prints."""

    above: int
    code: str
    printed: str | None


def shown(text: str) -> list[Block]:
    """The blocks of a page."""
    return [Block(text.count("\n", 0, at.start()) + 1, at[1], at[2]) for at in FENCE.finditer(text)]


def is_run(block: Block) -> bool:
    """Whether nothing says that it is not, and what it needs is there."""
    needs = NEEDS.match(block.code)
    return not NOT_RUN.match(block.code) and (not needs or find_spec(needs[1]) is not None)


def run(text: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the blocks of a page; raise where one raises, or prints something else."""
    names = {"__name__": "__main__"}
    for block in filter(is_run, shown(text)):
        # The lines above are kept, so that a traceback shows the page's own.
        exec(compile("\n" * block.above + block.code, name, "exec"), names)
        printed = capsys.readouterr().out
        if block.printed is not None:
            alike = doctest.OutputChecker().check_output(block.printed, printed, ALIKE)
            assert alike, (
                f"{name}, line {block.above}: prints\n{printed}instead of\n{block.printed}"
            )


RUN = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in PAGES
    if page != ROOT / "README.md" and any(map(is_run, shown(page.read_text())))
}


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        run(RUN[name], name, capsys)


def test_no_block_is_missed():
    for page in PAGES:
        text = page.read_text()
        assert len(shown(text)) == len(re.findall(r"```py|~~~py", text)), page


def page(*blocks: str) -> str:
    kinds = (block.partition("|") for block in blocks)
    return "\n\n".join(f"```{kind}\n{code}\n```" for kind, _, code in kinds)


def test_what_is_wrong_on_a_page_is_found(capsys):
    run(page("python|x = 1", "python|print(x + 1)", "text|2", "python|print(x)"), "page", capsys)
    run(page("python|print(1, 2, 3)", "text|1 ... 3"), "page", capsys)
    run(page("python|# Not run here: there is no x\nprint(x)"), "page", capsys)
    run(page("python|# Needs no_such_module.\nprint(x)"), "page", capsys)
    with pytest.raises(NameError):
        run(page("python|print(x)"), "page", capsys)
    with pytest.raises(AssertionError, match=r"page, line 1: prints\s+1\s+instead of\s+2"):
        run(page("python|print(1)", "text|2"), "page", capsys)
