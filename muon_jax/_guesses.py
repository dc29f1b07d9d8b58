"""What a leaf of unknown matrices most likely is: proposed in the error, and never acted upon."""

import re
from collections.abc import Sequence

from optax.contrib import MuonDimensionNumbers

from muon_jax import _names as names
from muon_jax._paths import Path
from muon_jax._roles import Question

_ATTENTION = re.compile(r"\w*(att|qkv|c_attn|[qkvo]_proj|[qkv]_einsum|kv_einsum)\w*")
_TO_MODEL = re.compile(r"out\w*|o|wo|\w*o_proj|\w*c_proj|attn_vec\w*|output\w*|o_einsum")
_BLOCKS = re.compile(r"\w*(qkv|kv|c_attn|query_key_value|key_value)\w*")


def guess(
    path: Path,
    shape: tuple[int, ...],
    question: Question,
    stacks: int,
    widths: Sequence[int],
    per_head: bool,
) -> Question:
    """The question with the axes that the leaf most likely has.

    Args:
      path: the lower-case names on the leaf's path.
      shape: its shape.
      question: why its matrices cannot be known.
      stacks: how many of its leading axes are stacks.
      widths: the widths of the model's embeddings, which tell attention's inputs from its heads.
      per_head: whether each attention head is a matrix of its own.

    Returns:
      The question, with `kind` and `spec` filled in.
    """
    if "window" in question.kind:
        return question
    core = shape[stacks:]
    linear = names.is_linear(names.names_of(path)[-1])
    if sum(length != 1 for length in core) <= 2 and 1 in core[:-1] and not linear:
        # [1, 4, 384] and [10, 1, 1, 32]: learned tokens.
        return Question(question.why, "a table of rows", None)
    model = [axis for axis, length in enumerate(core) if length in widths]
    if len(core) >= 3 and len(model) == 1 and any(_ATTENTION.fullmatch(name) for name in path):
        spec = _attention(names.names_of(path)[-1], core, model[0], stacks, per_head)
        return Question(question.why, "attention's heads", spec)
    name = names.names_of(path)[-1]
    if len(core) == 3 and (
        names.is_latent(name) or (names.is_input(name) and core[0] >= max(core[1:]))
    ):
        spec = MuonDimensionNumbers(-3, -1 if per_head else (-2, -1))
        return Question(question.why, "attention's heads", spec)
    if len(core) == 3 and names.is_output(name) and core[0] * core[1] == core[2]:
        spec = MuonDimensionNumbers(-2 if per_head else (-3, -2), -1)
        return Question(question.why, "attention's heads", spec)
    return question


def _attention(
    name: str, core: tuple[int, ...], model: int, stacks: int, per_head: bool
) -> MuonDimensionNumbers:
    heads = [axis for axis in range(len(core)) if axis != model]
    if _BLOCKS.fullmatch(name) and len(heads) > 2:
        # Queries, keys and values along an axis of their own are matrices of their own.
        heads = [axis for axis in heads if core[axis] not in (2, 3)] or heads
    if per_head:
        heads = heads[-1:]
    axes = tuple(axis + stacks for axis in heads)
    several = axes if len(axes) > 1 else sum(axes)
    if _TO_MODEL.fullmatch(name):
        return MuonDimensionNumbers(several, model + stacks)
    return MuonDimensionNumbers(model + stacks, several)
