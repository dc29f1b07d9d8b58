r"""The table of names: what a leaf's path says about its role.

A leaf is read by its own name, or, where that is generic (``kernel``, ``weight``, ``w``, ...), by
the name of the module that owns it; indices are skipped and case does not matter. The first row
that fits decides. Leading axes that are stacks (`_stacks`) do not count.

| role             | names                                              | matrices                |
|------------------|----------------------------------------------------|-------------------------|
| unembedding head | head, heads, \*_head, unemb\*, \*logits\*,          | none: AdamW             |
|                  | classifier                                         |                         |
| embedding        | \*emb, \*embs, \*embed\*, wte, wpe, pos\*enc\*      | none: AdamW             |
| norm             | \*norm, \*norms, \*norm_0, rms, ln*, bn*           | none: AdamW             |
| bias             | \*bias\*, bq, bk, bv, bo                           | none: AdamW             |
| gain             | scale, gain, gamma, beta, g, offset, \*_scale,      | none: AdamW             |
|                  | \*_gain, layer_scale, sinks                       |                         |
| convolution      | conv, conv1, conv2d, Conv_0, \*_conv, ConvTranspose | [window and in] x [out] |
| attention input  | query, key, value, q, q_proj, wq, to_q, ...        | [d] x [heads, head_dim] |
| attention output | out, o, o_proj, out_proj, wo, to_out               | [heads, head_dim] x [d] |

A head is also recognized one module further up (``lm_head/linear/kernel``). Outside the table a
leaf of one axis longer than 1 at most is a vector and goes to AdamW, as do stacked vectors; two
axes are a matrix, "assumed matrix" in the report unless a `kernel`; more raise.

What shapes cannot tell, and you declare: a grouped convolution reads as one matrix of all its
groups; a transposed one with ``transpose_kernel=True`` with input and output exchanged; one of a
single input channel as depthwise; and ``[out, in]`` weights (Equinox) with fan-in and fan-out
exchanged, which matters to scales by `fan_out / fan_in` only.
"""

import dataclasses
import re

from optax.contrib import MuonDimensionNumbers

from muon_jax._paths import Path
from muon_jax._stacks import looks_fused

_GENERIC = re.compile(r"kernel|weights?|w|matrix|table|param")
_GENERIC_OWNER = re.compile(r"(linear|dense|proj|fc)(_?\d+)?")

_HEAD = r"(\w+_)?heads?(_?\d+)?|unemb\w*|\w*logits\w*|classifier(_?\d+)?"
_ADAMW = (
    ("unembedding head", _HEAD),
    ("embedding", r"\w*emb(s|ed\w*)?|wte|wpe|\w*pos\w*enc\w*"),
    ("norm", r"\w*norms?(_?\d+|_[a-z]{1,3})?|rms(_?\d+)?|(ln|bn)(_\w+|\d+)?"),
)
# Of the leaf alone: a module may be called "scale" and hold a matrix.
_ADAMW_LEAF = (
    ("bias", r"\w*bias\w*|b[qkvo]"),
    ("gain", r"scale|gain|gamma|beta|g|offset|\w+_(scale|gain)|sinks?"),
)
_CONVOLUTION = r"(\w*_)?(dw)?conv(\d?d)?(transpose|local)?(_?\d+|_(in|out|stem|proj))?"
_LONGEST_WINDOW = 16
# Flax's own attention is always [d, heads, head_dim]; the other names also serve plain matrices.
_FLAX_INPUT = r"query|key|value"
_INPUT = rf"{_FLAX_INPUT}|[qkv]|[qkv]_proj|w[qkv]|(query|key|value)_proj|to_[qkv]"
_FLAX_OUTPUT = r"out"
_OUTPUT = rf"{_FLAX_OUTPUT}|o|o_proj|out_proj|wo|to_out"


@dataclasses.dataclass(frozen=True)
class Role:
    """What the table says of a leaf.

    Attributes:
      reason: the role's name, as the report prints it.
      spec: the axes of its matrices; None sends it to AdamW.
    """

    reason: str
    spec: MuonDimensionNumbers | None = None


def role_of(
    path: Path, shape: tuple[int, ...], stacks: tuple[str, ...], per_head: bool
) -> Role | str:
    """The role of a leaf by its names and rank.

    Args:
      path: the lower-case names on the leaf's path, indices included.
      shape: the shape of the leaf.
      stacks: the names of its leading stack axes.
      per_head: whether each attention head is a matrix of its own.

    Returns:
      Its role, or, where names and rank do not tell, the sentence that says why.
    """
    names = [name for name in path if not name.isdigit()] or [""]
    leaf = names[-1]
    names = names[:-1] if _GENERIC.fullmatch(leaf) and len(names) > 1 else names
    name = names[-1]

    for reason, pattern in _ADAMW:
        if re.fullmatch(pattern, name):
            return Role(reason)
    for reason, pattern in _ADAMW_LEAF:
        if re.fullmatch(pattern, leaf):
            return Role(reason)
    if _GENERIC_OWNER.fullmatch(name) and len(names) > 1 and re.fullmatch(_HEAD, names[-2]):
        return Role("unembedding head")
    if not shape:
        return Role("scalar")
    if sum(length != 1 for length in shape) <= 1:
        return Role("vector")

    rank = len(shape) - len(stacks)
    if rank < 2:
        return Role("stacked vector")
    if re.fullmatch(_CONVOLUTION, name):
        if rank == 2 and min(shape[-2:]) <= _LONGEST_WINDOW:
            return Role("depthwise convolution")
        if rank > 2:
            return _convolution(leaf, shape, len(stacks))
    under = f", stack under {'/'.join(stacks)}" if stacks else ""
    if rank == 2:
        if stacks and len(shape) == 3 and re.fullmatch(f"{_FLAX_INPUT}|{_FLAX_OUTPUT}", name):
            return (
                "it may be one Flax attention kernel of three axes, or a stack of plain matrices "
                f"under {stacks[0]!r}"
            )
        known = "linear kernel" if leaf == "kernel" else "matrix" if stacks else None
        kind = known or "assumed matrix"
        fused = ", maybe fused blocks" if looks_fused(name) else ""
        return Role(kind + fused + under, MuonDimensionNumbers(-2, -1))
    for pattern, layout, joint, separate in (
        (_INPUT, "[d, heads, head_dim]", (-3, (-2, -1)), (-3, -1)),
        (_OUTPUT, "[heads, head_dim, d]", ((-3, -2), -1), (-2, -1)),
    ):
        if rank == 3 and re.fullmatch(pattern, name):
            heads = "per head" if per_head else "heads joint"
            spec = MuonDimensionNumbers(*(separate if per_head else joint))
            return Role(f"attention {layout}, {heads}{under}", spec)
    return "its names are not in the table of roles, or the axis of a stack is not plain"


def _convolution(leaf: str, shape: tuple[int, ...], stacks: int) -> Role | str:
    if leaf != "kernel":
        return "only Flax's convolution layout is known, [*window, in, out] in a leaf named kernel"
    if shape[-2] == 1:
        return Role("depthwise convolution, or of one input channel")
    reduction = tuple(range(stacks, len(shape) - 1))
    return Role("convolution [*window, in, out]", MuonDimensionNumbers(reduction, -1))
