"""The programs that pages start read their arguments, up to where work would begin."""

import inspect
import os
import re
import runpy
import shlex
import sys

import pytest
import tyro

from examples.finetune import command_line
from tests.project.test_docs import PAGES

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"python -m (examples[\w.]+)(.*)")


class Understood(BaseException):
    """Ends a program that has read its arguments; no error, which a program would print."""


def commands(text: str) -> list[tuple[str, ...]]:
    """The programs of the examples that a page starts, each with its arguments."""
    return [
        (found[1], *shlex.split(found[2]))
        for kind, block in FENCE.findall(text)
        if kind in ("", "sh", "bash", "console")
        for line in re.sub(r"\\\n|(^|\s)#.*", " ", block).splitlines()
        if (found := COMMAND.search(line))
    ]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


@pytest.fixture(autouse=True)
def _read_only(monkeypatch: pytest.MonkeyPatch):
    """Programs stop once their arguments are read, and leave the environment as it was."""
    read = tyro.cli

    def cli(program, *arguments, **keywords):
        if inspect.isclass(program):  # a function would be called
            read(program, *arguments, **keywords)
        raise Understood

    def parse(*arguments, read=command_line.parse, **keywords):
        read(*arguments, **keywords)
        raise Understood

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(command_line, "parse", parse)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def start(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module, *words = command
    monkeypatch.setattr(sys, "argv", [module, *words])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_on_a_page_is_understood(command, monkeypatch):
    with pytest.raises(Understood):
        start(command, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("program", ["examples.moonlight.train", "examples.finetune.sft"])
def test_a_wrong_flag_is_not(program, monkeypatch):
    with pytest.raises(SystemExit):
        start((program, "--no-such-flag", "1"), monkeypatch)


def test_commands_are_found():
    page = (
        "```\nmake x\nA=1 .venv/bin/python -m examples.minimal --x 'c d' e#5 \\\n  --y  # e\n```\n"
    )
    assert commands(page) == [("examples.minimal", "--x", "c d", "e#5", "--y")]
    assert len(COMMANDS) > 15
