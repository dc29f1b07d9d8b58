"""Muon, as Moonshot AI scaled it for LLM training, as an Optax optimizer for JAX."""

from optax.contrib import MuonDimensionNumbers

from muon_jax._attention.qk_clip import QKClipState, qk_clip
from muon_jax._attention.split_heads import split_heads
from muon_jax._attention.structures import GroupedQuery, MultiHead, MultiHeadLatent
from muon_jax._diagnostics import (
    orthogonality_error,
    rms_by_optimizer,
    svd_entropy,
    update_rms,
)
from muon_jax._map_matrices import map_matrices, put_matrices
from muon_jax._matrices import FusedBlocks
from muon_jax._mesh.cost import MeshCosts
from muon_jax._mesh.state_shardings import opt_state_shardings
from muon_jax._muon import muon
from muon_jax._muon_step import MuonState
from muon_jax._optax_state import state_from_optax, state_to_optax
from muon_jax._orthogonalize import orthogonalize
from muon_jax._polynomials import SCHEDULES
from muon_jax._routing.report import RoutingReport, RoutingRow, routing_report
from muon_jax._routing.route_leaves import by_path
from muon_jax._routing.use.by_use import by_use
from muon_jax._routing.use.readings import Reading, UseRoles
from muon_jax._scale_by_muon import scale_by_muon
from muon_jax._scaling import AdjustedLR, FixedScale, UpdateNorm
from muon_jax._sharding_report import LeafRow, ShardingReport, ShardingRow, sharding_report

__all__ = [
    "SCHEDULES",
    "AdjustedLR",
    "FixedScale",
    "FusedBlocks",
    "GroupedQuery",
    "LeafRow",
    "MeshCosts",
    "MultiHead",
    "MultiHeadLatent",
    "MuonDimensionNumbers",
    "MuonState",
    "QKClipState",
    "Reading",
    "RoutingReport",
    "RoutingRow",
    "ShardingReport",
    "ShardingRow",
    "UpdateNorm",
    "UseRoles",
    "by_path",
    "by_use",
    "map_matrices",
    "muon",
    "opt_state_shardings",
    "orthogonality_error",
    "orthogonalize",
    "put_matrices",
    "qk_clip",
    "rms_by_optimizer",
    "routing_report",
    "scale_by_muon",
    "sharding_report",
    "split_heads",
    "state_from_optax",
    "state_to_optax",
    "svd_entropy",
    "update_rms",
]

__version__ = "0.1.0"
