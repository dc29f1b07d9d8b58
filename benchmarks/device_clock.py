"""Seconds on the device: read from its own events where it has them, else from the wall clock.

A call may hold several passes of the same work in one dispatch; whoever times it divides. What is
counted goes from the start of its first event on the device to the end of its last one, so gaps
between kernels count, and Python does not. Torch's calls are timed by a pair of CUDA events, which
mean the same. Where JAX's profiler shows no event of a device, as on CPU, both sides are timed by
the wall clock.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from benchmarks.harness import wall_clock
from benchmarks.peaks import Clock

# A TPU's programs lie on one line, a GPU's kernels and copies on one for each stream.
PROGRAMS, STREAMS = "XLA Modules", "Stream"


class Clocks(NamedTuple):
    """How both sides are timed.

    Attributes:
      name: what the record says of it.
      jax: times a call into JAX.
      torch: times a call into torch.
    """

    name: str
    jax: Clock
    torch: Clock

    def of(self, peers: Any) -> dict[str, Clock]:
        """Each peer's clock, by its name."""
        return {peer: self.torch if peer == "torch" else self.jax for peer in peers}


WALL = Clocks("wall clock", wall_clock, wall_clock)


def choose_clocks() -> Clocks:
    """Device events if a trial product shows any, else the wall clock."""
    if jax.default_backend() == "cpu":
        return WALL
    product = jax.jit(lambda x: x @ x)
    x = jnp.ones((256, 256), jnp.float32)
    try:
        profile_clock(lambda: jax.block_until_ready(product(x)))
    except (LookupError, OSError, jax.errors.JaxRuntimeError):
        return WALL
    return Clocks("device events", profile_clock, cuda_clock)


def profile_clock(call: Callable[[], Any]) -> float:
    """Traces a call, and returns the seconds from its first to its last event on the device.

    Raises:
      LookupError: the trace has no event of a device.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        if not traces:
            raise LookupError("jax.profiler left no trace")
        return device_span(ProfileData.from_file(str(traces[-1])))


def device_span(profile: Any) -> float:
    """Seconds from the first to the last event of the busiest device of a `ProfileData`.

    Raises:
      LookupError: there is no event of a device.
    """
    spans = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:"):
            continue
        lines = list(plane.lines)
        programs = [e for line in lines if line.name == PROGRAMS for e in line.events]
        kernels = [e for line in lines if line.name.startswith(STREAMS) for e in line.events]
        if events := programs or kernels:
            spans.append(max(e.end_ns for e in events) - min(e.start_ns for e in events))
    if not spans:
        raise LookupError("the trace has no event of a device")
    return max(spans) * 1e-9


def cuda_clock(call: Callable[[], Any]) -> float:
    """Seconds between two CUDA events around a call into torch; wall clock where it has no GPU."""
    import torch

    if not torch.cuda.is_available():
        return wall_clock(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3
