"""The matrices of real models, by shape: what `benchmarks.orthogonalize` and `accelerator` take.

Each table is read from the model's configuration. Qwen's and Moonlight's are built from it without
memory, and routed as `muon` routes their leaves; GPT-2 is not among the example's models, so its
layer is written out here. A tall matrix counts with the wide one of its sides: Newton-Schulz runs
on the smaller Gram matrix of either.
"""

import collections
import dataclasses
import functools
from typing import Literal

from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.huggingface.pretrained import abstract_model
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig
from examples.moonlight.model.execution.options import Execution
from muon_jax import routing_report

Model = Literal["gpt2-small", "qwen2.5-7b", "moonlight-16b-a3b", "moonlight-tiny"]

TITLES: dict[str, str] = {
    "gpt2-small": "GPT-2 small",
    "qwen2.5-7b": "Qwen2.5-7B",
    "moonlight-16b-a3b": "Moonlight-16B-A3B",
    "moonlight-tiny": "Moonlight `tiny`",
}

# n_embd and n_layer of openai-community/gpt2, whose inner width is 4 n_embd.
GPT2_WIDTH, GPT2_LAYERS = 768, 12

# What a matrix depends on in the config.json of Qwen/Qwen2.5-7B.
QWEN = DenseConfig(
    vocab_size=152_064,
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18_944,
    max_position_embeddings=131_072,
    rope_theta=1_000_000.0,
    attention_bias=True,
)

_CONFIGS: dict[str, ModelConfig] = {
    "qwen2.5-7b": QWEN,
    "moonlight-16b-a3b": MoonlightConfig.preset("moonlight-16b-a3b"),
    "moonlight-tiny": MoonlightConfig.preset("tiny"),
}


@dataclasses.dataclass(frozen=True, order=True)
class MatrixShape:
    """A shape, and how many matrices of it Muon has in a model.

    Attributes:
      model: a name of `TITLES`.
      rows: the shorter side.
      cols: the longer side.
      count: how many matrices the model has, tall ones included.
    """

    model: Model
    rows: int
    cols: int
    count: int

    def __str__(self) -> str:
        return f"{self.model}/{self.rows}x{self.cols}"


@functools.cache
def matrices_of(model: Model) -> tuple[MatrixShape, ...]:
    """A model's shapes, the one with the most entries in all its matrices first."""
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for fan_in, fan_out, batch in _matrices(model):
        rows, cols = sorted((fan_in, fan_out))
        counts[rows, cols] += batch
    shapes = [MatrixShape(model, *sides, count) for sides, count in counts.items()]
    return tuple(sorted(shapes, key=lambda s: (-s.rows * s.cols * s.count, s)))


def gpt2_leaves() -> dict[str, tuple[int, int]]:
    """GPT-2 small's kernels, path -> [in, out]; queries, keys and values are one kernel."""
    width = GPT2_WIDTH
    layer = {
        "attn/c_attn": (width, 3 * width),
        "attn/c_proj": (width, width),
        "mlp/c_fc": (width, 4 * width),
        "mlp/c_proj": (4 * width, width),
    }
    return {
        f"h/{i}/{name}/kernel": shape for i in range(GPT2_LAYERS) for name, shape in layer.items()
    }


def _matrices(model: Model) -> list[tuple[int, int, int]]:
    if model == "gpt2-small":
        return [(*shape, 1) for shape in gpt2_leaves().values()]
    _, params, _ = abstract_model(_CONFIGS[model], Execution())
    rows = routing_report(params).rows
    return [(fan_in, fan_out, batch) for row in rows for batch, fan_in, fan_out in row.matrices]
