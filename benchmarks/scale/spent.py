"""What of a training step's seconds is the optimizer's, by the compiler's estimates."""

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.hlo.timing import Stretch

MARKED = ("muon.exchange", "muon.newton_schulz", "muon.return", "muon.split", "muon.gather")
"""The library's own `jax.named_scope`s; of two that a path names, the later one is meant."""

PARTS = ("model", "clipping, checks", "momentum, AdamW", *MARKED, "adamw.gather")


def part_of(scope: str) -> str:
    """Whose an instruction behind the last micro-batch is: a name of `PARTS`, never "model"."""
    if marked := [name for name in (*MARKED, "adamw.gather") if name in scope]:
        return max(marked, key=scope.rindex)
    return "momentum, AdamW" if "shard_map" in scope else "clipping, checks"


def by_part(pieces: Sequence[Stretch]) -> dict[str, dict[str, float]]:
    """Seconds of each of `PARTS`: computed, waited for a collective, and hidden behind computing.

    The model's is all up to the end of the loop over micro-batches, which takes longest. What
    follows needs the gradients' sum, and is the optimizer's.
    """
    places: dict[int, float] = defaultdict(float)
    for piece in pieces:
        places[piece.place] += piece.seconds
    loop = max(places, key=places.__getitem__)
    found = {part: dict[str, float](computed=0.0, waited=0.0, hidden=0.0) for part in PARTS}
    for piece in pieces:
        spent = found["model" if piece.place <= loop else part_of(piece.scope)]
        for kind in spent:
            spent[kind] += getattr(piece, kind)
    return found


def seconds(spent: dict[str, dict[str, float]], *, model: float | None = None) -> dict[str, float]:
    """How much longer a step is for each part, and for all of them.

    Args:
      spent: what `by_part` returns.
      model: what the model is to take instead of the compiler's estimate.
    """
    found = {part: one["computed"] + one["waited"] for part, one in spent.items()}
    if model is not None:
        found["model"] = model
    return found | {"all": sum(found.values())}
