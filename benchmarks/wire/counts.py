"""What a compiled step sends, apart for what it is sent for, and what it multiplies."""

from collections import defaultdict
from typing import Any

from benchmarks import hlo
from benchmarks.wire.cases import Optimizer

SMALL_BYTES = 4096
"""A collective below this is a norm, a count or a loss: it belongs to "other"."""


def kind_of(collective: hlo.Collective, optimizer: Optimizer) -> str:
    """Which column a collective belongs to.

    "reduction" is of gradients, "loss" what else the loss sends (under FSDP, its parameters),
    "gather" brings updates back, "exchange" is all else that an optimizer sends.
    """
    scope = collective.scope
    if "muon.gather" in scope or "adamw.gather" in scope:
        return "gather"
    if "muon." in scope:
        return "exchange"
    if collective.bytes <= SMALL_BYTES:
        return "other"
    if "jvp(" in scope:
        reduces = collective.opcode in ("all-reduce", "reduce-scatter")
        return "reduction" if reduces else "loss"
    return "gather" if optimizer.startswith("adamw") else "exchange"


def count(optimizer: Optimizer, text: str) -> dict[str, Any]:
    """What a compiled step sends and multiplies on each device."""
    found = hlo.collectives(text)
    sent: dict[str, float] = dict.fromkeys(("reduction", "loss", "exchange", "gather", "other"), 0)
    times: dict[str, int] = dict.fromkeys(sent, 0)
    listed: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    for c in found:
        kind = kind_of(c, optimizer)
        sent[kind] += c.wire_bytes
        times[kind] += c.executions if c.wire_bytes else 0
        entry = listed[kind, c.opcode, c.dtype, c.elements, c.group_size]
        entry[0] += c.executions
        entry[1] += c.wire_bytes
    keys = ("kind", "opcode", "dtype", "elements", "group", "times", "bytes")
    return {
        "bytes": sent,
        "collectives": times,
        "flops": hlo.flops(text),
        "listed": [dict(zip(keys, (*key, *entry), strict=True)) for key, entry in listed.items()],
    }
