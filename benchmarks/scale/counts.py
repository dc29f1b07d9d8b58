"""What a compiled step sends, apart for what it is sent for, and what it multiplies."""

import re
from collections import defaultdict
from typing import Any

from benchmarks import hlo
from benchmarks.hlo.timing import Chip, stretches
from benchmarks.scale.spent import by_part

SMALL_BYTES = 2**16
"""Of a reduction: a norm, a count, a maximum, a gain's gradient. Matrices are larger."""

PHASES = (
    "weights forward", "weights backward", "gradients", "dispatch", "embedding",
    "muon exchange", "muon gather", "adamw gather", "other",
)  # fmt: skip


def phase_of(collective: hlo.Collective) -> str:
    """What a collective is for: a name of `PHASES`.

    Recomputed layers belong to the backward pass. With a `tensor` axis, sums of activations count
    as gradients.
    """
    scope = collective.scope
    if "adamw.gather" in scope or "muon.gather" in scope:
        return "adamw gather" if "adamw" in scope else "muon gather"
    if "muon." in scope:
        return "muon exchange"
    if collective.opcode in ("all-to-all", "ragged-all-to-all"):
        # Of dispatch, all_to_alls stand in the body of the loop over rounds.
        return "dispatch" if re.search(r"body/(?:\w+/)*all_to_all", scope[-60:]) else "embedding"
    if collective.opcode in ("all-reduce", "reduce-scatter"):
        return "gradients" if collective.bytes > SMALL_BYTES else "other"
    if collective.opcode == "all-gather":
        return "weights backward" if "transpose(" in scope else "weights forward"
    return "other"


def count(text: str, chip: Chip | None = None, rounds: int = 1) -> dict[str, Any]:
    """What a compiled step sends and multiplies on each device.

    Of a TPU's program also "seconds", by its compiler's estimates.

    Args:
      text: the compiled program.
      chip: how fast its parts are, of a TPU.
      rounds: that the dispatch takes: of the loops whose length is not in the program.
    """
    loops = hlo.unknown_loops(text)
    once = rounds if loops else None
    sent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    listed: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    for collective in hlo.collectives(text, assume_trip_count=once):
        phase = phase_of(collective)
        sent[phase] += collective.wire_bytes
        key = (phase, collective.opcode, collective.dtype, collective.elements)
        entry = listed[*key, collective.group_size, "/".join(collective.scope.split("/")[-2:])]
        entry[0] += collective.executions
        entry[1] += collective.wire_bytes
    keys = ("phase", "opcode", "dtype", "elements", "group", "scope", "times", "bytes")
    rows = [dict(zip(keys, (*key, *entry), strict=True)) for key, entry in listed.items()]
    products = hlo.flops_by_scope(text, assume_trip_count=once)
    newton_schulz = sum(n for scope, n in products.items() if "muon.newton_schulz" in scope)
    seconds = by_part(stretches(text, chip, assume_trip_count=once)) if chip else None
    return {
        "wire": sent,
        "flops": {
            "model": sum(products.values()) - newton_schulz,
            "newton_schulz": newton_schulz,
        },
        "seconds": seconds,
        "assumed_once": loops,
        "listed": sorted(rows, key=lambda one: -one["bytes"])[:40],
    }
