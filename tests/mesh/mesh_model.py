"""A small model with every kind of leaf that ZeRO-1 lays out, and gradients for it."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType

from muon_jax import MeshCosts
from muon_jax._processor import multiplies_bfloat16
from tests.checkers import gaussian, hadamard_rows

Gradients = Literal["hadamard", "gaussian"]
"""Sums of Hadamard matrices' entries are exact in any order, sums of Gaussians are not."""

COSTLY_WORK = MeshCosts(flops_per_byte=1, latency_bytes=0)
"""Small matrices take the routes of large ones: at the true costs, tiny ones are all replicated."""

CHEAP_WORK = MeshCosts(flops_per_byte=100, latency_bytes=0)
"""The same, but that tiny matrices are worth no sharing: each stays whole."""

SHAPES: dict[str, Any] = {
    # Matrices of one shape, up to transposition: six separate ones, and a stack of twelve.
    "layers": {
        str(i): {"q_proj": {"kernel": (16, 32)}, "o_proj": {"kernel": (32, 16)}} for i in range(3)
    },
    "odd": {"experts": {"kernel": (12, 16, 32)}},
    # No side of these divides, so their state lies along the stack.
    "even": {"experts": {"kernel": (8, 15, 21)}},
    "embed": {"embedding": (32, 16)},
    "norm": {"scale": (16,)},
    "bias": (7,),  # nothing divides it
}

LEAVES = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), shape)
    for path, shape in jax.tree_util.tree_leaves_with_path(
        SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
]


def make_tree(leaves: list[Any]) -> dict[str, Any]:
    """The model's tree, from its leaves in order."""
    structure = jax.tree.structure(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    return structure.unflatten(leaves)


def make_params() -> dict[str, Any]:
    """Gaussian parameters, as NumPy's."""
    return make_tree([gaussian(shape, seed) for seed, (_, shape) in enumerate(LEAVES)])


def make_gradients(kind: Gradients, step: int) -> dict[str, Any]:
    """The gradients of one step.

    Those made of Hadamard matrices are the same at each step up to a power of two: so are then all
    momenta, and every sum of them is exact.
    """
    if kind == "gaussian":
        seeds = range(1000 * (step + 1), 1000 * (step + 1) + len(LEAVES))
        return make_tree([gaussian(s, seed) for seed, (_, s) in zip(seeds, LEAVES, strict=True)])
    size = np.float32(2.0 ** (step % 3))
    leaves = []
    for seed, (_, shape) in enumerate(LEAVES):
        rng = np.random.default_rng(seed)
        signs = rng.choice(np.float32([-1, 1]), shape)
        leaves.append(size * (signs if len(shape) == 1 else hadamard_rows(shape, seed)))
    return make_tree(leaves)


def make_mesh(
    shape: tuple[int, ...], axis_type: AxisType = AxisType.Auto, names: tuple[str, ...] = ()
) -> jax.sharding.Mesh:
    """A mesh of the first devices; its axes are data and fsdp."""
    names = names or ("data", "fsdp")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=devices)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by one with every program that is compiled in this context."""
    # The processor is asked by a program of its own, once in a process.
    multiplies_bfloat16()
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
