"""Where a leaf goes: the outcome of routing."""

import dataclasses
from typing import Literal

from muon_jax._common.paths import Path
from muon_jax._matrices import LeafViews, MatrixSpec

OptimizerName = Literal["muon", "adam"]
"""The optimizers that update a leaf."""


@dataclasses.dataclass(frozen=True)
class Route:
    """Where one leaf goes.

    Attributes:
      path: the leaf's normalised path.
      shape: the leaf's shape.
      reason: why it goes there.
      spec: which axes form its matrices; None sends it to AdamW.
      views: its matrices; None where `spec` is.
      maybe_table: whether nothing but its two axes says that it is a matrix, and its sides are
        those of a table.
      in_heads: whether a structure that the user declared split it into heads.
    """

    path: Path
    shape: tuple[int, ...]
    reason: str
    spec: MatrixSpec | None = None
    views: LeafViews | None = None
    maybe_table: bool = False
    in_heads: bool = False

    @property
    def optimizer(self) -> OptimizerName:
        """The optimizer that updates this leaf."""
        return "adam" if self.views is None else "muon"
