"""What ``heads=`` takes: one word for all attention, or a declaration of attention modules.

Muon by heads orthogonalizes the part of each head, or of a few, by itself, as GLM-5 and Kimi K3 are
trained. In a kernel of two axes, `[d, heads * width]`, nothing shows where a head ends: the user
says it, by the structures that `qk_clip` takes too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from muon_jax._attention.structures import AttentionHeads, check_rule
from muon_jax._common.checks import is_positive_integer

OneWord = Literal["joint", "per_head"]


@dataclasses.dataclass(frozen=True)
class SplitHeads:
    """Attention modules whose kernels are split into heads; made by `split_heads`.

    Attributes:
      rules: patterns of modules' paths, and the structure of those that each finds first.
      heads_per_group: how many consecutive query heads form one matrix.
    """

    rules: tuple[tuple[str, AttentionHeads], ...]
    heads_per_group: int = 1


Heads = OneWord | SplitHeads | Mapping[str, AttentionHeads]
"""What `heads` takes."""


def split_heads(attention: Mapping[str, AttentionHeads], heads_per_group: int = 1) -> SplitHeads:
    """Declare attention modules whose heads, or groups of heads, are matrices of their own.

    Kernels are `[..., in, heads * width]`, or `[..., in, heads, width]`, and that of the output
    projection is `[..., heads * width, out]` or `[..., heads, width, out]`; leading axes are
    stacks. Kernels `[out, in]` are split where `muon_weight_dimension_numbers` says that they are.
    All that lies outside these modules is as under ``heads="joint"``.

    Args:
      attention: a mapping from a pattern, searched in modules' paths, to the structure of
        their heads, `MultiHead`, `GroupedQuery` or `MultiHeadLatent`; the first pattern that is
        found decides.
      heads_per_group: how many consecutive query heads form one matrix, a divisor of their number.
        Keys and values of grouped queries have fewer heads: a matrix then holds
        ``max(1, heads_per_group * kv_heads // heads)`` of them.

    Returns:
      A value for `heads` of `muon`; the mapping alone means one head for each matrix.

    Raises:
      ValueError: for an invalid pattern, and for groups that do not divide the heads; from the
        optimizer, for a pattern that finds no module, and for projections that are missing, do not
        fit, or are AdamW's.
      TypeError: for a structure of another type.

    Examples:
      >>> heads = split_heads({"self_attn": MultiHead(heads=16, head_dim=128)}, heads_per_group=4)
      >>> tx = muon(3e-4, heads=heads)
    """
    if not isinstance(attention, Mapping) or not attention:
        raise TypeError(
            "split_heads takes a mapping from patterns of modules' paths to the structure of their "
            f"heads; got {attention!r}."
        )
    if not is_positive_integer(heads_per_group):
        raise ValueError(
            f"split_heads: heads_per_group must be a positive whole number; got "
            f"{heads_per_group!r}."
        )
    for pattern, structure in attention.items():
        check_rule("heads", pattern, structure, "Leave attention of another structure joint.")
        if structure.heads % heads_per_group:
            raise ValueError(
                f"split_heads: groups of {heads_per_group} do not divide the {structure.heads} "
                f"heads of {pattern!r}; heads_per_group must be a divisor of their number."
            )
        structure.kernels(int(heads_per_group))
    return SplitHeads(tuple(attention.items()), int(heads_per_group))


def resolve_heads(heads: Any) -> OneWord | SplitHeads:
    """What `heads` says; raise where it says nothing that is known.

    Raises:
      ValueError: for an unknown word; and as `split_heads` does.
      TypeError: as `split_heads` does.
    """
    if isinstance(heads, SplitHeads):
        return heads
    if isinstance(heads, Mapping):
        # None declared, as `UseRoles.heads` says of a program without attention: all are joint.
        return split_heads(heads) if heads else "joint"
    if not isinstance(heads, str) or heads not in get_args(OneWord):
        raise ValueError(
            'heads must be "joint" or "per_head", or declare attention modules, as in '
            f'{{"self_attn": MultiHead(heads=16, head_dim=128)}} or split_heads; got {heads!r}.'
        )
    return heads  # pyright: ignore[reportReturnType]
