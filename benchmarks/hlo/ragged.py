"""Products of groups of rows, which XLA:TPU writes as if each group multiplied every row.

The tiles in which a group has no rows are skipped, by a table of where each group starts; how many
groups there are, newer compilers say (libtpu 0.0.52) and older ones leave to the tiles' loop
(0.0.42). The older ones hand the products whose result has the rows to a kernel instead, which
`products` counts.
"""

import re

from benchmarks.hlo.module import Instruction, Module

_SKIPS = '"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_GROUP_STARTS"'
_GROUPS = re.compile(r'"num_groups_in_ragged_dot":"(\d+)"')
_MASK_DIMS = re.compile(r'"mask_dim_to_iteration_index":\["(\d+)"')
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')


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
    # The mask is [groups, rows]: its first dimension is walked by one of the tiles' loops.
    mask, bounds = _MASK_DIMS.search(fusion.attributes), _BOUNDS.search(fusion.attributes)
    if mask is None or bounds is None:
        raise ValueError(f"cannot read the groups of the ragged product {fusion.name}")
    return int(bounds[1].split(",")[int(mask[1])].strip('"'))


def _skips(instruction: Instruction) -> bool:
    # A table of starts is made under this name too, by a fusion that masks no dimension.
    no_dims = '"mask_dim_to_iteration_index":[]' in instruction.attributes
    return _SKIPS in instruction.attributes and not no_dims
