"""What `benchmarks.wire` trains: sets of matrices, and a loss that uses each of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Shapes = dict[str, tuple[int, ...]]
Optimizer = Literal["adamw", "adamw bf16", "optax muon", "muon_jax"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "adamw bf16", "optax muon", "muon_jax")

ROWS_PER_DEVICE = 64
"""Of the batch. It is small: what the parameters send does not depend on it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A set of matrices on a mesh.

    Attributes:
      title: what the table calls it.
      shapes: path -> shape; all are matrices, or stacks of them, that Muon takes.
      layout: separate leaves; layers in stacks that a `lax.scan` walks through; or experts in
        stacks, multiplied all at once.
      parameters: replicated; sharded along their rows over the whole mesh, which is also the
        batch's (fsdp); or sharded along their stacks, each device holding its experts (local).
      optimizers: which are compiled.
      targets: for which machines, by name.
    """

    title: str
    shapes: Shapes
    layout: Literal["separate", "scanned", "experts"] = "separate"
    parameters: Literal["replicated", "fsdp", "local"] = "replicated"
    optimizers: tuple[Optimizer, ...] = ("adamw", "muon_jax")
    targets: tuple[str, ...] = ("cpu-8", "v5e-8", "h100-8")

    @property
    def count(self) -> int:
        """How many parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def param_spec(self, shape: Sequence[int], axes: tuple[str, ...]) -> P:
        """Where a parameter lies on a mesh with these axes."""
        if self.parameters == "replicated":
            return P()
        return P(axes) if self.parameters == "local" else P(*(None,) * (len(shape) - 2), axes)

    def state_spec(self, shape: Sequence[int], axes: tuple[str, ...], devices: int) -> P:
        """Where the state of AdamW and of `optax.contrib.muon` lies: the rows over all devices.

        Of a stack as well: in a scan, a layer's gradient that one device is to have whole cannot be
        reduce-scattered.
        """
        if self.parameters != "replicated":
            return self.param_spec(shape, axes)
        if shape[-2] % devices:
            raise ValueError(f"{devices} devices do not divide the rows of {tuple(shape)}")
        return P(*(None,) * (len(shape) - 2), axes)

    def batch(self, axes: tuple[str, ...], devices: int) -> tuple[tuple[int, ...], P]:
        """The batch's shape, and its layout: by rows, or by experts."""
        width = max(size for shape in self.shapes.values() for size in shape[-2:])
        if self.layout != "experts":
            return (ROWS_PER_DEVICE * devices, width), P(axes)
        experts = next(iter(self.shapes.values()))[0]
        return (experts, ROWS_PER_DEVICE, width), P(axes)

    def loss(self) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
        """A loss in which every matrix multiplies the activations that are as wide as its rows."""
        widths = sorted({size for shape in self.shapes.values() for size in shape[-2:]})

        def apply(activations: dict[int, jax.Array], leaves: Sequence[Any]) -> dict[int, jax.Array]:
            for leaf in leaves:
                fan_in, fan_out = leaf.shape[-2:]
                out = activations[fan_out] + jnp.tanh(activations[fan_in] @ leaf)
                activations = activations | {fan_out: out}
            return activations

        def loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
            activations = {width: batch[..., :width] for width in widths}
            leaves = list(params.values())
            if self.layout == "scanned":
                layer = lambda carry, xs: (apply(carry, xs), None)  # noqa: E731
                activations, _ = jax.lax.scan(layer, activations, leaves)
            else:
                activations = apply(activations, leaves)
            return sum(jnp.mean(jnp.square(x)) for x in activations.values()) + jnp.zeros(())

        return loss


def _layer(width: int) -> Shapes:
    """A transformer layer: four square matrices, one up, one down."""
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    return square | {"up_proj": (width, 4 * width), "down_proj": (4 * width, width)}


def _separate(layers: int, layer: Shapes) -> Shapes:
    return {f"{i}/{name}": shape for i in range(layers) for name, shape in layer.items()}


def _gated_layer(width: int, hidden: int) -> Shapes:
    """A transformer layer: two square matrices, and the three of a gated MLP."""
    layer = dict.fromkeys(("q_proj", "o_proj"), (width, width))
    wide = dict.fromkeys(("gate_proj", "up_proj"), (width, hidden))
    return layer | wide | {"down_proj": (hidden, width)}


def _tiles(layers: int, width: int, hidden: int, *targets: str) -> Case:
    title = f"{layers} gated layers, d={width}, f={hidden}"
    shapes = _separate(layers, _gated_layer(width, hidden))
    return Case(title, shapes, targets=targets or ("v5e-8",))


def _stacked(under: str, count: int, layer: Shapes) -> Shapes:
    return {f"{under}/{name}": (count, *shape) for name, shape in layer.items()}


def _same(count: int, shape: tuple[int, int]) -> Shapes:
    return {f"{i}/q_proj": shape for i in range(count)}


_LARGE = ("v5e-256", "v6e-256", "v5p-128")
_THREE: tuple[Optimizer, ...] = ("adamw", "adamw bf16", "muon_jax")

CASES: dict[str, Case] = {
    "separate": Case("4 separate layers, d=768", _separate(4, _layer(768)), optimizers=OPTIMIZERS),
    "deep": Case("12 separate layers, d=768", _separate(12, _layer(768))),
    "stacked-8": Case("8 stacked layers, d=768", _stacked("layers", 8, _layer(768)), "scanned"),
    "stacked-12": Case("12 stacked layers, d=768", _stacked("layers", 12, _layer(768)), "scanned"),
    "stacked-6": Case("6 stacked layers, d=768", _stacked("layers", 6, _layer(768)), "scanned"),
    "many": Case("48 separate layers, d=128", _separate(48, _layer(128))),
    "few": Case("4 separate layers, d=128", _separate(4, _layer(128))),
    "fsdp": Case("4 separate layers, d=768, FSDP", _separate(4, _layer(768)), parameters="fsdp"),
    "experts": Case(
        "8 experts, d=768, each on its device",
        _stacked("experts", 8, _layer(768)),
        "experts",
        "local",
    ),
    # Widths of which a share of an eighth is, or is not, a whole number of TPU tiles.
    "tiles-896": _tiles(8, 896, 4864),
    "tiles-1408": _tiles(8, 2048, 1408),
    "tiles-640": _tiles(8, 640, 1728, "v5e-8", "v5e-4x2"),
    "tiles-672": _tiles(8, 672, 1792, "v5e-8", "v5e-4x2"),
    "tiles-704": _tiles(8, 704, 1864),
    "tiles-2816": _tiles(4, 2048, 2816),
    "tiles-5632": _tiles(4, 2048, 5632),
    "tiles-stacked": Case(
        "8 stacked gated layers, d=672, f=1792",
        _stacked("layers", 8, _gated_layer(672, 1792)),
        "scanned",
        targets=("v5e-8",),
    ),
    "square": Case(
        "64 matrices of 1024x1024", _same(64, (1024, 1024)), optimizers=_THREE, targets=_LARGE
    ),
    "wide": Case(
        "64 matrices of 768x3072", _same(64, (768, 3072)), optimizers=_THREE, targets=_LARGE
    ),
}
