"""The table between tensors on disk and parameters of the model.

On disk every layer, and every expert, has matrices of its own, `[out, in]`; here layers and experts
are stacked, and matrices are `[in, out]`. A row of the table is one matrix or vector, with its
place on both sides:

    model.layers.7.self_attn.q_proj.weight         [3072, 2048]
        layers/self_attn/q_proj/kernel [6]         [2048, 3072]
    model.layers.7.mlp.experts.5.up_proj.weight    [1408, 2048]
        layers/mlp/experts/up_proj [6, 5]          [2048, 1408]

Inside of transformers 5, a layer's experts are one tensor, with gate and up behind each other. It
does not write that form by itself, but it reads it:

    model.layers.7.mlp.experts.gate_up_proj        [64, 2816, 2048], rows from 1408 on
        layers/mlp/experts/up_proj [6]             [64, 2048, 1408]
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from examples.moonlight.huggingface.config import ModelConfig
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import DenseConfig

Path = tuple[str | int, ...]

FUSED_EXPERTS = ".mlp.experts.gate_up_proj"

# A constant that old writers stored among the weights; it follows from the configuration.
ROPE_BUFFER = ".rotary_emb.inv_freq"

# What a layer has that predicts a token further ahead, and no other.
AHEAD = "eh_proj.weight"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Row(NamedTuple):
    """A matrix, a vector, or a stack of matrices, on disk and in the model.

    Attributes:
        name: The tensor on disk.
        shape: Its shape there.
        path: The parameter's path, as the keys of nested dicts.
        at: Its leading indices there: the layer, or the layer and the expert.
        transposed: Its last two axes change places.
        first: First row on disk, of a tensor in which several parameters lie.
        rows: Number of rows on disk; 0 is all of them.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    at: tuple[int, ...] = ()
    transposed: bool = False
    first: int = 0
    rows: int = 0

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of what lies `at` a place of the parameter."""
        if not self.transposed:
            return self.shape
        *stack, rows, cols = self.shape
        return (*stack, cols, self.rows or rows)


class Extent(NamedTuple):
    """How much a model has on disk.

    Attributes:
        tensors: How many.
        numbers: How many in all of them.
    """

    tensors: int
    numbers: int


def rows(config: ModelConfig, *, fused: bool = False) -> Iterator[Row]:
    """Every tensor of a model on disk, layer by layer, one at a time.

    A configuration from elsewhere may ask for any number of layers and experts: whoever reads it
    stops at the first tensor that is not there, or asks for the `extent`.

    Args:
        config: The architecture.
        fused: Experts as one tensor per layer, as transformers 5 holds them in memory.
    """
    if isinstance(config, MoonlightConfig):
        return _moonlight(config, fused)
    return _dense(config)


def table(config: ModelConfig, *, fused: bool = False) -> list[Row]:
    """All `rows` of a model that is known to be there."""
    return list(rows(config, fused=fused))


def extent(config: ModelConfig, *, fused: bool = False) -> Extent:
    """Counts what `rows` would yield, from one layer of each kind: at once, however many."""
    if isinstance(config, MoonlightConfig):
        dense = config.first_k_dense_replace if config.has_experts else 0
        kinds = {"first_layers": dense, "layers": config.num_hidden_layers - dense}
        few = min(dense, 1) if config.has_experts else 1
        one = dataclasses.replace(
            config, num_hidden_layers=1 + min(dense, 1), first_k_dense_replace=few
        )
    else:
        kinds = {"layers": config.num_hidden_layers}
        one = dataclasses.replace(config, num_hidden_layers=1)
    tensors = numbers = 0
    for row in {row.name: row for row in rows(one, fused=True)}.values():
        layers = kinds.get(str(row.path[0]), 1)
        numbers += layers * math.prod(row.shape)
        # Of experts one by one, the fused gate and up are two; and there are as many as experts.
        experts = row.shape[0] if "experts" in row.path and not fused else 1
        tensors += layers * experts * (2 if row.rows and not fused else 1)
    return Extent(tensors, numbers)


def shapes(rows: list[Row]) -> dict[str, tuple[int, ...]]:
    """Shapes on disk by name; the two rows of a fused tensor are one."""
    return {row.name: row.shape for row in rows}


def empty_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors without numbers that transformers writes, and misses.

    Its shared experts are an MLP of width 0 where there are none.
    """
    if not isinstance(config, MoonlightConfig) or config.n_shared_experts:
        return {}
    d, shapes = config.hidden_size, {}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        for row in _Place(f"model.layers.{layer}.", (), ()).mlp("mlp.shared_experts", d, 0):
            shapes[row.name] = row.shape
    return shapes


def total_size(config: ModelConfig) -> int:
    """Numbers in all tensors."""
    return extent(config).numbers


def _moonlight(c: MoonlightConfig, fused: bool) -> Iterator[Row]:
    d, e, f = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    heads, latent = c.num_attention_heads, c.kv_lora_rank
    yield Row(EMBEDDING, (c.vocab_size, d), ("embed", "embedding"))
    for layer in range(c.num_hidden_layers):
        dense = layer < c.first_k_dense_replace
        alone = dense and c.has_experts
        path: Path = ("first_layers", layer) if alone else ("layers",)
        index = () if alone else (layer - (c.first_k_dense_replace if c.has_experts else 0),)
        place = _Place(f"model.layers.{layer}.", path, index)
        yield place.vector("input_layernorm", d)
        yield place.linear("self_attn.q_proj", d, heads * c.qk_head_dim)
        yield place.linear(
            "self_attn.kv_a_proj_with_mqa", d, latent + c.qk_rope_head_dim, "self_attn.kv_a_proj"
        )
        yield place.vector("self_attn.kv_a_layernorm", latent)
        yield place.linear(
            "self_attn.kv_b_proj", latent, heads * (c.qk_nope_head_dim + c.v_head_dim)
        )
        yield place.linear("self_attn.o_proj", heads * c.v_head_dim, d)
        yield place.vector("post_attention_layernorm", d)
        if dense:
            yield from place.mlp("mlp", d, c.intermediate_size)
            continue
        yield place.linear("mlp.gate", d, e, "mlp.router")
        yield Row(
            f"{place.name}mlp.gate.e_score_correction_bias",
            (e,),
            (*path, "mlp", "router", "bias"),
            index,
        )
        if c.n_shared_experts:
            yield from place.mlp("mlp.shared_experts", d, c.n_shared_experts * f)
        yield from _fused_experts(place, e, d, f) if fused else _experts(place, e, d, f)
    yield Row("model.norm.weight", (d,), ("norm", "scale"))
    yield Row(HEAD, (c.vocab_size, d), ("lm_head", "kernel"), transposed=True)


def _dense(c: DenseConfig) -> Iterator[Row]:
    d, bias = c.hidden_size, c.attention_bias
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield Row(EMBEDDING, (c.vocab_size, d), ("embed", "embedding"))
    for layer in range(c.num_hidden_layers):
        place = _Place(f"model.layers.{layer}.", ("layers",), (layer,))
        yield place.vector("input_layernorm", d)
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield place.linear(f"self_attn.{name}", d, width)
            if bias:
                yield place.vector(f"self_attn.{name}", width, kind="bias")
        yield place.linear("self_attn.o_proj", q, d)
        yield place.vector("post_attention_layernorm", d)
        yield from place.mlp("mlp", d, c.intermediate_size)
    yield Row("model.norm.weight", (d,), ("norm", "scale"))
    if not c.tie_word_embeddings:
        yield Row(HEAD, (c.vocab_size, d), ("lm_head", "kernel"), transposed=True)


class _Place(NamedTuple):
    """A layer: what its names begin with, and where its parameters lie."""

    name: str
    path: Path
    at: tuple[int, ...]

    def linear(self, name: str, rows: int, cols: int, ours: str | None = None) -> Row:
        path = (*self.path, *(ours or name).split("."), "kernel")
        return Row(f"{self.name}{name}.weight", (cols, rows), path, self.at, transposed=True)

    def vector(self, name: str, width: int, kind: str = "scale") -> Row:
        end = "weight" if kind == "scale" else kind
        path = (*self.path, *name.split("."), kind)
        return Row(f"{self.name}{name}.{end}", (width,), path, self.at)

    def mlp(self, name: str, width: int, inner: int) -> Iterator[Row]:
        yield self.linear(f"{name}.gate_proj", width, inner)
        yield self.linear(f"{name}.up_proj", width, inner)
        yield self.linear(f"{name}.down_proj", inner, width)


def _experts(place: _Place, experts: int, width: int, inner: int) -> Iterator[Row]:
    up, down = (inner, width), (width, inner)
    for expert in range(experts):
        for name, shape in (("gate_proj", up), ("up_proj", up), ("down_proj", down)):
            yield Row(
                f"{place.name}mlp.experts.{expert}.{name}.weight",
                shape,
                (*place.path, "mlp", "experts", name),
                (*place.at, expert),
                transposed=True,
            )


def _fused_experts(place: _Place, experts: int, width: int, inner: int) -> Iterator[Row]:
    both, path = (experts, 2 * inner, width), (*place.path, "mlp", "experts")
    for name, first in (("gate_proj", 0), ("up_proj", inner)):
        yield Row(
            f"{place.name[:-1]}{FUSED_EXPERTS}",
            both,
            (*path, name),
            place.at,
            transposed=True,
            first=first,
            rows=inner,
        )
    yield Row(
        f"{place.name}mlp.experts.down_proj",
        (experts, width, inner),
        (*path, "down_proj"),
        place.at,
        transposed=True,
    )
