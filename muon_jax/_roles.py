r"""The table of names: what a leaf's path says about its role.

A leaf is read by its own name, or, where that is generic (``kernel``, ``weight``, ``w``, ...), by
the name of the module that owns it; list indices are skipped and case does not matter. The first
row that fits decides.

| role             | names                                              | matrices                |
|------------------|----------------------------------------------------|-------------------------|
| unembedding head | head, lm_head, unembed*, \*logits\*, classifier    | none: AdamW             |
| embedding        | \*embed\*, wte, wpe                                | none: AdamW             |
| norm             | \*norm, \*norm_0, ln*, bn*                         | none: AdamW             |
| bias             | \*bias, b, bq, bk, bv, bo                          | none: AdamW             |
| gain             | scale, gain, gamma, beta, \*_scale, \*_gain        | none: AdamW             |
| convolution      | conv*, \*_conv; leaf `kernel` of rank >= 3         | [window and in] x [out] |
| attention input  | query, key, value, q, q_proj, wq, to_q, ...        | [d] x [heads, head_dim] |
| attention output | out, o, o_proj, out_proj, wo, to_out               | [heads, head_dim] x [d] |
| stack            | rank >= 3 under layers, blocks, experts, \*moe\*,  | the last two axes       |
|                  | stages, stack, repeat, without an index            |                         |

A convolution that is depthwise (`[*window, 1, channels]`, or of rank 2) goes to AdamW, as does
every matrix of one row or one column. Outside the table a leaf of rank 0 or 1 goes to AdamW, and
one of rank 2 is a matrix: "assumed matrix" in the report, unless it is a `kernel`.
"""

import dataclasses
import re

from optax.contrib import MuonDimensionNumbers

from muon_jax._paths import Path

_GENERIC = re.compile(r"kernel|weights?|w|matrix|table|param")

_ADAMW = (
    (
        "unembedding head",
        r"((lm|mlm|cls|output)_)?head(_?\d+)?|unembed\w*|\w*logits\w*|classifier(_?\d+)?",
    ),
    ("embedding", r"\w*embed\w*|wte|wpe"),
    ("norm", r"\w*norm(_?\d+|_[a-z]{1,3})?|(ln|bn)(_\w+|\d+)?"),
)
# Of the leaf alone: a module may be called "b" or "scale" and hold a matrix.
_ADAMW_LEAF = (
    ("bias", r"\w*_?bias|b|b[qkvo]"),
    ("gain", r"scale|gain|gamma|beta|\w+_(scale|gain)"),
)
_CONVOLUTION = r"conv\w*|\w+_conv(_?\d+)?"
# Flax's own attention is always [d, heads, head_dim]; the other names also serve plain matrices,
# which a stack may hold.
_FLAX_INPUT = r"query|key|value"
_INPUT = rf"{_FLAX_INPUT}|[qkv]|[qkv]_proj|w[qkv]|(query|key|value)_proj|to_[qkv]"
_FLAX_OUTPUT = r"out"
_OUTPUT = rf"{_FLAX_OUTPUT}|o|o_proj|out_proj|wo|to_out"
_STACK = r"\w*(layers|blocks|experts|stages|stack(ed)?|repeats?)|h|\w*moe\w*|experts?_[a-z]\w*"


@dataclasses.dataclass(frozen=True)
class Role:
    """What the table says of a leaf.

    Attributes:
      reason: the role's name, as the report prints it.
      spec: the axes of its matrices; None sends it to AdamW.
    """

    reason: str
    spec: MuonDimensionNumbers | None


def role_of(path: Path, shape: tuple[int, ...], per_head: bool) -> Role | str:
    """The role of a leaf by its names and rank.

    Args:
      path: the normalised path of the leaf.
      shape: the shape of the leaf.
      per_head: whether each attention head is a matrix of its own.

    Returns:
      Its role, or, where names and rank do not tell, the sentence that says why.
    """
    rank = len(shape)
    # Flat trees hold whole paths in one key: "layers/0/kernel", "layers.0.weight".
    path = tuple(part for name in path for part in re.split(r"[/.]", name))
    names = [name.lower() for name in path if not name.isdigit()]
    leaf = names[-1] if names else ""
    generic = bool(_GENERIC.fullmatch(leaf))
    name = names[-2] if generic and len(names) > 1 else leaf

    for reason, pattern in _ADAMW:
        if re.fullmatch(pattern, name):
            return Role(reason, None)
    for reason, pattern in _ADAMW_LEAF:
        if re.fullmatch(pattern, leaf):
            return Role(reason, None)
    if rank < 2:
        return Role("vector" if rank else "scalar", None)

    stacks = _stack_axes(path)
    if re.fullmatch(_CONVOLUTION, name):
        return _convolution(leaf, shape, stacks)
    if rank == 2:
        return Role(
            "linear kernel" if leaf == "kernel" else "assumed matrix", MuonDimensionNumbers()
        )

    for pattern, flax, layout, joint, separate in (
        (_INPUT, _FLAX_INPUT, "[d, heads, head_dim]", (-3, (-2, -1)), (-3, -1)),
        (_OUTPUT, _FLAX_OUTPUT, "[heads, head_dim, d]", ((-3, -2), -1), (-2, -1)),
    ):
        if not re.fullmatch(pattern, name):
            continue
        if rank == 3 and stacks and re.fullmatch(flax, name):
            return (
                f"it may be one {layout} attention kernel, or a stack of plain matrices under "
                f"{stacks[0]!r}"
            )
        if stacks and rank - 2 <= len(stacks):
            break
        if rank - 3 <= len(stacks):
            stacked = f", stacked {rank - 3}x" if rank > 3 else ""
            heads = "per head" if per_head else "heads joint"
            spec = MuonDimensionNumbers(*(separate if per_head else joint))
            return Role(f"attention {layout}, {heads}{stacked}", spec)

    if stacks and rank - 2 <= len(stacks):
        return Role(f"stack under {stacks[0]}", MuonDimensionNumbers(-2, -1))
    return "its names are not in the table of roles"


def _stack_axes(path: Path) -> list[str]:
    """The names of stacks on the path: those that no index follows."""
    return [
        name
        for name, following in zip(path, [*path[1:], ""], strict=False)
        if re.fullmatch(_STACK, name.lower()) and not following.isdigit()
    ]


def _convolution(leaf: str, shape: tuple[int, ...], stacks: list[str]) -> Role | str:
    if len(shape) == 2 or (leaf == "kernel" and not stacks and shape[-2] == 1):
        return Role("depthwise convolution", None)
    if leaf != "kernel":
        return "only Flax's convolution layout is known, [*window, in, out] in a leaf named kernel"
    if stacks:
        return f"the axis of the stack {stacks[0]!r} cannot be told from the convolution's window"
    reduction = tuple(range(len(shape) - 1))
    return Role("convolution [*window, in, out]", MuonDimensionNumbers(reduction, -1))
