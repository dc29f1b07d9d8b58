"""What Muon does with a model on a mesh: routing, plan, bytes and FLOPs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from muon_jax._common.alike import groups_of_alike, one_name
from muon_jax._common.tables import in_units
from muon_jax._planning.shardings import param_specs
from muon_jax._planning.tensors import Model, split_trained
from muon_jax._planning.words import Rule, SpecRule, dimension_numbers
from muon_jax._routing.report import RoutingReport, RoutingRow, routing_report
from muon_jax._routing.route_leaves import by_path
from muon_jax._sharding_report import ShardingReport, sharding_report

MOMENTS_OF_ADAM = 2


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that one device sends in a step, for the optimizer's sake.

    Attributes:
      gradients: bytes that sum the gradients over the axes along which parameters have copies.
        What FSDP itself sends in the forward and the backward pass is not among them.
      to_owners: bytes of momenta on their way to the devices that orthogonalize them, and bytes
        that devices send each other which share a matrix.
      muon_updates: bytes of updates on their way back and to all copies, for Muon's parameters.
      adam_updates: bytes of updates on their way to all copies, for AdamW's parameters.
      adamw: all bytes of a ZeRO-1 AdamW in Muon's place: gradients, and updates as wide as these.
    """

    gradients: int
    to_owners: int
    muon_updates: int
    adam_updates: int
    adamw: int

    @property
    def total(self) -> int:
        """All bytes that are sent with Muon."""
        return self.gradients + self.to_owners + self.muon_updates + self.adam_updates


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes that one device holds between steps.

    Attributes:
      parameters: bytes of the parameters.
      muon_state: bytes of the momentum of Muon's parameters.
      adam_state: bytes of both moments of AdamW's parameters.
      adamw_state: bytes of an AdamW's state in Muon's place.
    """

    parameters: int
    muon_state: int
    adam_state: int
    adamw_state: int


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The report of one model on one mesh.

    Attributes:
      source: where the model was read from.
      kind: what it is.
      tensors: the number of tensors in it.
      left_out: why a tensor is not trained, by its name.
      dtype: the dtype of the parameters, as they are trained.
      mesh: the length of each mesh axis.
      routing: where each parameter goes.
      sharding: who orthogonalizes what.
      held: bytes on one device.
      sent: bytes that one device sends in a step.
    """

    source: str
    kind: str
    tensors: int
    left_out: dict[str, str]
    dtype: str
    mesh: dict[str, int]
    routing: RoutingReport
    sharding: ShardingReport
    held: Held
    sent: Sent

    @property
    def parameters(self) -> int:
        """The number of all trained parameters."""
        return sum(math.prod(row.shape) for row in self.routing.rows)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values, every parameter included."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["routing"] = [dataclasses.asdict(row) for row in self.routing.rows]
        fields["sharding"] = dataclasses.asdict(self.sharding)
        for row, leaf in zip(fields["sharding"]["leaves"], self.sharding.leaves, strict=True):
            row["param"], row["state"] = [*leaf.param], [*leaf.state]
        fields["held"] = dataclasses.asdict(self.held)
        fields["sent"] = {**dataclasses.asdict(self.sent), "total": self.sent.total}
        return {**fields, "parameters": self.parameters}

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis}={length}" for axis, length in self.mesh.items())
        trained = len(self.routing.rows)
        return "\n".join(
            [
                f"{self.source}: {self.kind}",
                f"{self.parameters:,} parameters in {trained:,} of {self.tensors:,} tensors, "
                f"trained in {self.dtype}, on a mesh {mesh}",
                *_left_out(self.left_out),
                "",
                *_routing(self.routing.rows),
                "",
                str(self.sharding),
                "",
                *_bytes(self.held, self.sent),
            ]
        )


def model_report(
    source: str,
    model: Model,
    mesh: AbstractMesh,
    *,
    rules: Sequence[Rule] = (),
    specs: Sequence[SpecRule] = (),
    frozen: str | None = None,
    dtype: str = "float32",
    mu_dtype: str | None = None,
    zero1_axes: Sequence[str] | None = None,
) -> ModelReport:
    """The report of a model on a mesh.

    Args:
      source: where the model was read from.
      model: the model.
      mesh: the mesh; no device is needed.
      rules: what the user says of the routing; the first that is found decides.
      specs: what the user says of the parameters' sharding, likewise.
      frozen: a pattern for parameters that are not trained.
      dtype: the dtype in which they are trained, whatever they have on disk.
      mu_dtype: the dtype of the momentum; None means the parameters'.
      zero1_axes: the mesh axes over which the state is sharded; None means all.

    Raises:
      ValueError, TypeError: as `muon`, for the same parameters.
    """
    trained, left_out = split_trained(model.tensors, frozen)
    if not trained:
        raise ValueError(f"{source} holds no parameters that are trained.")
    params = {name: jax.ShapeDtypeStruct(t.shape, jnp.dtype(dtype)) for name, t in trained.items()}
    declared = {rule.pattern: dimension_numbers(rule, model.orientation) for rule in rules}
    numbers = by_path(declared) if declared else None
    routing = routing_report(params, muon_weight_dimension_numbers=numbers)
    if model.orientation == "out_in":
        routing = RoutingReport(tuple(map(_turned, routing.rows)))
    sharding = sharding_report(
        params,
        mesh=mesh,
        param_specs=param_specs(trained, mesh, specs),
        muon_weight_dimension_numbers=numbers,
        mu_dtype=mu_dtype,
        zero1_axes=zero1_axes,
    )
    itemsize = jnp.dtype(dtype).itemsize
    shapes = [x.shape for x in jax.tree.leaves(params)]
    gradients, gathered, held, moment = (0, 0, 0, 0)
    for shape, leaf in zip(shapes, sharding.leaves, strict=True):
        local = math.prod(shape) * itemsize // _devices(leaf.param, mesh)
        held += local
        copies, cut = mesh.size // _devices(leaf.param, mesh), _devices(leaf.state, mesh)
        cut //= _devices(leaf.param, mesh)
        moment += local // cut
        gathered += local * (cut - 1) // cut
        gradients += local * (cut - 1) // cut + 2 * (local // cut) * (copies - cut) // copies
    sent = Sent(
        gradients,
        sum(row.bytes_in for row in sharding.rows),
        sum(row.bytes_out for row in sharding.rows),
        sharding.adam_gather_bytes,
        gradients + gathered,
    )
    states = sharding.state_bytes("muon"), sharding.state_bytes("adam")
    return ModelReport(
        source,
        model.kind,
        len(model.tensors),
        left_out,
        dtype,
        dict(mesh.shape),
        routing,
        sharding,
        Held(held, *states, MOMENTS_OF_ADAM * moment),
        sent,
    )


def _devices(spec: PartitionSpec, mesh: AbstractMesh) -> int:
    """Into how many pieces a spec cuts a leaf."""
    named = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return math.prod(mesh.shape[axis] for axes in named for axis in axes)


def _turned(row: RoutingRow) -> RoutingRow:
    """A row of a matrix on disk as ``[out, in]``, which names alone read as ``[in, out]``."""
    if len(row.shape) != 2 or row.reason == "declared":
        return row
    turned = tuple((batch, fan_out, fan_in) for batch, fan_in, fan_out in row.matrices)
    return dataclasses.replace(row, matrices=turned)


def _left_out(left_out: Mapping[str, str]) -> list[str]:
    return [
        f"  left out: {one_name(names)}, {reason}"
        for names, reason in groups_of_alike(left_out.items())
    ]


def _routing(rows: Sequence[RoutingRow]) -> list[str]:
    """A paragraph for each optimizer and reason, a line for all names that differ in numbers."""
    paragraphs: dict[tuple[str, str], list[RoutingRow]] = {}
    for row in sorted(rows, key=lambda row: row.optimizer != "muon"):
        paragraphs.setdefault((row.optimizer, row.reason), []).append(row)
    lines = []
    shapes = max(len(_shapes(row.matrices or row.shape)) for row in rows)
    counts = len(f"{len(rows):,}")
    for (optimizer, reason), members in paragraphs.items():
        size = sum(math.prod(row.shape) for row in members)
        lines.append(f"{optimizer}: {reason}; {size:,} parameters")
        alike = groups_of_alike((row.path, row.matrices or row.shape) for row in members)
        for names, matrices in alike:
            cells = f"{_shapes(matrices):>{shapes}}  {len(names):>{counts},}"
            lines.append(f"  {cells} x {one_name(names)}")
    muon, adam = (
        sum(math.prod(row.shape) for row in rows if row.optimizer == name)
        for name in ("muon", "adam")
    )
    matrices = sum(batch for row in rows for batch, _, _ in row.matrices)
    lines.append(
        f"muon: {matrices:,} matrices, {muon:,} parameters ({muon / max(1, muon + adam):.1%}); "
        f"adam: {adam:,} parameters"
    )
    return lines


def _shapes(matrices: tuple[Any, ...]) -> str:
    """``2048x1408`` of a matrix, ``27 of 2048x1408`` of a stack, ``2048`` of a vector."""
    if not matrices or isinstance(matrices[0], int):
        return "x".join(map(str, matrices)) or "()"
    return " + ".join(
        (f"{batch} of " if batch > 1 else "") + f"{fan_in}x{fan_out}"
        for batch, fan_in, fan_out in matrices
    )


def _bytes(held: Held, sent: Sent) -> list[str]:
    def line(what: str, count: int, note: str = "") -> str:
        return f"  {what:<44}{in_units(count, 'B'):>9}{note}"

    state = held.muon_state + held.adam_state
    return [
        "each device holds",
        line("parameters", held.parameters),
        line("state", state, f"  (AdamW's: {in_units(held.adamw_state, 'B')})"),
        "each device sends in a step, for the optimizer",
        line("gradients, to sum them", sent.gradients),
        line("momenta, to those who orthogonalize them", sent.to_owners),
        line("updates of muon's parameters", sent.muon_updates),
        line("updates of adam's parameters", sent.adam_updates),
        line("together", sent.total, f"  (ZeRO-1 AdamW: {in_units(sent.adamw, 'B')})"),
    ]
