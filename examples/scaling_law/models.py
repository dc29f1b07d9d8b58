"""A run's model, of the repository's dense or Mixture-of-Experts family, and what it costs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.moonlight.model.config import MoonlightConfig, gate_scale
from examples.moonlight.model.dense import Dense, DenseConfig
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.language_model import (
    LanguageModel,
    ParameterCounts,
    count_parameters,
)
from examples.moonlight.model.layers import Linear
from examples.moonlight.model.moonlight import Moonlight
from examples.moonlight.training.attention import attention_heads
from examples.scaling_law.flops import Flops, newton_schulz, per_token
from examples.scaling_law.protocol import TOKENS_PER_PARAMETER, VOCABULARY, Run
from muon_jax import MuonDimensionNumbers, by_path, map_matrices, split_heads

# Queries at a time: skips most products behind the diagonal, which on CPU halves attention's time.
ATTENTION_BLOCK = 64

_EXPERTS, _TOP_K = 8, 2


class TwoLayerMLP(nnx.Module):
    """`down(silu(up(x)))`, four times as wide inside: `[H, 4H]` beside attention's `[H, H]`."""

    def __init__(self, hidden: int, inner: int, *, stddev: float, rngs: nnx.Rngs):
        self.up_proj = Linear(hidden, inner, stddev=stddev, rngs=rngs)
        self.down_proj = Linear(inner, hidden, stddev=stddev, rngs=rngs)

    def __call__(self, act_nd: jax.Array) -> jax.Array:
        """Maps `[n, hidden]` to `[n, hidden]`."""
        return self.down_proj(jax.nn.silu(self.up_proj(act_nd)))


class TwoLayerDense(Dense):
    """The dense family with the MLP of the paper's Table 1."""

    mlp_type = TwoLayerMLP


def dense_config(run: Run) -> DenseConfig:
    """The dense architecture of a run."""
    hidden = run.layers * run.head_dim
    # SwiGLU's third matrix is paid for by a width of 8/3, in whole vectors of 8.
    inner = 4 * hidden if run.family == "two_layer" else 8 * -(-hidden // 3)
    return DenseConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=run.layers,
        num_attention_heads=run.layers,
        num_key_value_heads=run.layers,
        intermediate_size=inner,
        max_position_embeddings=run.sequence_length,
    )


def moe_config(run: Run) -> MoonlightConfig:
    """Moonlight's architecture at a run's width: 8 experts, 2 of them and a shared one used."""
    hidden = run.layers * run.head_dim
    return MoonlightConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=run.layers,
        num_attention_heads=run.layers,
        kv_lora_rank=hidden // 2,
        qk_nope_head_dim=run.head_dim,
        qk_rope_head_dim=run.head_dim // 2,
        v_head_dim=run.head_dim,
        intermediate_size=8 * -(-hidden // 3),
        moe_intermediate_size=hidden,
        n_routed_experts=_EXPERTS,
        num_experts_per_tok=_TOP_K,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=gate_scale(_EXPERTS, _TOP_K),
        max_position_embeddings=run.sequence_length,
    )


def config_of(run: Run) -> Any:
    """The architecture of a run."""
    return moe_config(run) if run.family == "moe" else dense_config(run)


def make_model(run: Run, key: jax.Array, *, unroll: bool = False) -> LanguageModel:
    """A run's model.

    Args:
        run: Its size and family.
        key: The key of the initial weights.
        unroll: What `Execution` calls so: faster on a CPU, and the same otherwise.
    """
    execution = Execution(
        dtype=jnp.dtype(run.compute_dtype),
        unroll=unroll,
        attention_block=ATTENTION_BLOCK,
        monitor=run.watch > 0,
    )
    family = {"dense": Dense, "two_layer": TwoLayerDense, "moe": Moonlight}[run.family]
    return family(config_of(run), rngs=nnx.Rngs(key), execution=execution)


# --------------------------------------------------------------------------------------------------
# Size and cost
# --------------------------------------------------------------------------------------------------


def parameters_of(run: Run) -> ParameterCounts:
    """Counts a run's parameters, without computing one."""
    return _counted(_architecture(run))


def compute_optimal_tokens(layers: int, head_dim: int = 16) -> int:
    """Tokens of a compute-optimal run of the dense family: 20 per parameter of the body."""
    run = Run(
        part="study",
        layers=layers,
        head_dim=head_dim,
        tokens=1,
        batch=1,
        learning_rate=1.0,
        optimizer="adamw",
    )
    return TOKENS_PER_PARAMETER * parameters_of(run).body


def flops_of(run: Run) -> Flops:
    """What a run costs."""
    hidden = run.layers * run.head_dim
    body, whole = per_token(
        body=parameters_of(run).active,
        hidden=hidden,
        layers=run.layers,
        # Moonlight's queries and keys have a rotated half on top: 3/2 and 1 on average.
        attention_width=hidden * 5 // 4 if run.family == "moe" else hidden,
        sequence_length=run.sequence_length,
        vocab=VOCABULARY,
    )
    per_step = 0.0
    if run.optimizer == "muon":
        per_step = newton_schulz(_matrices(run), run.ns_coeffs, run.ns_steps)
    return Flops(body * run.trained_tokens, whole * run.trained_tokens, per_step * run.steps)


def muon_heads(run: Run) -> Any:
    """A run's `heads`: what Muon takes for a matrix in attention's projections."""
    if run.heads_per_group is None:
        return "joint"
    return split_heads({"self_attn$": attention_heads(config_of(run))}, run.heads_per_group)


def muon_leaves(run: Run) -> Any:
    """A run's `muon_weight_dimension_numbers`: the usual leaves, and those given to it besides."""
    rules = {f"^{name}/": MuonDimensionNumbers() for name in run.muon_too}
    if run.family == "moe":
        # As many experts as they are wide leave it open, to whom sees shapes only, what is a stack.
        rules["/experts/"] = MuonDimensionNumbers(-2, -1)
    return by_path(rules) if rules else None


@functools.cache
def _counted(architecture: Run) -> ParameterCounts:
    return count_parameters(_abstract(architecture))


def _matrices(run: Run) -> tuple[tuple[int, int], ...]:
    """Shapes of the matrices that Muon orthogonalizes, stacks taken apart."""
    what_they_depend_on = dataclasses.replace(
        _architecture(run),
        optimizer="muon",
        muon_too=run.muon_too,
        heads_per_group=run.heads_per_group,
    )
    return _orthogonalized(what_they_depend_on)


@functools.cache
def _orthogonalized(run: Run) -> tuple[tuple[int, int], ...]:
    params = nnx.state(_abstract(_architecture(run)), nnx.Param)
    views = jax.eval_shape(
        lambda tree: map_matrices(
            lambda x: x,
            tree,
            tree,
            muon_weight_dimension_numbers=muon_leaves(run),
            heads=muon_heads(run),
        ),
        params,
    )
    stacks = (view.shape for leaf in views.values() for view in leaf)
    return tuple(shape[-2:] for shape in stacks for _ in range(shape[0]))


def _architecture(run: Run) -> Run:
    """The run reduced to what its model depends on."""
    return Run(
        part="study",
        layers=run.layers,
        head_dim=run.head_dim,
        family=run.family,
        sequence_length=run.sequence_length,
        tokens=1,
        batch=1,
        learning_rate=1.0,
        optimizer="adamw",
    )


@functools.cache
def _abstract(run: Run) -> LanguageModel:
    return nnx.eval_shape(lambda: make_model(run, jax.random.key(0)))
