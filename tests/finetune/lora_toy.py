"""Small models of both families, with weights and adapters that hide nothing."""

import zlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from examples.finetune.lora.adapters import DropoutKey, LoraConfig, add_lora
from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.experts import RouterBias
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.model.packed import Packed

# Every axis of a mesh of eight, two by two by two, divides these.
DENSE = DenseConfig(
    vocab_size=62,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=36,
    rope_theta=100.0,
    max_position_embeddings=32,
    attention_bias=True,
    tie_word_embeddings=True,
)
LLAMA = DenseConfig(
    vocab_size=62,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=36,
    rope_theta=100.0,
    max_position_embeddings=32,
)
MOONLIGHT = MoonlightConfig(
    vocab_size=62,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    intermediate_size=36,
    moe_intermediate_size=20,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    rope_theta=100.0,
    max_position_embeddings=32,
)
FAMILIES = {"dense": DENSE, "moonlight": MOONLIGHT}
ALL = {"dense": ("all-linear",), "moonlight": ("all-linear", "experts")}

# Programs that run once or twice are compiled fast, not well.
OPTIONS = {"xla_backend_optimization_level": 0}


def make_plain(config: Any, execution: Execution | None = None) -> Any:
    """A model as it starts."""
    family = Moonlight if isinstance(config, MoonlightConfig) else Dense
    return family(config, rngs=nnx.Rngs(0), execution=execution)


def make(config: Any, execution: Execution | None = None, lora: LoraConfig | None = None) -> Any:
    """A model whose weights have std 0.2, with adapters of which B is not zero."""
    model = make_plain(config, execution)
    if lora is not None:
        add_lora(model, lora, nnx.Rngs(1))
    graphdef, params, bias, keys = nnx.split(model, nnx.Param, RouterBias, DropoutKey)
    where = model.execution.sharding

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        # By its name: adapters beside it change no weight.
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        value = rng.standard_normal(leaf.shape)
        if "scale" in name:
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif "embedding" not in name:
            value *= 0.2
        place = where.place(*where.param_spec(path, leaf.shape))
        return jax.device_put(value.astype(np.float32), place)

    params, bias = (jax.tree_util.tree_map_with_path(draw, x) for x in (params, bias))
    return nnx.merge(graphdef, params, bias, keys)


def packed_rows(batch: int, time: int) -> tuple[np.ndarray, Packed]:
    """Random tokens, in rows of three samples of other lengths in each row, and padding."""
    rng = np.random.default_rng(2)
    segment, position = np.zeros((2, batch, time), np.int32)
    for row in range(batch):
        lengths = rng.permutation([3, time // 4 - 1, time // 3])
        there = int(lengths.sum())
        segment[row, :there] = np.repeat([1, 2, 3], lengths)
        position[row] = np.concatenate([np.arange(n) for n in (*lengths, time - there)])
    return rng.integers(0, 62, (batch, time)).astype(np.int32), Packed(segment, position)


def samples(packed: Packed) -> list[tuple[int, slice]]:
    """Of each sample, its row and its columns."""
    found = []
    for row, segment_t in enumerate(np.asarray(packed.segment_bt)):
        for number in range(1, segment_t.max() + 1):
            (columns,) = np.nonzero(segment_t == number)
            found.append((row, slice(columns[0], columns[-1] + 1)))
    return found
