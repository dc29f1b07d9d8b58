"""Which heads the program showed: attention modules as ``heads=`` takes them, with nothing guessed.

Where queries, keys and values were all seen to become heads, their numbers and widths are known,
and with them those of the output projection. Which projection is which is the names' word.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from muon_jax._attention.structures import AttentionHeads, GroupedQuery, MultiHead
from muon_jax._common.paths import Path, show, unflattened
from muon_jax._routing.remedies import pattern_for

_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("query", "key", "value", "out"),
    ("q", "k", "v", "o"),
    ("wq", "wk", "wv", "wo"),
)
_LATENT = "kv_b_proj"
_KERNELS = ("kernel", "w", "weight")


def propose_heads(readings: Sequence[Any]) -> dict[str, AttentionHeads]:
    """From patterns of modules to their structure, where it was seen in full.

    Args:
      readings: as in `UseRoles`.
    """
    modules = _modules(readings)
    alike: dict[AttentionHeads, list[Path]] = defaultdict(list)
    for node, kernels in modules.items():
        if (structure := _structure(kernels)) is not None:
            alike[structure].append(node)
    proposed = {}
    for structure, nodes in alike.items():
        others = ["/".join(node) for node in modules if node not in nodes]
        pattern = "^$" if nodes == [()] else pattern_for(["/".join(node) for node in nodes], others)
        proposed[pattern] = structure
    return proposed


def latent_modules(readings: Sequence[Any]) -> list[str]:
    """Lines on modules with latent attention's names: the widths in a head are yours to say."""
    lines = {}
    for node, kernels in _modules(readings).items():
        held = kernels[_LATENT].heads if _LATENT in kernels else None
        if held is not None:
            pattern = node[-1] if node else "^$"
            lines[pattern, held] = (
                f"{show(node)}: {_LATENT} becomes {held[0]} heads of {held[1]}; to split them, "
                f'heads={{"{pattern}": MultiHeadLatent(heads={held[0]}, nope_dim=..., '
                f"rope_dim=..., v_dim=...)}}, where nope_dim + v_dim = {held[1]}"
            )
    return [*lines.values()]


def _modules(readings: Sequence[Any]) -> dict[Path, dict[str, Any]]:
    """The readings of kernels by module and projection."""
    modules: dict[Path, dict[str, Any]] = defaultdict(dict)
    for reading in readings:
        path = unflattened(reading.path)
        owner = path[:-1] if path and path[-1] in _KERNELS else path
        if owner and isinstance(reading.spec, MuonDimensionNumbers):
            modules[owner[:-1]][owner[-1]] = reading
    return modules


def _structure(kernels: dict[str, Any]) -> AttentionHeads | None:
    for names in _NAMES:
        if not {*names} <= kernels.keys():
            continue
        query, key, value, output = (kernels[name] for name in names)
        if query.heads is None or key.heads is None or key.heads != value.heads:
            return None
        (heads, width), (kv_heads, kv_width) = query.heads, key.heads
        if width != kv_width or heads % kv_heads or output.fan_in != heads * width:
            return None
        if heads == kv_heads:
            return MultiHead(heads, width, *names)
        return GroupedQuery(heads, kv_heads, width, *names)
    return None
