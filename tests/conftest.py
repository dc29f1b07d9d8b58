"""One strict configuration for every test: eight CPU devices, no silent rank promotion."""

import collections
import gc
import importlib.util
import os
import re
import signal
from pathlib import Path

import pytest

from examples.xla_flags import check_flags

# XLA ends the process for a flag that it does not know, before pytest has printed anything.
if (flags := os.environ.get("XLA_FLAGS")) and "PYTEST_XDIST_WORKER" not in os.environ:
    try:
        check_flags(flags)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error

# No test reads or writes the cache of compiled programs of whoever runs the tests.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

# Where in Python an operation comes from is no test's affair, and writing it takes a tenth of the
# time of tests that compile much.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# Before jax is imported: the flags are read once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jaxtyping
from jaxtyping import install_import_hook

# Every shape annotation of the library is checked on every call that a test makes. Functions of
# modules without any would be wrapped for nothing, and that took a ninth of their tests' time.
library = importlib.util.find_spec("muon_jax")
assert library is not None and library.origin is not None
folder = Path(library.origin).parent
annotated = [
    ".".join(("muon_jax", *path.relative_to(folder).with_suffix("").parts))
    for path in folder.rglob("*.py")
    if re.search(r"^from jaxtyping import", path.read_text(), re.M)
]
install_import_hook(annotated, "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell that starts the tests in the background, or nohup, has them ignore these signals, and so
# would the programs that they start.
for number, usual in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Tracing makes many objects that live on: dead ones among them are looked for less often.
gc.set_threshold(50_000)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips files that hold none of the tests asked for.

    What they import takes seconds in each worker, and may be missing.
    """
    if collection_path.suffix != ".py":
        return None
    asked, text = config.option.markexpr, collection_path.read_text()
    for mark in re.findall(r"\bnot (\w+)", asked):
        if re.search(rf"^pytestmark = .*\b{mark}\b", text, re.M):
            return True
    return True if asked.startswith("bits") and "pytest.mark.bits" not in text else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes come first, then those of many tests.

    Such a test waits most of the time, which another worker uses. At the end there would be none
    left that does.
    """
    counts = collections.Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path], str(item.path)))


@pytest.fixture
def untyped():
    """Lets wrong types reach the library's own errors, as they do for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
