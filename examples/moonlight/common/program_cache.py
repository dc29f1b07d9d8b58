"""Compiled programs, kept from one start of a program to the next.

JAX has such a cache, and it is off by default. The programs here turn it on, in the user's cache
folder. `JAX_COMPILATION_CACHE_DIR` names another folder; empty, it turns the cache off. Nothing
that happens to the folder ends a program: then programs are compiled, as without it.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# A training of the preset tiny needs 2 MB, one of a large model on a GPU a hundred times that.
MOST_BYTES = 2 << 30


def keep_programs() -> None:
    """Turns the cache on, unless the user's environment or the calling program has decided."""
    if VARIABLE in os.environ:
        # Empty stands for none, which JAX takes for a folder without a name in places.
        if not os.environ[VARIABLE] and not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_compilation_cache_dir", None)
        return
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = cache_folder()
        # What lies here is run: nobody else may write it.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _bound(folder, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _say(f"programs are compiled anew at each start: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Dozens of programs take less than JAX's second, and together more than the large one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    _mend(folder)


def cache_folder() -> Path:
    """The folder for this machine's programs: those for another processor would not run."""
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home else Path("~/.cache").expanduser()
    version = importlib.metadata.version("jaxlib")
    return base / "muon_jax" / "jax" / f"{version}-{_processor()}"


def _processor() -> str:
    """A short name of what the processor can do, as far as the system tells."""
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags"))})
        told += sorted({line for line in lines if line.startswith(("CPU part", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


def _bound(folder: Path, most: int) -> None:
    """Deletes the oldest files until the others together have at most so many bytes.

    JAX has a limit of its own (`jax_compilation_cache_max_size`). It keeps a second file beside
    each entry, and writes no entry any more once a process was killed between the two (0.10.2).
    """
    found = []
    for path in folder.iterdir():
        # Another process may delete it at the same time.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    size = sum(bytes_ for _, bytes_, _ in found)
    for _, bytes_, path in sorted(found):
        if size <= most:
            return
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            path.unlink()
        size -= bytes_


def _mend(folder: Path) -> None:
    """Empties the folder when a file in it cannot be read.

    A process that was killed while it wrote leaves half a file. JAX warns of it at every start, and
    never writes it anew.
    """
    usual = warnings.showwarning
    said: set[str] = set()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        text = str(message)
        if text.startswith("Error reading persistent compilation cache"):
            with contextlib.suppress(OSError):
                _bound(folder, 0)
            about = f"{folder} had a damaged file, and is emptied: programs are compiled anew"
        elif text.startswith("Error writing persistent compilation cache"):
            about = f"what was compiled cannot be kept in {folder} ({text.rpartition(': ')[2]})"
        else:
            usual(message, category, filename, lineno, file, line)
            return
        if about not in said:
            said.add(about)
            _say(about)

    warnings.showwarning = show


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
