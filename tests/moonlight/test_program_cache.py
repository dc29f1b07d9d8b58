"""Compiled programs are kept where the user says, and a broken folder ends nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from examples.moonlight.common import program_cache
from examples.moonlight.common.program_cache import VARIABLE, cache_folder, keep_programs

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")

PROGRAM = """
from examples.moonlight.common.program import run_program
def main():
    import jax, jax.numpy as jnp
    print(jax.jit(lambda x: jnp.sin(x) + 1)(0.0))
run_program(main)
"""


@pytest.fixture(name="home")
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache folder; nothing has decided on another one."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(program_cache.warnings, "showwarning", print)
    jax.config.update(OPTIONS[0], None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def start(home: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a program, as a user with this cache folder."""
    variables = {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    kept = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True)


def test_programs_are_kept_and_a_damaged_file_is_made_anew(home: Path):
    first = start(home)
    kept = sorted(cache_folder().glob("*-cache"))
    assert (first.stdout, first.stderr) == ("1.0\n", "") and kept
    whole = kept[0].read_bytes()
    kept[0].write_bytes(whole[: len(whole) // 2])
    damaged = start(home)
    assert damaged.stdout == "1.0\n"
    assert damaged.stderr.count("\n") == 1 and "is emptied" in damaged.stderr
    assert sorted(cache_folder().glob("*-cache")) == kept
    assert start(home).stderr == ""


def test_a_folder_that_cannot_be_made_costs_a_line(home: Path, capsys):
    (home / "muon_jax").write_text("in the way")
    keep_programs()
    assert "compiled anew at each start" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None  # pyright: ignore


def test_the_environment_decides(home: Path, monkeypatch):
    for value in ("", str(home / "elsewhere")):
        monkeypatch.setenv(VARIABLE, value)
        keep_programs()
        # JAX reads the variable by itself, when it is imported.
        assert jax.config.jax_compilation_cache_dir is None  # pyright: ignore
    assert not [*home.iterdir()]


def test_what_the_calling_program_chose_stays(home: Path):
    jax.config.update(OPTIONS[0], str(home / "chosen"))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(home / "chosen")  # pyright: ignore


def test_a_folder_is_the_users_own_and_does_not_grow_for_ever(home: Path, monkeypatch):
    monkeypatch.setattr(program_cache, "MOST_BYTES", 25)
    folder = cache_folder()
    assert folder.is_relative_to(home)
    folder.mkdir(parents=True)
    for age, name in enumerate(("newest", "newer", "old", "oldest")):
        (folder / name).write_bytes(b"0123456789")
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    keep_programs()
    assert {path.name for path in folder.iterdir()} == {"newest", "newer"}
    assert jax.config.jax_compilation_cache_dir == str(folder)  # pyright: ignore
