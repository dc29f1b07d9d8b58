"""What a model's parameters are, as far as an optimizer's plan depends on them."""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Orientation = Literal["in_out", "out_in"]


class Tensor(NamedTuple):
    """One tensor of a model on disk.

    Attributes:
      shape: its shape.
      dtype: its dtype as JAX calls it, such as ``"bfloat16"``.
    """

    shape: tuple[int, ...]
    dtype: str


class Model(NamedTuple):
    """A model on disk.

    Attributes:
      kind: where it was read from, for people: ``"Hugging Face directory, model_type qwen2"``.
      tensors: what it holds, by name.
      orientation: how matrices of two axes lie: ``[in, out]`` as in JAX, or ``[out, in]`` as in
        PyTorch.
    """

    kind: str
    tensors: dict[str, Tensor]
    orientation: Orientation


# What checkpoints hold beside parameters. No gradient reaches them: constants that follow from the
# configuration, statistics, and the bias that balances DeepSeek-V3's experts.
_BUFFERS = re.compile(
    r"(^|[/.])(inv_freq|original_inv_freq|position_ids|masked_bias|num_batches_tracked|"
    r"running_mean|running_var|e_score_correction_bias)$"
)
# GPT-2's causal mask, [1, 1, positions, positions], is called like a bias.
_MASK = re.compile(r"(^|[/.])(attn|attention)[/.]bias$")


def split_trained(
    tensors: Mapping[str, Tensor], frozen: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are trained, and of each of the others why it is not.

    Args:
      tensors: all of them, by name.
      frozen: a pattern for the names of parameters that the user does not train.
    """
    trained, others = {}, {}
    for name, tensor in tensors.items():
        if _BUFFERS.search(name) or (_MASK.search(name) and len(tensor.shape) == 4):
            others[name] = "a buffer, which no gradient reaches"
        elif not tensor.dtype.startswith(("float", "bfloat", "complex")):
            others[name] = f"{tensor.dtype}, which no gradient reaches"
        elif frozen is not None and re.search(frozen, name):
            others[name] = "frozen"
        else:
            trained[name] = tensor
    return trained, others
