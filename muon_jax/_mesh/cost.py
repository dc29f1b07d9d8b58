"""What a route costs a device: FLOPs, bytes on the wire, collectives.

The planner compares routes in one unit, bytes on the wire:

    cost = bytes + FLOPs / flops_per_byte + latency_bytes * collectives
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

EXCHANGED_AT_ONCE = 128
"""Devices of one all_to_all. XLA:TPU compiles one for 128 in 1 s, for 256 in 11 s, in two stages
for 256 in half a second."""


class Traffic(NamedTuple):
    """Bytes that one device sends in one step, by purpose, and the number of collectives.

    Attributes:
      exchange: bytes of the directions' pieces, on their way to the owners.
      split: bytes that the devices which share a matrix send each other inside the iteration.
      returned: bytes of the results' pieces, on their way back from the owners.
      gather: bytes of the results, on their way to all devices that hold the same parameters.
      collectives: the number of collectives that carry these bytes.
    """

    exchange: float = 0.0
    split: float = 0.0
    returned: float = 0.0
    gather: float = 0.0
    collectives: int = 0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.exchange + self.split + self.returned + self.gather

    def __add__(self, other: "Traffic") -> "Traffic":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Traffic(
            self.exchange + other.exchange,
            self.split + other.split,
            self.returned + other.returned,
            self.gather + other.gather,
            self.collectives + other.collectives,
        )


@dataclasses.dataclass(frozen=True)
class MeshCosts:
    """How fast a mesh's network is beside its devices: what routes are chosen by.

    The defaults hold at half of the peak for small products: a TPU v5e (197 TFLOP/s, a ring of
    90 GB/s), a v5p and an H100 on NVLink compute about 1,100 FLOPs in the time of a byte, a v6e
    2,500; a collective's start of 2.5 us is worth 256 KiB. Routes differ by factors where it
    matters: the numbers need not be exact. On a slower network, such as Ethernet between hosts,
    raise the first.

    Attributes:
      flops_per_byte: the FLOPs that a device computes in the time in which it sends a byte.
      latency_bytes: the bytes that a device sends in the time that a collective takes to start.

    Raises:
      ValueError: for a number that is not positive, or a negative latency.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> ethernet = MeshCosts(flops_per_byte=50_000)
      >>> tx = muon(3e-4, mesh=mesh, mesh_costs=ethernet)
    """

    flops_per_byte: float | int = 1250
    latency_bytes: float | int = 2**18

    def __post_init__(self) -> None:
        if not self.flops_per_byte > 0 or not self.latency_bytes >= 0:
            raise ValueError(
                f"MeshCosts takes flops_per_byte above 0 and latency_bytes from 0; got {self}."
            )

    def cost(self, traffic: Traffic, flops: float | int) -> float:
        """The cost of a route in bytes on the wire, or in what takes as long as so many bytes."""
        return (
            traffic.total + flops / self.flops_per_byte + self.latency_bytes * traffic.collectives
        )


def exchange_stages(axes: Sequence[str], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The mesh axes of each all_to_all that an exchange along `axes` is made of.

    One for all, up to `EXCHANGED_AT_ONCE` devices; beyond that one for each axis. It sends nearly
    everything once per axis then, which along the rings of a torus is the way that it takes anyway.
    """
    together = math.prod(sizes[axis] for axis in axes) <= EXCHANGED_AT_ONCE
    return [tuple(axes)] if together else [(axis,) for axis in axes]


def exchanged(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[float, int]:
    """The share of a buffer that one device sends in an exchange, and the number of collectives."""
    lengths = [math.prod(sizes[axis] for axis in s) for s in exchange_stages(axes, sizes)]
    return sum(map(others, lengths)), sum(length > 1 for length in lengths)


def others(count: int) -> float:
    """The share of a buffer that other devices send, where `count` devices hold equal parts."""
    return (count - 1) / count
