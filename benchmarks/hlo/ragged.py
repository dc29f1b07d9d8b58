"""Products of groups of rows, which XLA:TPU writes as if each group multiplied every row.

The tiles in which a group has no rows are skipped, by a table of where each group starts (v5e) or
of the tiles that are left (v5p). How many groups there are, newer compilers say (libtpu 0.0.52); of
older ones (0.0.42) the mask has a row for each. The older ones hand the products whose result has
the rows to a kernel instead, which `products` counts.
"""

import re

from benchmarks.hlo.module import Instruction, Module
from benchmarks.hlo.shapes import Array

_SKIPS = re.compile(
    r'"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_(GROUP_STARTS|ITERATION_INDICES)"'
)
_GROUPS = re.compile(r'"num_groups_in_ragged_dot":"(\d+)"')


def ragged_groups(fusion: Instruction, module: Module) -> int:
    """Of the fusion in which XLA:TPU multiplies groups of rows: how many groups; else 1.

    Raises:
      ValueError: tiles are skipped, and the number of groups is not said.
    """
    if not _skips(fusion):
        return 1
    # It is wrapped in a fusion that says the same.
    inner = [
        i
        for name in fusion.called("calls")
        for i in module.computations[name].instructions.values()
    ]
    if any(map(_skips, inner)):
        return 1
    if said := _GROUPS.search(fusion.attributes):
        return int(said[1])
    masks = [
        one.shape.dims[0]
        for one in inner
        if one.opcode == "parameter"
        and isinstance(one.shape, Array)
        and (one.shape.dtype, len(one.shape.dims)) == ("pred", 2)
    ]
    if len(masks) != 1:
        raise ValueError(f"cannot read the groups of the ragged product {fusion.name}")
    return masks[0]


def _skips(instruction: Instruction) -> bool:
    # A table of starts is made under this name too, by a fusion that masks no dimension.
    no_dims = '"mask_dim_to_iteration_index":[]' in instruction.attributes
    return _SKIPS.search(instruction.attributes) is not None and not no_dims
