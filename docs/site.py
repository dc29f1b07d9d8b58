"""Builds the documentation site into `site/`, and ends with 1 where anything is amiss.

    python docs/site.py

A page lies where GitHub shows it, and a link leads to the same place there and on the site. So the
site is made of a copy of the repository, as far as pages show it; in the repository itself Zensical
would read environments too.

Its strict build fails on links to pages and headings that are not there. What it lets pass fails
here: what griffe finds wrong in a docstring, and links to files that were not copied.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build/pages"
SITE = ROOT / "site"
FOLDERS = ("docs", "examples", "muon_jax", "tests/zoo")
COLOURS = re.compile(r"\x1b\[[\d;]*m")


def copy_pages() -> None:
    """Copies what pages show and lead to, each file to its place in the repository."""
    for made in (COPY, SITE):
        shutil.rmtree(made, ignore_errors=True)
    for folder in FOLDERS:
        no_page = shutil.ignore_patterns("__pycache__", "*.jsonl.lock")
        shutil.copytree(ROOT / folder, COPY / folder, ignore=no_page)
    for file in (*ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(file, COPY)


class Addresses(HTMLParser):
    """Collects where a page leads, and what a browser fetches to show it."""

    def __init__(self):
        super().__init__()
        self.leads: set[str] = set()
        self.fetches: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the addresses of one element."""
        found = {name: value for name, value in attrs if value is not None}
        if tag in ("a", "link") and "href" in found:
            self.leads.add(found["href"])
        if tag in ("img", "script", "iframe") and "src" in found:
            self.fetches.add(found["src"])
        if tag == "link" and "stylesheet" in found.get("rel", ""):
            self.fetches.add(found["href"])


def wrong_addresses() -> Iterator[str]:
    """Addresses that lead to no file, and those that a browser would fetch from elsewhere."""
    for page in sorted(SITE.rglob("*.html")):
        addresses = Addresses()
        addresses.feed(page.read_text(encoding="utf-8"))
        name = page.relative_to(SITE)
        for address in sorted(addresses.leads | addresses.fetches):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in addresses.fetches:
                    yield f"{name} fetches {address}"
            elif parts.path and name.name != "404.html":  # which is served at any depth
                there = page.parent / unquote(parts.path)
                if not (there / "index.html" if there.is_dir() else there).is_file():
                    yield f"{name} leads to {address}, which is no file of the site"


def main() -> int:
    """Builds the site, prints what is wrong, and returns the exit status."""
    copy_pages()
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    printed = COLOURS.sub("", built.stdout + built.stderr.partition("Traceback")[0])
    print(printed, end="")
    if built.returncode:
        return 1
    wrong = [line for line in printed.splitlines() if line.startswith("griffe:")]
    wrong += wrong_addresses()
    print("\n".join(wrong or ["every link leads to a file"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
