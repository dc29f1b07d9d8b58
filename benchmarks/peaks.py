"""What the device can do at most: the speed of its products, and of a copy.

The limits that other measurements are held against. They are measured, not read from a data sheet,
in the same run as these, again beside every row.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.harness import time_interleaved, wall_clock

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")

Clock = Callable[[Callable[[], Any]], float]

# On two CPU cores 512 is the fastest; accelerators need more to be busy.
CPU_SIZES, ACCELERATOR_SIZES = (512, 1024, 2048), (4096, 8192, 16384)
CPU_COPY, ACCELERATOR_COPY = 2**28, 2**32


def matmul_peak(
    precision: Precision,
    sizes: tuple[int, ...] | None = None,
    repeats: int = 5,
    clock: Clock = wall_clock,
) -> float:
    """FLOP/s of the fastest of several square products on the default device.

    Both operands are contracted over their minor axes, ``X Y^T``: in bfloat16 the one layout that
    XLA:CPU has the processor's instructions for. Sums are float32, and float32 operands keep all
    their bits.

    Raises:
      jax.errors.JaxRuntimeError: this processor or jaxlib has no such product.
    """
    sizes = sizes or (CPU_SIZES if _on_cpu() else ACCELERATOR_SIZES)
    return max(_speed(precision, size, repeats, clock) for size in sizes)


def matmul_peaks(
    sizes: tuple[int, ...] | None = None, repeats: int = 5, clock: Clock = wall_clock
) -> dict[str, float]:
    """The matmul peak in each precision, as FLOP/s."""
    return {name: matmul_peak(name, sizes, repeats, clock) for name in PRECISIONS}


def copy_bandwidth(size: int | None = None, repeats: int = 5, clock: Clock = wall_clock) -> float:
    """Bytes per second, read and written, at which the device negates `size` bytes of float32."""
    size = size or (CPU_COPY if _on_cpu() else ACCELERATOR_COPY)
    x = jnp.ones(size // 4, jnp.float32)
    negate = jax.jit(jnp.negative)
    return 2 * x.nbytes / _fastest(lambda: jax.block_until_ready(negate(x)), repeats, clock)


def highest(*measured: dict[str, float]) -> dict[str, float]:
    """The fastest of several measurements of the peaks, by precision.

    Programs that run beside this one take processors away from a peak that is measured once, and
    may be gone when something else is timed: the share was 2.09 then. So the peaks are measured
    again beside each row, and the fastest of all counts.
    """
    return {name: max(peaks[name] for peaks in measured) for name in PRECISIONS}


def shares_of(flops: float, seconds: float, peaks: dict[str, float]) -> dict[str, float | None]:
    """How much of each precision's peak so many FLOPs in so many seconds are.

    None where it would be more than all of bfloat16's: nothing is faster than plain products, so
    these were measured beside other work, and no share of them means anything.
    """
    speed = flops / seconds
    if speed > peaks["bfloat16"]:
        return dict.fromkeys(PRECISIONS)
    return {name: speed / peaks[name] for name in PRECISIONS}


def _speed(precision: Precision, size: int, repeats: int, clock: Clock) -> float:
    shape, dtype = (size, size), jnp.dtype(precision)
    x, y = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0)))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = ((1,), (1,)), ((), ())
        bits = lax.Precision.HIGHEST if precision == "float32" else None
        return lax.dot_general(x, y, axes, bits, preferred_element_type=jnp.float32)

    compiled = jax.jit(product)
    seconds = _fastest(lambda: jax.block_until_ready(compiled(x, y)), repeats, clock)
    return 2 * size**3 / seconds


def _fastest(call: Callable[[], Any], repeats: int, clock: Clock) -> float:
    return min(time_interleaved({"": call}, repeats, warmups=2, clocks={"": clock})[""])


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
