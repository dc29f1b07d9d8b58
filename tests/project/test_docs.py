"""What the pages and docstrings name is there, and what the README shows is so."""

import ast
import functools
import json
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import muon_jax
from benchmarks.mutants.mutations import MUTANTS
from examples import minimal

ROOT = Path(__file__).parents[2]
FOLDERS = ("muon_jax", "examples", "benchmarks", "tests", "docs", ".ci")
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
]
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()

# Named by us and made by a run, or by others: what is in no clone.
ELSEWHERE = {
    *("results.json", "metrics.jsonl", "loss.png", "stability.png", "seal.json", "damaged/"),
    *("site/", "tensorboard/", "tokenizer.json", "tokenizer_config.json", "config.json"),
    *("generation_config.json", "args.json", "adapter_config.json"),
    *("tokens.json", "unfinished.json"),
}
NAMES_A_FILE = re.compile(r"[\w./-]*\w\.(py|md|ipynb|json|jsonl|png|toml|txt)|[\w./-]+/")
OURS = re.compile(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]+")


@functools.cache
def texts() -> list[tuple[Path, str]]:
    """Every page, and every comment and string of the sources, with the file that it is in."""
    written = [(path, path.read_text()) for path in PAGES]
    for path in sorted((ROOT / "examples/colab").glob("*.ipynb")):
        written += [(path, "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]
    for path in SOURCES:
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type in (tokenize.COMMENT, tokenize.STRING):
                    written.append((path, token.string))
    return written


@functools.cache
def paths() -> set[str]:
    """Files and folders of ours from the root, with and without each folder that leads there."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    names = set(FOLDERS)
    for path in files:
        parts = path.relative_to(ROOT).parts
        names |= {"/".join(parts[start:]) for start in range(len(parts))}
    return names


def quoted() -> Iterator[tuple[str, str]]:
    """(file, name): what stands in back-ticks and reads like a file or a folder."""
    for path, text in texts():
        for name in re.findall(r"`([^`\s]+)`", text):
            if NAMES_A_FILE.fullmatch(name) or OURS.fullmatch(name):
                yield str(path.relative_to(ROOT)), name


def test_files_and_folders_in_back_ticks_are_there():
    gone = {
        (where, name)
        for where, name in quoted()
        if name.rstrip("/") not in paths() and name not in ELSEWHERE
    }
    assert not gone


def test_what_is_elsewhere_is_still_named():
    assert {name for _, name in quoted()} >= ELSEWHERE


def test_private_modules_in_back_ticks_are_there():
    outside = re.compile(r"(?<![`\w])_[a-z]\w+(?!`)\b")  # functions, say, of the same module
    known = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}
    known |= {name for path in SOURCES for name in outside.findall(path.read_text())}
    gone = {
        (str(path.relative_to(ROOT)), name)
        for path, text in texts()
        for name in re.findall(r"`(_[a-z]\w+)`", text)
        if name not in known
    }
    rooms = {
        (str(path.relative_to(ROOT)), f"{room}.{name}")
        for path, text in texts()
        for room, name in re.findall(r"`(_[a-z]+)\.(?!py\b)([a-z]\w+)`", text)
        if not (ROOT / "muon_jax" / room / f"{name}.py").exists()
    }
    assert not gone | rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://", link):
            target, _, heading = link.partition("#")
            there = page.parent / target if target else page
            assert there.exists(), link
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if heading else []
            assert not heading or heading in {
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings
            }, link


def test_programs_that_are_named_are_there():
    named = {
        name
        for _, text in texts()
        for name in re.findall(r"python -m ((?:muon_jax|examples|benchmarks|tests)[\w.]*\w)", text)
    }
    assert {"examples.minimal", "benchmarks.wire", "tests.xla_flags"} <= named
    for name in named:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_targets_of_make_that_are_named_are_there():
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    for page in PAGES:
        assert set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", page.read_text(), re.M)) <= {
            pair for name in targets for pair in ((name, ""), ("", name))
        }


def test_the_site_has_every_page_once():
    def pages(entries: list[dict]) -> Iterator[str]:
        for entry in entries:
            for inside in entry.values():
                yield from [inside] if isinstance(inside, str) else pages(inside)

    site = tomllib.loads((ROOT / "zensical.toml").read_text())
    assert sorted(pages(site["project"]["nav"])) == sorted(
        str(page.relative_to(ROOT)) for page in PAGES
    )


def test_every_public_name_is_on_a_page_of_the_api():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    named = re.findall(r"^(?:::: muon_jax\.|## `)(\w+)`?$", text, re.M)
    assert sorted(named) == sorted(muon_jax.__all__)


def test_code_on_pages_is_python():
    for page in PAGES:
        for block in blocks(page.read_text()):
            ast.parse(block)


def blocks(text: str) -> list[str]:
    """The Python that a page shows."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_readmes_first_lines_are_those_of_minimal():
    lines = iter(line.strip() for line in Path(minimal.__file__).read_text().splitlines())
    shown = [line.strip() for line in blocks(README)[0].splitlines() if line.strip()]
    assert len(shown) >= 7
    assert all(line in lines for line in shown), "in this order"


@pytest.fixture(scope="module", name="shown")
def _shown() -> dict:
    """What the README's code goes on from: minimal's model as it is by default."""
    model = minimal.Model(96, 64, nnx.Rngs(0))
    text = jnp.zeros((2, 65), jnp.int32)
    return {
        **vars(muon_jax),
        **vars(jax.sharding),
        "jax": jax,
        "optax": optax,
        "loss_of": minimal.loss_of,
        "model": model,
        "text": text,
        "params": nnx.state(model, nnx.Param),
        "roles": muon_jax.by_use(minimal.loss_of, model, text),
    }


def test_the_readmes_routing_is_what_is_printed(shown, capsys):
    exec(blocks(README)[1], dict(shown))
    printed = capsys.readouterr().out.splitlines()
    (table,) = re.findall(r"^```\n(path .*?)^```", README, re.M | re.S)
    assert [line for line in printed if line in table.splitlines()] == table.splitlines()


def test_the_readmes_mesh_takes_a_model(shown, capsys):
    names = dict(shown)
    exec(blocks(README)[2], names)
    assert "on the busiest device" in capsys.readouterr().out
    laid_out = [x.sharding for x in jax.tree.leaves(names["state"])]
    assert laid_out == jax.tree.leaves(names["shardings"])
    assert not all(sharding.is_fully_replicated for sharding in laid_out)


def test_the_readmes_bytes_are_those_of_the_benchmark():
    rows = json.loads((ROOT / "docs/results/wire.json").read_text())["rows"]
    sent = {
        (row["target"], row["optimizer"]): sum(row["bytes"].values()) / 1e6
        for row in rows
        if row["case"] == "separate"
    }
    shown = [line for line in README.splitlines() if re.match(r"\|.*\d\.\d \|$", line)]
    assert len(shown) == 3
    for line, optimizer in zip(shown, ("adamw", "optax muon", "muon_jax"), strict=True):
        expected = [f"{sent[target, optimizer]:.1f}" for target in ("v5e-8", "h100-8")]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == expected


def test_the_readmes_ratio_is_the_reports():
    report = (ROOT / "examples/scaling_law/REPORT.md").read_text()
    table = report.partition("<!-- table: main/ratios -->")[2].partition("<!-- end -->")[0]
    (ratio, interval) = re.findall(r"^\| 388,080 \| ([\d.]+) \(([^)]*)\)", table, re.M)[0]
    words = " ".join(README.split())
    assert f"needs {ratio} of AdamW's compute (90% interval over three seeds {interval})" in words


def test_as_many_meanings_differ_from_optax_as_is_said():
    differences = re.findall(r"^ *(\d)\. ", str(muon_jax.muon.__doc__), re.M)
    assert differences == [*"123456"]
    for text in (README, (ROOT / "CHANGELOG.md").read_text(), str(muon_jax.muon.__doc__)):
        assert re.search(r"\bsix\s+(meanings\s+differ|differences)", text)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_contributing_counts_the_mutations():
    assert f"in {len(MUTANTS)} ways" in (ROOT / "CONTRIBUTING.md").read_text()


def test_each_sentence_about_a_field_has_a_noun():
    """What a field is comes first: "the seed of every order", not "of every order"."""
    begins = r"^ +\w+: (of|by|from|with|between|in order|those|the same)\b(?! is\b)"
    bare = {
        (str(path.relative_to(ROOT)), line.strip())
        for path in SOURCES
        if path.parts[len(ROOT.parts)] in ("muon_jax", "examples")
        for text in docstrings(path)
        for line in text.splitlines()
        if re.search(begins, line, re.I) and "Error:" not in line
    }
    assert not bare


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]
