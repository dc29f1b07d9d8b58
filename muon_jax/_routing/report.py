"""A readable report of what `muon` does with each parameter."""

import dataclasses
import math
from typing import Any

from muon_jax._attention.split_heads import Heads
from muon_jax._common.checks import Scalar
from muon_jax._common.paths import show
from muon_jax._common.tables import table
from muon_jax._routes import Route
from muon_jax._routing.route_leaves import DimensionNumbers, route_leaves
from muon_jax._routing.use.against_names import note_names
from muon_jax._routing.use.readings import UseRoles
from muon_jax._scaling import (
    DEFAULT_RMS,
    DefaultRMS,
    ShapeFunction,
    UpdateScale,
    describe_update_scale,
    resolve_update_scale,
)


@dataclasses.dataclass(frozen=True)
class RoutingRow:
    """What happens to one parameter.

    Attributes:
      path: its path, such as ``layers/0/attn/q_proj/kernel``.
      shape: its shape.
      optimizer: ``"muon"`` or ``"adam"``.
      matrices: `(batch, fan_in, fan_out)` of its matrices, one triple for each fused block; empty
        for AdamW.
      scale: the update scale of each triple, as text; empty for AdamW.
      reason: why it goes there.

    Examples:
      >>> (row,) = routing_report({"proj": {"kernel": jnp.ones((4, 8))}}).rows
      >>> row.optimizer, row.matrices, row.reason
      ('muon', ((1, 4, 8),), 'linear kernel')
    """

    path: str
    shape: tuple[int, ...]
    optimizer: str
    matrices: tuple[tuple[int, int, int], ...]
    scale: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class RoutingReport:
    """The rows of `routing_report`; printed, or shown by a notebook, it is a table.

    Attributes:
      rows: one row for each parameter, in the order of ``jax.tree.leaves(params)``.

    Examples:
      >>> params = {"embed": jnp.ones((9, 4)), "proj": {"kernel": jnp.ones((4, 4))}}
      >>> [row.path for row in routing_report(params).rows if row.optimizer == "adam"]
      ['embed']
    """

    rows: tuple[RoutingRow, ...]

    def __str__(self) -> str:
        header = ("path", "shape", "optimizer", "matrix", "batch", "scale", "because")
        cells = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "()",
                row.optimizer,
                " + ".join(f"{rows}x{cols}" for _, rows, cols in row.matrices) or "-",
                " + ".join(str(batch) for batch, _, _ in row.matrices) or "-",
                " + ".join(row.scale) or "-",
                row.reason,
            )
            for row in self.rows
        ]
        return "\n".join([*table(header, cells), self._totals()])

    __repr__ = __str__

    def _totals(self) -> str:
        size = {"muon": 0, "adam": 0}
        for row in self.rows:
            size[row.optimizer] += math.prod(row.shape)
        matrices = sum(batch for row in self.rows for batch, _, _ in row.matrices)
        share = size["muon"] / max(1, sum(size.values()))
        return (
            f"muon: {matrices:,} matrices, {size['muon']:,} parameters ({share:.1%}); "
            f"adam: {size['adam']:,} parameters"
        )


def routing_report(
    params: Any,
    *,
    muon_weight_dimension_numbers: DimensionNumbers = None,
    heads: Heads = "joint",
    consistent_rms: Scalar | DefaultRMS | None = DEFAULT_RMS,
    update_scale: UpdateScale | ShapeFunction | None = None,
) -> RoutingReport:
    """For each parameter its optimizer, its matrices, their update scale and the reason.

    Args:
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      muon_weight_dimension_numbers: as given to `muon`. With the roles that `by_use` read, the
        reason is the use, and where the table of names reads a leaf in another way, that too.
      heads: as given to `muon`.
      consistent_rms: as given to `muon`.
      update_scale: as given to `muon`.

    Returns:
      A `RoutingReport`, whose `rows` are in the order of ``jax.tree.leaves(params)``; print it.

    Raises:
      ValueError, TypeError: where `muon` would, for the same leaves.

    Examples:
      >>> routing_report({"embed": jnp.ones((9, 4)), "proj": {"kernel": jnp.ones((4, 4))}})
      path         shape  optimizer  matrix  batch  scale  because
      ------------------------------------------------------------------
      embed        9x4    adam       -       -      -      embedding
      proj/kernel  4x4    muon       4x4     1      0.4    linear kernel
      muon: 1 matrices, 16 parameters (30.8%); adam: 36 parameters
    """
    scale = resolve_update_scale(consistent_rms, update_scale)
    routes, _ = route_leaves(params, muon_weight_dimension_numbers, heads)
    if isinstance(muon_weight_dimension_numbers, UseRoles):
        routes = note_names(routes, heads)
    return RoutingReport(tuple(_row(route, scale) for route in routes))


def _row(route: Route, scale: UpdateScale) -> RoutingRow:
    matrices = tuple(view.matrices for view in route.views) if route.views else ()
    return RoutingRow(
        show(route.path),
        route.shape,
        route.optimizer,
        matrices,
        tuple(describe_update_scale(scale, fan_in, fan_out) for _, fan_in, fan_out in matrices),
        route.reason,
    )
