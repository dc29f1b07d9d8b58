"""What can be set: the arguments of `benchmarks.endurance`."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Args:
    """Kills, damages, doubles and starves a training run.

    Attributes:
      kills: at how many random moments a process is ended.
      seed: of the moments.
      patience: seconds after which a process that should have ended counts as hung.
      processes: as how many processes on this machine the run works; of several, each kill is one
        of one of them, and the other trials are left out.
      disk: whether to fill a disk, and make one read-only, which takes Linux and root.
      output: where the JSON goes.
    """

    kills: int = 25
    seed: int = 0
    patience: float = 120.0
    processes: int = 1
    disk: bool = True
    output: Path = Path("runs/benchmarks/endurance.json")
