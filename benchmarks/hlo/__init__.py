"""Count what a compiled program sends and multiplies, from the text of its HLO.

`compiled.as_text()` shows the program that one device runs, after partitioning. XLA's own cost
analysis does not count communication and counts a loop's body once; this module reads the text.

Bytes are those that a device sends in a ring, the least that the operation needs, for a group of
N devices: (N-1)/N of the gathered or unreduced array for an all-gather or a reduce-scatter, twice
that for an all-reduce, (N-1)/N of the buffer for an all-to-all, the buffer for a
collective-permute.

What is read how:

- A loop's body counts as often as it runs: XLA's `known_trip_count`, else the bound in its
  condition.
- An asynchronous collective counts at its start. XLA:TPU runs pieces of one inside several fusions,
  under one `chain_id`, which may be rounds of a loop: they count once, as the piece that starts it
  does. It writes a reduce-scatter as an all-reduce inside a fusion
  called `all-reduce-scatter`.
- Of a conditional, the branch that sends most counts.
- A ragged product on TPU counts once for each row, the rows that belong to no group included: it
  is written as if each group multiplied every row, under a mask whose empty tiles are skipped.
- A TPU kernel counts as what it says of itself.

The modules, from the ground up: `brackets`, `shapes` and `module` make instructions of the text;
`loops` and `calls` say what runs how often; `replica_groups`, `collective` and `sent` find what is
sent; `products`, `ragged` and `multiplied` what is multiplied. Beside them, `traffic` counts what
is read and written, and `timing` adds up what a TPU's compiler expects each piece to take.
"""

from benchmarks.hlo.collective import Collective
from benchmarks.hlo.loops import unknown_loops
from benchmarks.hlo.multiplied import flops, flops_by_scope
from benchmarks.hlo.sent import collectives, total_bytes

__all__ = [
    "Collective",
    "collectives",
    "flops",
    "flops_by_scope",
    "total_bytes",
    "unknown_loops",
]
