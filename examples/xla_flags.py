"""Which of XLA's flags the installed jaxlib knows.

XLA ends a process whose `XLA_FLAGS` has a flag that it does not know, at the first use of a device
and below Python: nothing can be caught, and where output is captured, as by pytest, not a word is
seen. Flags come and go with every version, and there is no list to ask for, so they are tried in a
process that may die of them.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence


def known_flags(flags: Sequence[str]) -> list[str]:
    """Those that the installed jaxlib accepts, in their order.

    Takes a second if it accepts them all, and a second for each flag otherwise.

    Args:
        flags: The flags as `XLA_FLAGS` has them: `--name=value`.

    Raises:
        RuntimeError: JAX does not start without any flag either.
    """
    if not _complaint(flags):
        return list(flags)
    if complaint := _complaint([]):
        raise RuntimeError(f"JAX does not start on this machine's CPU: {complaint}")
    return [flag for flag in flags if not _complaint([flag])]


def check_flags(text: str) -> None:
    """Raises ValueError if the installed jaxlib would end a process with these `XLA_FLAGS`."""
    flags = text.split()
    unknown = sorted(set(flags) - set(known_flags(flags)))
    if unknown:
        version = importlib.metadata.version("jaxlib")
        raise ValueError(
            f"XLA_FLAGS has {', '.join(unknown)}, which jaxlib {version} does not accept and ends "
            "every process for: take it out (flags come and go with jaxlib's versions)"
        )


def _complaint(flags: Sequence[str]) -> str:
    """What a process with these flags says at its end; nothing if all is well."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode == 0:
        return ""
    return ended.stderr.strip() or f"it ended with code {ended.returncode} and without a word"
