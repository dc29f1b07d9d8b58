"""Products of groups of rows, which XLA:TPU writes as if each group multiplied every row."""

import re

from benchmarks.hlo.module import Instruction, Module

_RAGGED = re.compile(r'"num_groups_in_ragged_dot":"(\d+)"')


def ragged_groups(fusion: Instruction, module: Module) -> int:
    """Of the fusion in which XLA:TPU multiplies groups of rows: how many groups; else 1."""
    found = _RAGGED.search(fusion.attributes)
    if found is None:
        return 1
    # It is wrapped in a fusion that says the same.
    inner = [
        i
        for name in fusion.called("calls")
        for i in module.computations[name].instructions.values()
    ]
    return 1 if any(_RAGGED.search(i.attributes) for i in inner) else int(found[1])
