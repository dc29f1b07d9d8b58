"""Fixtures for the tests of examples, of which many run the same few programs."""

from collections.abc import Iterator

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A toy run compiles for seconds; the next one, or one that is resumed, loads its program."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is options:
            yield


@pytest.fixture(scope="package", autouse=True)
def unchecked_shapes() -> Iterator[None]:
    """The library's own tests check its shapes: here it would only take time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
