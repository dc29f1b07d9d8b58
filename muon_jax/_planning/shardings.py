"""Where parameters lie: as the user says, else by a rule for an axis called ``fsdp``."""

import re
from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, PartitionSpec

from muon_jax._planning.tensors import Tensor
from muon_jax._planning.words import SpecRule

FSDP = "fsdp"


def param_specs(
    tensors: Mapping[str, Tensor], mesh: AbstractMesh, rules: Sequence[SpecRule]
) -> dict[str, PartitionSpec]:
    """The spec of each parameter.

    The first rule whose pattern is found decides. Of a parameter without one, an axis called
    ``fsdp`` shards the longest dimension that it divides, as fully sharded data parallelism mostly
    does; vectors stay whole. All other axes hold copies.

    Args:
      tensors: the parameters, by name.
      mesh: the mesh.
      rules: the user's, in order.

    Raises:
      ValueError: for a rule that finds no parameter.
    """
    found: set[str] = set()
    specs = {}
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        if rule is not None:
            found.add(rule.pattern)
        specs[name] = rule.spec if rule is not None else _fsdp(tensor.shape, mesh)
    for rule in rules:
        if rule.pattern not in found:
            raise ValueError(
                f"--param-spec {rule.pattern}: no parameter that earlier patterns left is called "
                f"so; the first of {len(tensors):,} is {next(iter(tensors))}."
            )
    return specs


def _fsdp(shape: tuple[int, ...], mesh: AbstractMesh) -> PartitionSpec:
    devices = mesh.shape.get(FSDP, 1)
    fitting = [dim for dim, length in enumerate(shape) if length and length % devices == 0]
    if devices == 1 or len(shape) < 2 or not fitting:
        return PartitionSpec()
    longest = max(fitting, key=lambda dim: shape[dim])
    return PartitionSpec(*[FSDP if dim == longest else None for dim in range(longest + 1)])
