"""What a leaf of unknown matrices most likely is: proposed in the error, and never acted upon."""

import re
from collections.abc import Sequence

from optax.contrib import MuonDimensionNumbers

from muon_jax._common.paths import Path
from muon_jax._routing import names
from muon_jax._routing.roles import Question

_ATTENTION = re.compile(r"\w*(att|qkv|c_attn|[qkvo]_proj|[qkv]_einsum|kv_einsum)\w*")
_TO_MODEL = re.compile(
    r"out\w*|o|wo|oproj|\w*out_(proj|linear)|\w*o_proj|\w*c_proj|attn_vec\w*|output\w*|o_einsum"
)
_TIME_LAYER = re.compile(r"(\w*_)?(res|residual|dilated|skip|filter|gate)(_?\d+|_conv|_layer)?")
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
    if question.window:
        return question
    core = shape[stacks:]
    name = names.names_of(path)[-1]
    layer = (
        names.is_linear(name) or _TIME_LAYER.fullmatch(name) or path[-1:] in (("kernel",), ("w",))
    )
    if sum(length != 1 for length in core) <= 2 and 1 in core[:-1] and not layer:
        # [1, 4, 384] and [10, 1, 1, 32]: learned tokens.
        return Question(question.why, "a table of rows", None)
    if len(core) == 3 and core[-1] == 2 and re.fullmatch(r"[bcd]|[bc]_?(tilde|bar)?\d?", name):
        return Question(question.why, "real and imaginary parts", None)
    if is_window_of_a_layer(name, core):
        axes = tuple(range(stacks, len(shape) - 1))
        spec = MuonDimensionNumbers(axes, -1)
        return Question(question.why, "a convolution's window [*window, in, out]", spec)
    if (spec := _of_attention(path, core, stacks, widths, per_head)) is not None:
        return Question(question.why, "attention's heads", spec)
    return question


def is_window_of_a_layer(name: str, core: tuple[int, ...]) -> bool:
    """Whether axes are a window's in a layer that is called as a linear one may be."""
    if len(core) == 3:
        return bool(_TIME_LAYER.fullmatch(name)) and core[0] <= names.LONGEST_WINDOW
    # Windows have a middle: stages of four layers, or eight of eight experts, have none.
    odd = len(core) == 4 and core[0] == core[1] and core[0] % 2 == 1 and core[0] <= 7
    return odd and not names.looks_fused(name) and min(core[2:]) > names.LONGEST_WINDOW


def _of_attention(
    path: Path, core: tuple[int, ...], stacks: int, widths: Sequence[int], per_head: bool
) -> MuonDimensionNumbers | None:
    named = names.names_of(path)
    name = named[-1]
    if re.fullmatch(r"dense|linear|proj", name) and len(named) > 1:
        name = named[-2]  # "query/dense"
    if name == "post" and len(core) == 3:  # Praxis writes it as it writes the queries' kernel
        axes = (stacks + 2) if per_head else (stacks + 1, stacks + 2)
        return MuonDimensionNumbers(axes, stacks)
    model = [axis for axis, length in enumerate(core) if length in widths]
    if not model and len(core) == 4 and names.looks_fused(name) and core[0] in (2, 3):
        model = [core.index(max(core))]
    if len(core) >= 3 and len(model) == 1 and any(_ATTENTION.fullmatch(part) for part in path):
        return _attention(name, core, model[0], stacks, per_head)
    if len(core) != 3:
        return None
    if re.fullmatch(r"w?[kv]_?b(_proj)?", name):  # one matrix for each head, of one latent
        return MuonDimensionNumbers(stacks, -1 if per_head else (stacks + 1, stacks + 2))
    blocks = core[1] == core[2] and core[0] > core[1] ** 2  # block-diagonal, as xLSTM's
    inputs = names.is_input(name) and core[0] >= max(core[1:]) and not blocks
    if names.is_latent(name) or inputs:
        return MuonDimensionNumbers(-3, -1 if per_head else (-2, -1))
    to_model = names.is_output(name) or _TO_MODEL.fullmatch(name)
    if to_model and core[0] * core[1] == core[2]:
        return MuonDimensionNumbers(-2 if per_head else (-3, -2), -1)
    return None


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
    (first, *others) = axes
    several = axes if others else first
    if _TO_MODEL.fullmatch(name):
        return MuonDimensionNumbers(several, model + stacks)
    return MuonDimensionNumbers(model + stacks, several)
