"""Listen to what the optimizer decides while it is traced, so that reports agree with it."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from muon_jax._layout import Layout
from muon_jax._paths import Path
from muon_jax._plan import Plan, PlannedLeaf
from muon_jax._specs import AnyMesh, local_shape


class StateEntry(NamedTuple):
    """The optimizer that updates one parameter, and the bytes that one device keeps for it."""

    group: Literal["muon", "adam"]
    bytes: int


class Record:
    """What was decided.

    Attributes:
      mesh: the mesh of the optimizer, None until one is met.
      zero1_axes: the mesh axes that it shards the state over.
      param_specs: the specs of the parameters that it was given.
      layouts: the layout of each parameter that an optimizer on this mesh updates.
      state: the arrays that one device keeps for each parameter, by their group and bytes.
      plan: the plan of the last update, with the leaves it was made for.
      adam_gather: bytes that one device sends to gather AdamW's updates.
    """

    def __init__(self) -> None:
        self.mesh: AnyMesh | None = None
        self.zero1_axes: tuple[str, ...] = ()
        self.param_specs: Any = None
        self.layouts: dict[Path, Layout] = {}
        self.state: dict[Path, StateEntry] = {}
        self.plan: tuple[Plan, Sequence[PlannedLeaf]] | None = None
        self.adam_gather = 0.0

    def layout_of(self, path: Path, shape: tuple[int, ...]) -> Layout | None:
        """The layout of the parameter that a leaf of the state belongs to, by its path's end."""
        for start in range(len(path) + 1):
            layout = self.layouts.get(path[start:])
            if layout is not None and layout.shape == shape:
                return layout
        return None


_LISTENING: contextvars.ContextVar[Record | None] = contextvars.ContextVar(
    "muon_jax_record", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Within this context, what optimizers on a mesh decide is written down."""
    record = Record()
    token = _LISTENING.set(record)
    try:
        yield record
    finally:
        _LISTENING.reset(token)


def note_mesh(mesh: AnyMesh, zero1_axes: tuple[str, ...], param_specs: Any) -> None:
    """Write down what the optimizer was told of its mesh."""
    record = _LISTENING.get()
    if record is not None:
        record.mesh, record.zero1_axes, record.param_specs = mesh, zero1_axes, param_specs


def note_layouts(paths: Sequence[Path], layouts: Sequence[Layout]) -> None:
    """Write down where parameters and their states lie."""
    record = _LISTENING.get()
    if record is not None:
        record.layouts.update(zip(paths, layouts, strict=True))


def note_state(
    group: Literal["muon", "adam"],
    paths: Sequence[Path],
    layouts: Sequence[Layout],
    dtypes: Sequence[Sequence[jnp.dtype]],
) -> None:
    """Write down the arrays, one for each dtype, that a group keeps for its parameters."""
    record = _LISTENING.get()
    if record is None or record.mesh is None:
        return
    sizes = dict(record.mesh.shape)
    for path, layout, kept in zip(paths, layouts, dtypes, strict=True):
        elements = math.prod(local_shape(layout.shape, layout.state, sizes))
        record.state[path] = StateEntry(group, elements * sum(d.itemsize for d in kept))


def note_plan(plan: Plan, leaves: Sequence[PlannedLeaf]) -> None:
    """Write down who orthogonalizes what."""
    record = _LISTENING.get()
    if record is not None:
        record.plan = plan, leaves


def note_adam_gather(sent: float | int) -> None:
    """Write down the bytes that one device sends to gather AdamW's updates."""
    record = _LISTENING.get()
    if record is not None:
        record.adam_gather = sent
