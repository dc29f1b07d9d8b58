"""What `by_use` saw of each parameter, as values."""

import dataclasses
import functools
import math
from typing import Any, Literal

from optax.contrib import MuonDimensionNumbers

from muon_jax._attention.structures import AttentionHeads
from muon_jax._common.paths import Path, show
from muon_jax._common.tables import table
from muon_jax._matrices import MatrixSpec
from muon_jax._routing.use.proposed_heads import latent_modules, propose_heads

Role = Literal["matrix", "head", "embedding", "elementwise", "vector", "declared"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was seen of one parameter.

    Attributes:
      path: its path.
      shape: its shape.
      role: what it is.
      reason: what was seen, such as ``"contracted over axis 1, stack 0 (scan)"``.
      spec: which axes form its matrices; None sends it to AdamW.
      hints: evidence that decides nothing, such as the number of heads.
      head_axes: the axes of `spec` that hold attention's heads, for ``heads="per_head"``.
      becomes: the number and the width of the heads that its one output axis becomes; None where it
        was not seen to become any.

    Examples:
      >>> def loss(params, x):
      ...   return jnp.mean(jax.nn.relu(x @ params["up"]) @ params["down"])
      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 9))}
      >>> roles = by_use(loss, params, jnp.ones((2, 4)))
      >>> [(reading.shape, reading.role) for reading in roles.readings]
      [((8, 9), 'head'), ((4, 8), 'matrix')]
    """

    path: Path
    shape: tuple[int, ...]
    role: Role
    reason: str
    spec: MatrixSpec | None = None
    hints: tuple[str, ...] = ()
    head_axes: tuple[int, ...] = ()
    becomes: tuple[int, int] | None = None

    @property
    def because(self) -> str:
        """The reason with the hints."""
        return "; ".join((self.reason, *self.hints))

    @property
    def heads(self) -> tuple[int, int] | None:
        """The number and the width of the heads in its output; None where none were seen."""
        numbers: Any = self.spec
        if len(self.head_axes) == 1 and self.head_axes == numbers.output_axis[:1]:
            count, *widths = (self.shape[axis] for axis in numbers.output_axis)
            return count, math.prod(widths)
        return self.becomes

    @property
    def fan_in(self) -> int:
        """How many entries its matrices sum over."""
        numbers: Any = self.spec
        axes = numbers.reduction_axis
        return math.prod(
            self.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,))
        )

    def per_head(self) -> MuonDimensionNumbers:
        """The matrices with each of attention's heads as one of its own."""
        numbers: Any = self.spec
        ins, outs = (
            tuple(axis for axis in axes if axis not in self.head_axes)
            for axes in (numbers.reduction_axis, numbers.output_axis)
        )
        return MuonDimensionNumbers(ins, outs)


@dataclasses.dataclass(frozen=True)
class UseRoles:
    """The roles that `by_use` read, a value for `muon_weight_dimension_numbers`.

    Attributes:
      readings: one for each parameter, in the order of ``jax.tree.leaves``.

    Examples:
      >>> def loss(params, x):
      ...   return jnp.mean(jax.nn.relu(x @ params["up"]) @ params["down"])
      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 9))}
      >>> roles = by_use(loss, params, jnp.ones((2, 4)))
      >>> print(roles)
      path  shape  role    what was seen
      --------------------------------------------------
      down  8x9    head    no matrix after it
      up    4x8    matrix  contracted over axis 0, out 1
    """

    readings: tuple[Reading, ...]

    def __str__(self) -> str:
        cells = [
            (
                show(reading.path),
                "x".join(map(str, reading.shape)) or "()",
                reading.role,
                reading.because,
            )
            for reading in self.readings
        ]
        lines = table(("path", "shape", "role", "what was seen"), cells)
        return "\n".join([*lines, *latent_modules(self.readings)])

    def __repr__(self) -> str:
        muon = sum(reading.spec is not None for reading in self.readings)
        return f"<UseRoles: {muon} of {len(self.readings)} parameters are matrices>\n{self}"

    def heads(self) -> dict[str, AttentionHeads]:
        """The attention modules whose heads were all seen, a value for `heads` of `muon`.

        Those whose query, key and value projections, by their names, were seen to become heads. Of
        latent attention the widths inside a head are not seen; what is, is printed instead.

        Returns:
          From patterns of modules to `MultiHead` or `GroupedQuery`; empty where nothing was seen.

        Examples:
          >>> def loss(params, x):
          ...   attn = params["attn"]
          ...   q, k, v = ((x @ attn[name]).reshape(2, 5, 2, 4) for name in "qkv")
          ...   mixed = jax.nn.dot_product_attention(q, k, v).reshape(2, 5, 8)
          ...   return jnp.mean((mixed @ attn["o"] @ params["head"]) ** 2)
          >>> attn = {name: jnp.ones((8, 8)) for name in "qkvo"}
          >>> roles = by_use(loss, {"attn": attn, "head": jnp.ones((8, 9))}, jnp.ones((2, 5, 8)))
          >>> {pattern: (seen.heads, seen.head_dim) for pattern, seen in roles.heads().items()}
          {'^attn$': (2, 4)}
          >>> tx = muon(3e-4, muon_weight_dimension_numbers=roles, heads=roles.heads())
        """
        return propose_heads(self.readings)

    def of(self, path: Path, shape: tuple[int, ...]) -> Reading:
        """The reading of one parameter.

        Raises:
          ValueError: for a parameter that was not there, or had another shape.
        """
        found = self._by_path.get(path)
        if found is None:
            raise ValueError(
                f"The roles that by_use read know no parameter {show(path)}: they were read from "
                "another tree. Call by_use with the parameters that the optimizer is given."
            )
        if found.shape != shape:
            raise ValueError(
                f"{show(path)} has shape {shape}, and had {found.shape} when by_use read its role. "
                "Call by_use with the parameters that the optimizer is given."
            )
        return found

    @functools.cached_property
    def _by_path(self) -> dict[Path, Reading]:
        return {reading.path: reading for reading in self.readings}
