"""What a program holds, by the compiler's account."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.memory import sizes_of


def test_arrays_are_counted_once_by_what_holds_them():
    """A donated argument is no output again, and the square of a vector is kept until the end."""

    def step(x_n: jax.Array, y_n: jax.Array) -> jax.Array:
        return x_n + (y_n[:, None] * y_n[None]).sort(axis=0)[-1]

    x_n = jax.ShapeDtypeStruct((512,), jnp.float32)
    for donated in ((), (0,)):
        compiled = jax.jit(step, donate_argnums=donated).lower(x_n, x_n).compile()
        found = sizes_of(compiled, "cpu")
        assert found["arguments"] == 2 * 4 * 512
        assert found["outputs"] == (0 if donated else 4 * 512)
        assert 4 * 512 * 512 <= found["temporaries"] < 3 * 4 * 512 * 512


def account(**sizes: int) -> Any:
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = {f"{name}_size_in_bytes": sizes[name] for name in names}
    memory["peak_memory_in_bytes"] = sizes["peak"]
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**memory))


def test_a_tpu_s_temporaries_are_those_of_the_peak():
    program = account(argument=100, output=90, alias=80, temp=999, generated_code=7, peak=150)
    assert sizes_of(program, "tpu") == {
        "arguments": 100,
        "outputs": 10,
        "temporaries": 40,
        "code": 7,
    }
    assert sizes_of(program, "cuda")["temporaries"] == 999


def test_a_compiler_without_an_account_is_named():
    silent: Any = SimpleNamespace(memory_analysis=lambda: None)
    with pytest.raises(ValueError, match="the tpu compiler does not account"):
        sizes_of(silent, "tpu")
