"""Whether XLA:CPU multiplies bfloat16 on this processor, and does it right.

Many processors have instructions for it (AVX512-BF16, AMX, Arm's BF16). XLA:CPU reaches them
through a library, in one layout: ``X Y^T``, both operands contracted over their minor axes. There
it is about twice as fast as float32 (EXPERIMENTS.md); other layouts are slower than float32, and
some fail when the program runs.
"""

import concurrent.futures
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
_PROCESSOR = Path("/proc/cpuinfo")


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether ``X Y^T`` of bfloat16 matrices is fast and right with this processor and jaxlib.

    The answer is one for the process, and depends on no clock: it decides how results are rounded.
    """
    if not has_bfloat16_instructions(_PROCESSOR):
        return False
    # In a thread of its own: who asks is in the middle of a trace, perhaps with a mesh set.
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        return other.submit(product_is_right).result()


def has_bfloat16_instructions(description: Path) -> bool:
    """Whether Linux's description of the processor lists any; False where there is none."""
    try:
        return not _INSTRUCTIONS.isdisjoint(description.read_text().split())
    except OSError:
        return False


def bfloat16_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """``X Y^T``: both are contracted over their minor axes; the sums are float32."""
    batch = tuple(range(x.ndim - 2))
    axes = ((x.ndim - 1,), (y.ndim - 1,)), (batch, batch)
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def product_is_right() -> bool:
    """Whether the product compiles, runs, and gives sums of whole numbers exactly."""
    rows, cols = np.random.default_rng(0).integers(-8, 9, (2, 48, 160))
    try:
        device = jax.local_devices(backend="cpu")[0]
        x, y = jax.device_put((rows.astype(jnp.bfloat16), cols.astype(jnp.bfloat16)), device)
        return bool((jax.device_get(jax.jit(bfloat16_product)(x, y)) == rows @ cols.T).all())
    # "Unsupported element type for DotThunk::Execute"; or JAX_PLATFORMS leaves CPUs out.
    except RuntimeError:
        return False
