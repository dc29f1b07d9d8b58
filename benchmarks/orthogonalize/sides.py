"""The three implementations that are compared, on the same matrices.

`muon_jax` and Optax take a stack `[matrices, rows, cols]` (Optax by its own `vmap`), torch one
matrix after the other, as `torch.optim.Muon` does. All run five steps of the quintic and multiply
as they do in their optimizers: Optax in float32, the other two in bfloat16.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from optax.contrib import MuonDimensionNumbers
from optax.contrib._muon import _DEFAULT_NS_COEFFS, orthogonalize_via_newton_schulz

from examples.one_thread import available_cores
from muon_jax import orthogonalize

Peer = Literal["muon_jax", "optax", "torch"]
PEERS: tuple[Peer, ...] = ("muon_jax", "optax", "torch")


class Side(NamedTuple):
    """One implementation, ready to run.

    Attributes:
      run: orthogonalizes all matrices, `passes` times in one dispatch, and blocks.
      first: the first matrix's result, float32 `[rows, cols]`.
      compile_s: tracing and compiling; None for torch.
      notes: what else the record says of it.
    """

    run: Callable[[], Any]
    first: Callable[[], np.ndarray]
    compile_s: float | None
    notes: dict[str, Any]


def build(peer: Peer, x: np.ndarray, passes: int) -> Side:
    """An implementation on a stack of float32 matrices `[matrices, rows, cols]`."""
    if peer == "torch":
        return _torch(x, passes)
    if peer == "muon_jax":
        return _jax(orthogonalize, x, passes)
    one_by_one = functools.partial(
        orthogonalize_via_newton_schulz,
        ns_coeffs=jnp.asarray(_DEFAULT_NS_COEFFS),
        dimension_numbers=MuonDimensionNumbers(1, 2),
    )
    return _jax(one_by_one, x, passes)


def _jax(function: Callable[[jax.Array], jax.Array], x: np.ndarray, passes: int) -> Side:
    def all_passes(x: jax.Array) -> jax.Array:
        # Each pass takes the one before it, which costs the same and cannot be left out.
        return lax.fori_loop(0, passes, lambda _, x: function(x), x)

    there = jnp.asarray(x)
    start = time.perf_counter()
    compiled = jax.jit(function if passes == 1 else all_passes).lower(there).compile()
    compile_s = time.perf_counter() - start
    once = compiled if passes == 1 else jax.jit(function)
    return Side(
        lambda: jax.block_until_ready(compiled(there)),
        lambda: np.asarray(once(there)[0]),
        compile_s,
        {},
    )


def _torch(x: np.ndarray, passes: int) -> Side:
    import torch
    from torch.optim import _muon

    torch.set_num_threads(available_cores())
    on_gpu = torch.cuda.is_available()
    matrices = [torch.tensor(matrix, device="cuda" if on_gpu else "cpu") for matrix in x]
    coefficients = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
    eager = _muon._zeropower_via_newtonschulz
    function = torch.compile(eager) if on_gpu else eager

    def one(matrix: Any) -> Any:
        return function(matrix, coefficients, _muon.DEFAULT_NS_STEPS, _muon.EPS)

    def run() -> None:
        for _ in range(passes):
            for matrix in matrices:
                one(matrix)
        if on_gpu:
            torch.cuda.synchronize()

    return Side(
        run, lambda: one(matrices[0]).float().cpu().numpy(), None, {"torch_compile": on_gpu}
    )
