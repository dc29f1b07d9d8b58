"""Flags are asked of the installed jaxlib: a wrong one would end the process without a word."""

import os
import subprocess
import sys

import pytest

from examples import xla_flags as asking
from examples.one_thread import one_thread_environment
from tests import xla_flags


def test_known_flags_are_told_from_others():
    flags = ["--xla_backend_optimization_level=0", "--xla_no_such_flag=1"]
    assert asking.known_flags(flags) == flags[:1]


def test_what_this_suite_wants_begins_with_what_every_jaxlib_knows():
    asking.check_flags(f"{xla_flags.WANTED[0]} {one_thread_environment()['XLA_FLAGS']}")


def test_pytest_says_which_flag_it_is():
    environment = os.environ | {"XLA_FLAGS": "--xla_no_such_flag=1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "--co",
        "-q",
        "tests/project/test_imports.py",
    ]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 4
    assert "XLA_FLAGS has --xla_no_such_flag=1, which jaxlib" in ended.stderr + ended.stdout


def test_a_jax_that_does_not_start_is_not_blamed_on_flags(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asking, "_complaint", lambda flags: "no such module")
    with pytest.raises(RuntimeError, match="does not start on this machine's CPU: no such module"):
        asking.known_flags(["--xla_backend_optimization_level=0"])
