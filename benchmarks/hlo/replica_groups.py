"""How many devices take part in a collective together, in each form that XLA writes it in."""

import math
import re

from benchmarks.hlo.module import Instruction, Module


def group_size(instruction: Instruction, kind: str, module: Module) -> int:
    """Devices in a group: `{{0,1},{2,3}}`, `[2,4]<=[8]T(1,0)` or `mesh['a'=2,'b'=4] {'b'}`."""
    attributes = instruction.attributes
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
        moved = {device for pair in pairs if pair[0] != pair[1] for device in pair}
        return max(1, len(moved))
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = re.findall(r"\{([\d,]*)\}", found[1])
        return max((len(g.split(",")) for g in groups), default=module.devices)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", attributes
    ):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        # 'a':(2)4 is the part of size 4 that follows a part of size 2.
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups=" not in attributes:
        return module.devices
    raise ValueError(f"cannot read the replica groups of {instruction.name}: {attributes[:200]}")
