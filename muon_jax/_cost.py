"""What a route costs a device: FLOPs, bytes on the wire, collectives.

The planner compares routes in one unit, bytes on the wire:

    cost = bytes + FLOPs / FLOPS_PER_BYTE + LATENCY_BYTES * collectives

Bytes that cross the network in the time of a FLOP, at half of the peak for small products: a TPU
v5e (197 TFLOP/s, a ring of 90 GB/s), a v5p and an H100 on NVLink compute about 1,100 FLOPs in the
time of a byte, a v6e 2,500. A collective's start of 2.5 us is worth 256 KiB. Routes differ by
factors where it matters: the constants need not be exact.
"""

from typing import NamedTuple

FLOPS_PER_BYTE = 1250
LATENCY_BYTES = 2**18


class Traffic(NamedTuple):
    """Bytes that one device sends in one step, by purpose, and the number of collectives.

    Attributes:
      exchange: pieces of the momentum, on their way to the owners.
      split: inside the iteration, between the devices that share a matrix.
      returned: pieces of the update, on their way back from the owners.
      gather: the update, to the devices that hold the same parameters.
      collectives: how many collectives carry them.
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


def newton_schulz_flops(rows: int, cols: int, steps: int, *, is_complex: bool = False) -> int:
    """FLOPs of the products of `steps` on one wide matrix: ``4 m^2 n + 2 m^3`` each."""
    per_step = 4 * rows * rows * cols + 2 * rows**3
    return steps * per_step * (4 if is_complex else 1)


def others(count: int) -> float:
    """The part of a buffer that comes from other devices, of `count` that share it evenly."""
    return (count - 1) / count


def cost(traffic: Traffic, flops: float | int) -> float:
    """The planner's unit: bytes on the wire, or what would take as long."""
    return traffic.total + flops / FLOPS_PER_BYTE + LATENCY_BYTES * traffic.collectives
