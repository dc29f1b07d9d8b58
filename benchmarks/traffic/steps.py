"""Compile an optimizer's step for one device and count its traffic, in a process for each target.

    python -m benchmarks.traffic.steps v5e-8 experts separate

prints a line of JSON for each case and optimizer; the process needs `targets.environment`.
"""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from benchmarks import targets
from benchmarks.hlo.traffic import traffic
from benchmarks.memory import sizes_of
from benchmarks.targets import TARGETS
from muon_jax import muon

Shapes = dict[str, tuple[int, ...]]


def _separate(layers: int, width: int, hidden: int) -> Shapes:
    layer = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    layer |= {"gate_proj": (width, hidden), "up_proj": (width, hidden)}
    layer |= {"down_proj": (hidden, width)}
    return {f"{i}/{name}": shape for i in range(layers) for name, shape in layer.items()}


CASES: dict[str, Shapes] = {
    # One layer's experts of Moonlight-16B-A3B.
    "experts": {
        "experts/gate_proj": (64, 2048, 1408),
        "experts/up_proj": (64, 2048, 1408),
        "experts/down_proj": (64, 1408, 2048),
    },
    "separate": _separate(4, 2048, 5632),
}
"""The leaves of each case, larger together than what a chip keeps beside its main memory."""

OPTIMIZERS = ("muon_jax", "optax", "adamw")


def make(optimizer: str, shapes: Shapes) -> optax.GradientTransformation:
    """An optimizer with Moonlight's settings, for the leaves of a case."""
    if optimizer == "muon_jax":
        return muon(3e-4)
    if optimizer == "adamw":
        return optax.adamw(3e-4, b2=0.95, weight_decay=0.1)
    numbers = {name: MuonDimensionNumbers(-2, -1) for name in shapes}
    return optax_muon(
        3e-4, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )


def count(optimizer: str, shapes: Shapes, device: Any) -> dict[str, Any]:
    """Bytes for each element of the leaves.

    Returns:
      What is read and written around the orthogonalization, within it, and held beside arguments
      and results.

    Raises:
      ValueError: the device's compiler does not show its programs.
    """
    place = SingleDeviceSharding(device)
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for name, shape in shapes.items()
    }
    tx = make(optimizer, shapes)
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    text = compiled.as_text()
    if text is None:
        raise ValueError(f"{device} does not show its programs' text")
    found = traffic(text)
    within = sum(size for scope, size in found.items() if "newton_schulz" in scope)
    elements = sum(map(math.prod, shapes.values()))
    return {
        "around": (sum(found.values()) - within) / elements,
        "within": within / elements,
        "temporary": sizes_of(compiled, device.platform)["temporaries"] / elements,
    }


def rows(target: str, cases: list[str]) -> Iterator[dict[str, Any]]:
    """The count of every optimizer on every case."""
    device = targets.devices(TARGETS[target])[0]
    for case in cases:
        for optimizer in OPTIMIZERS:
            counted = count(optimizer, CASES[case], device)
            yield {"target": target, "case": case, "optimizer": optimizer} | counted


if __name__ == "__main__":
    for row in rows(sys.argv[1], sys.argv[2:]):
        print(json.dumps(row), flush=True)
