"""What `benchmarks.scale` compiles: the machines, how a Moonlight is laid out on each, and why."""

import dataclasses
import math

from benchmarks.hlo.timing import Chip
from benchmarks.targets import Platform, Target

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Scale:
    """A machine, and how the training step is laid out on it.

    Attributes:
      name: as on the command line.
      platform: whose compiler.
      topology: JAX's name of the arrangement.
      mesh: the sizes of the model's mesh axes data, fsdp, expert, tensor.
      memory: of one device, in bytes.
      attention_block: queries and keys whose logits exist at a time.
      loss_block: tokens whose logits exist at a time.
      expert_block: tokens of a device that travel to experts at a time.
      sequences: of a micro-batch, per device.
      chip: how fast its parts are, of a TPU.
    """

    name: str
    platform: Platform
    topology: str
    mesh: tuple[int, int, int, int]
    memory: float
    attention_block: int = 512
    loss_block: int = 512
    expert_block: int = 8192
    sequences: int = 1
    chip: Chip | None = None

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.mesh)

    @property
    def target(self) -> Target:
        """What to compile for."""
        return Target(self.name, self.platform, self.topology, self.mesh)


def _v5e(side: int) -> Chip:
    """197 TFLOP/s are four units of 128x128 at 1.5 GHz; only an axis of 16 chips is a ring."""
    return Chip(clock=1.5e9, peak=197e12, link=45e9, side=side, wraps=side == 16)


# 16 GiB, of which the system keeps a quarter of one.
_V5E = 15.75 * GIB

_V5P_4X4X4 = Chip(clock=1.75e9, peak=459e12, link=90e9, side=4, wraps=True)

SCALES = {
    scale.name: scale
    for scale in (
        Scale("cpu-8", "cpu", "", (1, 4, 2, 1), 8 * GIB),
        Scale("v5e-256", "tpu", "v5e:16x16", (1, 64, 4, 1), _V5E, sequences=4, chip=_v5e(16)),
        Scale("v5e-64", "tpu", "v5e:8x8", (1, 8, 8, 1), _V5E, sequences=4, chip=_v5e(8)),
        Scale(
            "v5e-32",
            "tpu",
            "v5e:4x8",
            (1, 4, 8, 1),
            _V5E,
            expert_block=4096,
            sequences=2,
            chip=_v5e(8),
        ),
        Scale("v5p-64", "tpu", "v5p:4x4x4", (1, 8, 8, 1), 95 * GIB, sequences=4, chip=_V5P_4X4X4),
        Scale("h100-8", "cuda", "1x1x8", (1, 2, 4, 1), 84_942_979_072, sequences=4),
        Scale("v5e-8", "tpu", "v5e:2x4", (1, 2, 4, 1), _V5E, chip=_v5e(4)),
    )
}
