"""What lies beside a leaf, and what it says of the leaf's axes.

A name proposes ("wq" may be ``[d, heads, head_dim]``), and the shapes beside it decide. In one
attention the input's fan-in is the output's fan-out, and both have the same heads::

    query [512, 8, 64]   out [8, 64, 512]     attention: q[0] == o[-1] and q[1:] == o[:2]
    wq [12, 512, 512]    wo [12, 512, 512]    twelve layers: q[0] is no width of the output
    query [512, 12, 512] out [512, 12, 512]   layers along axis 1: q[1:] is not o[:2]

Keys and values may have fewer heads (grouped queries) and another fan-in (cross attention). A bias
says as much: it has the axes of the output and no others.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

from muon_jax._common.paths import Path
from muon_jax._routing import names
from muon_jax._routing.lora import find_pairs
from muon_jax._routing.unembedding import find_heads

Leaves = Sequence[tuple[Path, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Beside:
    """What the other leaves say of one leaf.

    Attributes:
      attention: whether its three axes are those of attention's heads.
      plain: whether its attention's projections are there and are none of heads.
      bias: the shape of its bias, without stack axes; None where there is none.
      head: why it is an unembedding head; None where it is not, or nothing says so.
      hidden: whether it is a layer of a head's module before the last.
      shares_first: whether a layer beside it, of three axes too, has its first axis.
      factor: the shape of the other factor of its adapter, without stack axes; None where it is
        none, or has none beside it.
    """

    attention: bool = False
    plain: bool = False
    bias: tuple[int, ...] | None = None
    head: str | None = None
    hidden: bool = False
    shares_first: bool = False
    factor: tuple[int, ...] | None = None


def look_beside(leaves: Leaves, stacks: Sequence[Sequence[str]]) -> list[Beside]:
    """What lies beside each leaf.

    Args:
      leaves: lower-case names on the path, indices included, and the shape, of every leaf.
      stacks: the names of each leaf's leading stack axes.

    Returns:
      One `Beside` for each leaf.
    """
    cores = [
        (path, shape[len(stack) :]) for (path, shape), stack in zip(leaves, stacks, strict=True)
    ]
    biases = _biases(cores)
    attention = _attention(cores, biases)
    whole = _attention(leaves, [None] * len(leaves))
    heads, hidden = find_heads(cores, stacks)
    sharing = _sharing_first(cores)
    factors = find_pairs(cores)
    return [
        Beside(
            attention=attention[i] is True,
            plain=whole[i] is False,
            bias=biases[i],
            head=heads.get(i),
            hidden=i in hidden,
            shares_first=i in sharing,
            factor=factors[i],
        )
        for i in range(len(cores))
    ]


def _biases(leaves: Leaves) -> list[tuple[int, ...] | None]:
    shapes = dict(leaves)

    def bias_of(path: Path) -> tuple[int, ...] | None:
        if not path or names.is_bias(path[-1]):
            return None
        owner = names.owner_of(path)
        name = owner[-1]
        inner = [(*owner, "bias"), (*owner, "b")] if owner != path else []
        outer = [re.sub(r"(^|_)w(?=\d*$|[qkvo]$)", r"\1b", name), f"{name}_bias"]
        if owner == path:
            outer += ["bias"] if names.GENERIC.fullmatch(name) else []
        places = [*inner, *((*owner[:-1], other) for other in outer if other != name)]
        return next((shapes[place] for place in places if place in shapes), None)

    return [bias_of(path) for path, _ in leaves]


def _attention(leaves: Leaves, biases: Sequence[tuple[int, ...] | None]) -> list[bool | None]:
    """Whether each leaf has the axes of heads; None where no counterpart lies beside it."""
    modules = collections.defaultdict(list)
    for i, (path, shape) in enumerate(leaves):
        if path:
            modules[names.owner_of(path)[:-1]].append((i, names.owner_of(path)[-1], shape))
    answers: list[bool | None] = [None] * len(leaves)
    sharing = _sharing_first(leaves)
    for members in modules.values():
        inputs = [(n, s) for _, n, s in members if names.is_input(n) and len(s) == 3]
        outputs = [s for _, n, s in members if names.is_output(n) and len(s) == 3]
        latent = [s for _, n, s in members if names.is_latent(n) and len(s) == 3]
        widths = [s for _, _, s in members if len(s) == 2]
        for i, name, shape in members:
            if len(shape) != 3:
                continue
            if names.is_input(name):
                others = [_fits_input(name, shape, inputs, o) for o in outputs]
                by_bias = biases[i] == shape[1:] and shape[0] != shape[1]
            elif names.is_output(name):
                others = [_agree(q, shape, inputs) for n, q in inputs if _slot(n) == "q"]
                others += [_latent_fits(b, shape, widths) for b in latent]
                by_bias = biases[i] == shape[2:] and i not in sharing
            elif names.is_latent(name):
                others = [_latent_fits(shape, o, widths) for o in outputs]
                by_bias = False
            else:
                continue
            answers[i] = True if by_bias or any(others) else False if others else None
    return answers


def _sharing_first(leaves: Leaves) -> set[int]:
    """Leaves whose first axis a layer beside them has too, as experts have.

    A bias of the last axis alone then says nothing: the experts' outputs may share it. Attention's
    inputs have their heads in another place.
    """
    modules = collections.defaultdict(list)
    for i, (path, shape) in enumerate(leaves):
        if len(shape) == 3 and path and not names.is_bias(path[-1]):
            modules[names.owner_of(path)[:-1], shape[0]].append(i)
    return {i for members in modules.values() if len(members) > 1 for i in members}


def _slot(name: str) -> str:
    slot = re.sub(r"^(to_|w)", "", name)[0]
    return "q" if slot == "g" else slot  # AlphaFold's gate has the queries' shape


def _fits_input(
    name: str,
    shape: tuple[int, ...],
    inputs: Sequence[tuple[str, tuple[int, ...]]],
    output: tuple[int, ...],
) -> bool:
    """Whether an input projection has the heads of an attention that an output belongs to."""
    slot = _slot(name)
    if slot == "q":
        return _agree(shape, output, inputs)
    heads, head_dim = shape[1:]
    for other, query in inputs:
        agrees = _slot(other) == "q" and _agree(query, output, inputs) and query[1] % heads == 0
        if agrees and head_dim == (query[2] if slot == "k" else output[1]):
            return True
    return False


def _agree(
    query: tuple[int, ...], output: tuple[int, ...], inputs: Sequence[tuple[str, tuple[int, ...]]]
) -> bool:
    # As many heads as the width: [L, in, out] and [L, out, in] agree too, and say nothing.
    if query[0] != output[-1] or query[1] != output[0] or query[0] == query[1]:
        return False
    return query[2] == output[1] or any(
        # Values of another width than queries and keys.
        _slot(name) == "v" and value[2] == output[1] and query[1] % value[1] == 0
        for name, value in inputs
    )


def _latent_fits(
    latent: tuple[int, ...], output: tuple[int, ...], widths: Sequence[tuple[int, ...]]
) -> bool:
    """Whether ``[rank, heads, dims]`` and ``[heads, dims, d]`` have a ``[d, rank]`` beside them."""
    return (
        latent[1] == output[0]
        and latent[2] >= output[1]
        and any(d == output[2] and rank >= latent[0] for d, rank in widths)
    )
