"""Moonlight, the Mixture-of-Experts transformer that Muon was scaled on, in one file read downward.

The architecture is DeepSeek-V3's (arXiv 2412.19437, section 2.1) at the size of Moonlight-16B-A3B
(arXiv 2502.16982): multi-head latent attention, a dense first layer, then layers of routed and
shared experts whose load is balanced by a bias instead of an auxiliary loss.

Arrays carry their shape as a suffix, and einsum strings use the same letters:

    b batch      n tokens, b*t flattened    h heads               e routed experts
    t time       d hidden                   p q/k width per head  f width of an expert
    s time read  v vocabulary               r its rope part       k experts per token
    l layers     z latent of keys, values   w value width per head

Between the embedding and the head, activations stay `[n, d]`: every linear layer and its weight
gradient is then a plain matrix product, which XLA:CPU runs up to three times faster than one over
`[b, t, d]`. Parameters are float32 whatever the compute dtype: at a learning rate times weight
decay of 3e-5, decay would vanish in a bfloat16 weight.

On a mesh the batch lies over `BATCH_AXES`, and XLA derives the rest from where the parameters lie
(`sharding.py`), but for routing and the routed experts, where what each device does is written.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

# DeepSeek-V3 builds this norm with its class's default epsilon, not with the configuration's.
LATENT_NORM_EPS = 1e-6

EXPERT_ROUTES = ("dense", "ragged")

MESH_AXES = ("data", "expert", "tensor")

# Outside of the experts, the axis that shards them shards the batch: no device repeats another's
# attention.
BATCH_AXES = ("data", "expert")


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoonlightConfig:
    """Architecture of a Moonlight model; the fields are named as in Hugging Face's `deepseek_v3`.

    What the family fixes is not a field: queries have no latent (`q_lora_rank` null), experts form
    one group (`n_group` 1), scores are sigmoids normalised over the chosen experts, and the head is
    not tied to the embedding.

    Attributes:
        vocab_size: Rows of the embedding and columns of the head.
        hidden_size: Width d of the residual stream.
        num_hidden_layers: Decoder layers, the dense ones included.
        num_attention_heads: Query, key and value heads.
        kv_lora_rank: Width of the latent from which keys and values are expanded.
        qk_nope_head_dim: Width per head of the part of queries and keys without position.
        qk_rope_head_dim: Width of the rotated part; even. Its key is shared by all heads.
        v_head_dim: Width of values per head.
        intermediate_size: Inner width of the MLP of the dense layers.
        moe_intermediate_size: Inner width of one expert.
        n_routed_experts: Experts among which the router chooses.
        num_experts_per_tok: Routed experts that each token uses.
        n_shared_experts: Experts that every token uses, fused into one MLP.
        first_k_dense_replace: Leading layers with a dense MLP in the place of experts.
        routed_scaling_factor: Gate scale of the routed experts' sum, see `gate_scale`.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Epsilon of every norm but the latent's.
        max_position_embeddings: Longest sequence accepted.
        initializer_range: Standard deviation of every initial matrix.
        experts: How routed experts are computed. "dense" runs every expert on every token: the fast
            route for few small experts, and on CPU. "ragged" sorts tokens by expert and runs only
            the chosen ones.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    max_position_embeddings: int
    rope_theta: float = 50_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    experts: str = "dense"

    def __post_init__(self):
        """Raises ValueError for a field, or a pair of fields, that no model can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                least = 0 if field.name == "first_k_dense_replace" else 1
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(f"{field.name} must be an integer >= {least}, got {value!r}.")
            elif field.type is float and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} must be a positive finite number, got {value!r}.")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                "qk_rope_head_dim must be even, because rope rotates pairs; "
                f"got {self.qk_rope_head_dim}."
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                f"n_routed_experts ({self.n_routed_experts})."
            )
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must leave at least one of "
                f"the num_hidden_layers ({self.num_hidden_layers}) to the experts."
            )
        if self.experts not in EXPERT_ROUTES:
            raise ValueError(f"experts must be one of {EXPERT_ROUTES}, got {self.experts!r}.")

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def preset(cls, name: str) -> "MoonlightConfig":
        """Returns a named configuration; change single fields with `dataclasses.replace`.

        Args:
            name: "moonlight-16b-a3b", the published model; "small" (197M parameters), for a
                single GPU or TPU; "tiny" (2.1M parameters), for a few minutes on two CPU cores.

        Raises:
            ValueError: No preset has this name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}.")
        return PRESETS[name]


# The gate scales are those printed with Figure 6 of arXiv 2502.16982; `gate_scale` derives them.
PRESETS = {
    "moonlight-16b-a3b": MoonlightConfig(
        vocab_size=163_840,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=11_264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        max_position_embeddings=8192,
        experts="ragged",
    ),
    "small": MoonlightConfig(
        vocab_size=32_768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=2048,
        moe_intermediate_size=256,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.991,
        max_position_embeddings=2048,
        experts="ragged",
    ),
    "tiny": MoonlightConfig(
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=384,
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.409,
        max_position_embeddings=128,
    ),
}


def gate_scale(experts: int, top_k: int, *, samples: int = 50_000, seed: int = 0) -> float:
    """Simulates the gate scale that gives routed experts the weight of one expert (Figure 6).

    Normalised weights p over k independent experts of unit RMS sum to an output of RMS `|p|_2`, so
    the scale is the mean of `1 / |p|_2` over Gaussian router logits (arXiv 2502.16982, App. C):
    `sqrt(k)` if the chosen scores were equal, a little less because they are not.

    Args:
        experts: Routed experts per layer.
        top_k: Experts chosen per token.
        samples: Simulated tokens; the standard error is below 1e-4 for the presets.
        seed: Seed of the NumPy generator, so that the result is deterministic.

    Returns:
        The scale, a Python float.

    Raises:
        ValueError: `top_k` is not between 1 and `experts`.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be between 1 and experts ({experts}), got {top_k}.")
    logits_ne = np.random.default_rng(seed).standard_normal((samples, experts))
    score_nk = 1 / (1 + np.exp(-np.partition(logits_ne, experts - top_k, axis=1)[:, -top_k:]))
    weight_nk = score_nk / score_nk.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.linalg.norm(weight_nk, axis=1)))


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


class RouterBias(nnx.Variable):
    """The bias that steers expert choice: no `nnx.Param`, so no gradient and no weight decay."""


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """A float32 parameter from N(0, stddev^2), the same bits eager, in jit and on any mesh."""
    normal = jax.random.normal(rngs.params(), shape, jnp.float32)
    # In jit, XLA would fold stddev into normal's own last factor, which rounds otherwise.
    return nnx.Param(stddev * jax.lax.optimization_barrier(normal))


class Linear(nnx.Module):
    """`x @ kernel`, without bias, in the dtype of `x`; the kernel is float32 `[in, out]`."""

    def __init__(self, rows: int, cols: int, *, stddev: float, rngs: nnx.Rngs):
        self.kernel = _normal(rngs, (rows, cols), stddev)

    def __call__(self, x: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
        """Maps `[n, in]` to `[n, out]`; `out_dtype` float32 leaves the accumulator unrounded."""
        return jnp.dot(x, self.kernel[...].astype(x.dtype), preferred_element_type=out_dtype)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)`, in float32, returned in the dtype of `x`."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x_nd: jax.Array) -> jax.Array:
        """Normalises the last axis of `[n, width]`."""
        wide_nd = x_nd.astype(jnp.float32)
        mean_n1 = jnp.mean(jnp.square(wide_nd), axis=-1, keepdims=True)
        return (wide_nd * jax.lax.rsqrt(mean_n1 + self.eps) * self.scale[...][None]).astype(
            x_nd.dtype
        )


def rope_table(time: int, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `t * theta^(-2i / width)`, float32 `[time, width / 2]`."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = jnp.arange(time, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_bthr: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (0, 1), (2, 3), ... of the last axis: the interleaved layout of the weights.

    Args:
        x_bthr: Queries or keys, `[batch, time, heads, rope width]`.
        table: What `rope_table` returned for this time and width.

    Returns:
        The rotated array, in the dtype of `x_bthr`; the rotation itself is float32, because
        bfloat16 could not tell positions beyond 256 apart.
    """
    cos, sin = (half[None, :, None, :] for half in table)
    pairs = x_bthr.astype(jnp.float32).reshape(*x_bthr.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_bthr.shape).astype(x_bthr.dtype)


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V3, Eq. 1-11, without the latent of the queries).

    Keys and values are expanded per head from one normalised latent of width z. Position enters
    through separate "decoupled" components: r extra dimensions of each query head, and one rotated
    key that all heads share. A decoder would cache only the latent and that key.
    """

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs):
        c, heads, std = config, config.num_attention_heads, config.initializer_range
        kv_width = c.qk_nope_head_dim + c.v_head_dim
        self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim, stddev=std, rngs=rngs)
        self.kv_a_proj = Linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, stddev=std, rngs=rngs
        )
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * kv_width, stddev=std, rngs=rngs)
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, stddev=std, rngs=rngs)
        self.config = config

    def __call__(self, act_nd: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Attends causally within each of `batch` sequences.

        Args:
            act_nd: Normalised activations `[batch * time, hidden]`.
            batch: Sequences in `act_nd`.

        Returns:
            The output `[batch * time, hidden]`, and each head's largest attention logit, float32
            `[heads]`: after scaling, before softmax, over causal positions.
        """
        c = self.config
        time, heads = act_nd.shape[0] // batch, c.num_attention_heads
        table = rope_table(time, c.qk_rope_head_dim, c.rope_theta)

        q_bthp = self.q_proj(act_nd).reshape(batch, time, heads, c.qk_head_dim)
        q_nope, q_rope = jnp.split(q_bthp, [c.qk_nope_head_dim], axis=-1)
        latent_nz, k_rope_nr = jnp.split(self.kv_a_proj(act_nd), [c.kv_lora_rank], axis=-1)
        kv_nh = self.kv_b_proj(self.kv_a_layernorm(latent_nz))
        kv_bsh = kv_nh.reshape(batch, time, heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v_bshw = jnp.split(kv_bsh, [c.qk_nope_head_dim], axis=-1)
        k_rope = apply_rope(k_rope_nr.reshape(batch, time, 1, c.qk_rope_head_dim), table)
        k_rope = jnp.broadcast_to(k_rope, (batch, time, heads, c.qk_rope_head_dim))
        q_bthp = jnp.concatenate([q_nope, apply_rope(q_rope, table)], axis=-1)
        k_bshp = jnp.concatenate([k_nope, k_rope], axis=-1)

        logit_bhts = jnp.einsum(
            "bthp,bshp->bhts", q_bthp, k_bshp, preferred_element_type=jnp.float32
        )
        causal_ts = jnp.tril(jnp.ones((time, time), bool))
        logit_bhts = jnp.where(causal_ts[None, None], logit_bhts * c.qk_head_dim**-0.5, -jnp.inf)
        max_logit_h = jax.lax.stop_gradient(logit_bhts).max(axis=(0, 2, 3))
        prob_bhts = jax.nn.softmax(logit_bhts, axis=-1).astype(act_nd.dtype)
        out_bthw = jnp.einsum("bhts,bshw->bthw", prob_bhts, v_bshw)
        return self.o_proj(out_bthw.reshape(batch * time, heads * c.v_head_dim)), max_logit_h


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, inner: int, *, stddev: float, rngs: nnx.Rngs):
        self.gate_proj = Linear(hidden, inner, stddev=stddev, rngs=rngs)
        self.up_proj = Linear(hidden, inner, stddev=stddev, rngs=rngs)
        self.down_proj = Linear(inner, hidden, stddev=stddev, rngs=rngs)

    def __call__(self, act_nd: jax.Array) -> jax.Array:
        """Maps `[n, hidden]` to `[n, hidden]`."""
        return self.down_proj(jax.nn.silu(self.gate_proj(act_nd)) * self.up_proj(act_nd))


class Routing(NamedTuple):
    """Where the tokens of one layer go.

    Attributes:
        expert_nk: Chosen experts, int32 `[tokens, k]`.
        weight_ne: Weight of every expert's output, float32 `[tokens, experts]`, zero for those not
            chosen.
        load_e: Tokens that chose each expert, int32 `[experts]`.
    """

    expert_nk: jax.Array
    weight_ne: jax.Array
    load_e: jax.Array


class Router(nnx.Module):
    """Sigmoid routing with a bias for balance (DeepSeek-V3, Eq. 12-16; Moonlight, App. C)."""

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        shape = (config.hidden_size, config.n_routed_experts)
        self.kernel = _normal(rngs, shape, config.initializer_range)
        self.bias = RouterBias(jnp.zeros((config.n_routed_experts,), jnp.float32))
        self.config = config
        self.mesh = mesh

    def __call__(self, act_nd: jax.Array) -> Routing:
        """Chooses by score plus bias, and weighs by the score alone.

        Logits are float32 whatever the compute dtype, at full precision on every device: a rounded
        logit does not perturb the output a little, it sends the token elsewhere.
        """
        c = self.config
        logit_ne = jnp.dot(act_nd.astype(jnp.float32), self.kernel[...], precision="highest")
        score_ne = jax.nn.sigmoid(logit_ne)
        expert_nk = self._choose(jax.lax.stop_gradient(score_ne) + self.bias[...][None])
        # A comparison instead of gathers: it fuses, and so does its gradient.
        chosen_ne = (expert_nk[:, :, None] == jnp.arange(c.n_routed_experts)[None, None, :]).any(
            axis=1
        )
        score_ne = jnp.where(chosen_ne, score_ne, 0.0)
        weight_ne = (
            score_ne / (score_ne.sum(axis=-1, keepdims=True) + 1e-20) * c.routed_scaling_factor
        )
        return Routing(expert_nk, weight_ne, chosen_ne.sum(axis=0, dtype=jnp.int32))

    def _choose(self, score_ne: jax.Array) -> jax.Array:
        def choose(score_ne: jax.Array) -> jax.Array:
            return jax.lax.top_k(score_ne, self.config.num_experts_per_tok)[1]

        if self.mesh is None:
            return choose(score_ne)
        # Left to propagation, XLA's top-k gathers the scores of all tokens.
        tokens = P(BATCH_AXES)
        return jax.shard_map(choose, mesh=self.mesh, in_specs=tokens, out_specs=tokens)(score_ne)


class Experts(nnx.Module):
    """The routed experts, one SwiGLU each, as stacks of matrices `[experts, in, out]`."""

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        c = config
        into = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
        out = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.gate_proj = _normal(rngs, into, c.initializer_range)
        self.up_proj = _normal(rngs, into, c.initializer_range)
        self.down_proj = _normal(rngs, out, c.initializer_range)
        self.route = c.experts
        self.mesh = mesh

    def __call__(self, act_nd: jax.Array, routing: Routing) -> jax.Array:
        """Weighted sum of the chosen experts' outputs, `[n, hidden]` in the dtype of `act_nd`."""
        stacks = [
            w[...].astype(act_nd.dtype) for w in (self.gate_proj, self.up_proj, self.down_proj)
        ]
        if self.route == "ragged":
            return _ragged_experts(act_nd, routing, *stacks)
        if self.mesh is None:
            return _dense_experts(act_nd, routing.weight_ne, *stacks)
        return _dense_experts_on_mesh(self.mesh, act_nd, routing.weight_ne, *stacks)


def _dense_experts(
    act_nd: jax.Array,
    weight_ne: jax.Array,
    gate_edf: jax.Array,
    up_edf: jax.Array,
    down_efd: jax.Array,
) -> jax.Array:
    """Runs every expert on every token, as one MLP of width e*f with weighted inner units.

    Weighting before the down projection lets that product sum over experts and inner units at once,
    so that three products of plain matrices remain and no `[n, e, d]` array appears.
    """
    experts, hidden, inner = gate_edf.shape

    def widen(w_edf: jax.Array) -> jax.Array:
        return w_edf.transpose(1, 0, 2).reshape(hidden, experts * inner)

    inner_nf = jax.nn.silu(act_nd @ widen(gate_edf)) * (act_nd @ widen(up_edf))
    inner_nef = inner_nf.reshape(-1, experts, inner) * weight_ne.astype(act_nd.dtype)[:, :, None]
    return inner_nef.reshape(-1, experts * inner) @ down_efd.reshape(experts * inner, hidden)


def _dense_experts_on_mesh(
    mesh: Mesh, act_nd: jax.Array, weight_ne: jax.Array, *stacks: jax.Array
) -> jax.Array:
    """The dense route where experts lie over `expert` and their inner units over `tensor`.

    Each device runs its part of its experts on the tokens of its `data` group: those are gathered
    over `expert`, and the partial outputs summed where they came from. With propagation alone the
    merged axis e*f has no sharding, and XLA gathers the weights instead.
    """

    def on_device(act_nd: jax.Array, weight_ne: jax.Array, *stacks: jax.Array) -> jax.Array:
        group_nd = jax.lax.all_gather(act_nd, "expert", tiled=True)
        weight_ne = jax.lax.all_to_all(weight_ne, "expert", 1, 0, tiled=True)
        partial_nd = _dense_experts(group_nd, weight_ne, *stacks)
        return jax.lax.psum(jax.lax.psum_scatter(partial_nd, "expert", tiled=True), "tensor")

    tokens, into, out = P(BATCH_AXES), P("expert", None, "tensor"), P("expert", "tensor")
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(tokens, tokens, into, into, out), out_specs=tokens
    )
    return mapped(act_nd, weight_ne, *stacks)


def _ragged_experts(
    act_nd: jax.Array, routing: Routing, gate_edf: jax.Array, up_edf: jax.Array, down_efd: jax.Array
) -> jax.Array:
    """Runs each token's chosen experts only: sorts (token, choice) pairs by expert, and unsorts."""
    top_k = routing.expert_nk.shape[1]
    order = jnp.argsort(routing.expert_nk.reshape(-1), stable=True)
    sorted_act = act_nd[order // top_k]
    # ragged_dot has no rule for meshes with Explicit axes yet (jax 0.10). Elsewhere a no-op.
    grouped_dot: Any = jax.sharding.auto_axes(jax.lax.ragged_dot, out_sharding=jax.P(None, None))
    gate = grouped_dot(sorted_act, gate_edf, routing.load_e)
    up = grouped_dot(sorted_act, up_edf, routing.load_e)
    sorted_out = grouped_dot(jax.nn.silu(gate) * up, down_efd, routing.load_e)
    out_nkd = sorted_out[jnp.argsort(order)].reshape(-1, top_k, act_nd.shape[1])
    weight_nk = jnp.take_along_axis(routing.weight_ne, routing.expert_nk, axis=1)
    return jnp.einsum("nkd,nk->nd", out_nkd, weight_nk.astype(act_nd.dtype))


class MoE(nnx.Module):
    """Routed experts, weighted, plus shared experts, which every token uses unweighted."""

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        c = config
        self.router = Router(c, rngs=rngs, mesh=mesh)
        self.experts = Experts(c, rngs=rngs, mesh=mesh)
        self.shared_experts = MLP(
            c.hidden_size,
            c.n_shared_experts * c.moe_intermediate_size,
            stddev=c.initializer_range,
            rngs=rngs,
        )

    def __call__(self, act_nd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the output `[n, hidden]` and the tokens per expert, int32 `[experts]`."""
        routing = self.router(act_nd)
        return self.experts(act_nd, routing) + self.shared_experts(act_nd), routing.load_e


class DecoderLayer(nnx.Module):
    """Pre-norm residual attention, then a pre-norm residual MLP, dense or of experts."""

    def __init__(
        self, config: MoonlightConfig, *, dense: bool, rngs: nnx.Rngs, mesh: Mesh | None = None
    ):
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = LatentAttention(c, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = (
            MLP(c.hidden_size, c.intermediate_size, stddev=c.initializer_range, rngs=rngs)
            if dense
            else MoE(c, rngs=rngs, mesh=mesh)
        )

    def __call__(
        self, act_nd: jax.Array, batch: int
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Returns activations `[n, hidden]`, experts' load (None if dense) and largest logits."""
        out_nd, max_logit_h = self.self_attn(self.input_layernorm(act_nd), batch)
        act_nd = act_nd + out_nd
        normed_nd = self.post_attention_layernorm(act_nd)
        if isinstance(self.mlp, MoE):
            out_nd, load_e = self.mlp(normed_nd)
        else:
            out_nd, load_e = self.mlp(normed_nd), None
        return act_nd + out_nd, load_e, max_logit_h


# --------------------------------------------------------------------------------------------------
# The model, its loss and its balance
# --------------------------------------------------------------------------------------------------


class Embed(nnx.Module):
    """Rows of a table by token id."""

    def __init__(
        self, vocab: int, hidden: int, *, stddev: float, rngs: nnx.Rngs, mesh: Mesh | None = None
    ):
        self.embedding = _normal(rngs, (vocab, hidden), stddev)
        self.mesh = mesh

    def __call__(self, tokens_n: jax.Array) -> jax.Array:
        """Maps ids `[n]` to float32 `[n, hidden]`; an id outside the table gives NaN, not a row."""
        table_vd = self.embedding[...]
        if self.mesh is not None:
            # For its gradient. Laid out as the optimizer's state at once, over more axes, that
            # would take the tokens of all devices to each.
            divides = table_vd.shape[0] % self.mesh.shape["tensor"] == 0
            rows = NamedSharding(self.mesh, P("tensor" if divides else None))
            table_vd = jax.lax.with_sharding_constraint(table_vd, rows)
        return jnp.take(table_vd, tokens_n, axis=0)


class ModelStats(NamedTuple):
    """What training watches, measured in the forward pass.

    Attributes:
        load_le: Tokens routed to each expert, int32 `[layers with experts, experts]`. Sums over
            replicas and micro-batches are again loads.
        max_logit_lh: Largest attention logit, float32 `[layers, heads]`.
    """

    load_le: jax.Array
    max_logit_lh: jax.Array


class Moonlight(nnx.Module):
    """The language model: tokens to next-token logits.

    Args:
        config: The architecture.
        rngs: Source of the initial weights, stream `params`.
        dtype: Compute dtype of everything between the embedding and the logits; norms, the softmax,
            routing and the loss are float32 in any case, and so are the parameters.
        mesh: Devices to run on, with the axes `MESH_AXES`, all `AxisType.Auto`. The batch must
            divide by `BATCH_AXES` then, and the experts' route be dense. None is one device.

    Raises:
        ValueError: The experts' route is not dense on a mesh.
    """

    def __init__(
        self,
        config: MoonlightConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
    ):
        c = config
        if mesh is not None and c.experts != "dense":
            raise ValueError(
                f"on a mesh, experts are computed by the dense route only; got {c.experts!r}."
            )
        self.embed = Embed(
            c.vocab_size, c.hidden_size, stddev=c.initializer_range, rngs=rngs, mesh=mesh
        )
        self.layers = nnx.List(
            DecoderLayer(c, dense=i < c.first_k_dense_replace, rngs=rngs, mesh=mesh)
            for i in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, stddev=c.initializer_range, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def __call__(self, tokens_bt: jax.Array) -> tuple[jax.Array, ModelStats]:
        """Logits for the token after each position.

        Args:
            tokens_bt: Token ids, an integer array `[batch, time]`.

        Returns:
            Logits, float32 `[batch, time, vocab]`, and the statistics of this forward pass.

        Raises:
            ValueError: The tokens are not an integer matrix, longer than `max_position_embeddings`,
                or sharded over Explicit mesh axes.
        """
        if tokens_bt.ndim != 2 or not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
            raise ValueError(
                "tokens must be an integer array [batch, time], "
                f"got {tokens_bt.dtype}{list(tokens_bt.shape)}."
            )
        # Gathers and the split of [n] into [b, t] have no unique sharding on Explicit axes.
        spec = jax.typeof(tokens_bt).sharding.spec
        if any(spec):
            raise ValueError(
                f"tokens are sharded as {spec} over an Explicit mesh: "
                "shard the batch over mesh axes of AxisType.Auto."
            )
        batch, time = tokens_bt.shape
        if time > self.config.max_position_embeddings:
            raise ValueError(
                f"the sequence has {time} tokens, and max_position_embeddings is "
                f"{self.config.max_position_embeddings}: shorten it, or replace the field."
            )
        act_nd = self.embed(tokens_bt.reshape(-1)).astype(self.dtype)
        loads, max_logits = [], []
        for layer in self.layers:
            act_nd, load_e, max_logit_h = layer(act_nd, batch)
            max_logits.append(max_logit_h)
            if load_e is not None:
                loads.append(load_e)
        logits_nv = self.lm_head(self.norm(act_nd), out_dtype=jnp.float32)
        logits_btv = logits_nv.reshape(batch, time, -1)
        return logits_btv, ModelStats(jnp.stack(loads), jnp.stack(max_logits))


def next_token_loss(model: Moonlight, tokens_bt: jax.Array) -> tuple[jax.Array, ModelStats]:
    """Mean cross-entropy of predicting each token from those before it.

    Args:
        model: The model.
        tokens_bt: Integer array `[batch, time + 1]`: one column more than the model reads.

    Returns:
        The loss in nats per predicted token, a float32 scalar, and the forward pass's statistics.
    """
    logits_btv, stats = model(tokens_bt[:, :-1])
    target_bt1 = tokens_bt[:, 1:, None]
    target_logit_bt = jnp.take_along_axis(logits_btv, target_bt1, axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_btv, axis=-1) - target_logit_bt), stats


def update_router_bias(model: Moonlight, load_le: jax.Array, rate: float | jax.Array) -> None:
    """Moves every router's bias towards balance, in place: once per optimizer step, also in jit.

    `e = mean(load) - load; b += rate * (sign(e) - mean(sign(e)))` (Moonlight, App. C). Subtracting
    the mean keeps the biases' sum constant, where DeepSeek-V3's rule lets all of them drift
    together.

    Args:
        model: The model, mutated.
        load_le: Tokens routed to each expert during this optimizer step, summed over replicas and
            micro-batches, `[layers with experts, experts]`.
        rate: The bias update rate u: 1e-3 in Moonlight's pretraining, 0 in cooldown and
            fine-tuning.

    Raises:
        ValueError: `load_le` has not one row per layer with experts, or not one column per expert.
    """
    routers = [layer.mlp.router for layer in model.layers if isinstance(layer.mlp, MoE)]
    expected = (len(routers), model.config.n_routed_experts)
    if load_le.shape != expected:
        raise ValueError(f"load_le must have the shape {expected}, got {load_le.shape}.")
    load_le = load_le.astype(jnp.float32)
    sign_le = jnp.sign(load_le.mean(axis=1, keepdims=True) - load_le)
    step_le = rate * (sign_le - sign_le.mean(axis=1, keepdims=True))
    for router, step_e in zip(routers, step_le, strict=True):
        router.bias[...] = router.bias[...] + step_e.astype(jnp.float32)


def max_violation(load_le: jax.Array) -> jax.Array:
    """Load imbalance `(max - mean) / mean` per layer, float32 `[layers]`: 0 if balanced."""
    load_le = load_le.astype(jnp.float32)
    mean_l = load_le.mean(axis=-1)
    return (load_le.max(axis=-1) - mean_l) / mean_l


class ParameterCounts(NamedTuple):
    """Sizes of a model, in parameters.

    Attributes:
        total: Every trained parameter.
        body: Those without the embedding and the head.
        active: Those of the body that one token passes through.
        router_bias: Balance biases, which are not trained and not in the other counts.
    """

    total: int
    body: int
    active: int
    router_bias: int


def parameter_counts(config: MoonlightConfig) -> ParameterCounts:
    """Counts a model's parameters from its abstract shapes; allocates nothing."""
    model = nnx.eval_shape(lambda: Moonlight(config, rngs=nnx.Rngs(0)))
    total = body = routed = router_bias = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        size = variable.size
        if isinstance(variable, RouterBias):
            router_bias += size
            continue
        total += size
        if path[0] not in ("embed", "lm_head"):
            body += size
        if "experts" in path:
            routed += size
    unused = (
        routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    )
    return ParameterCounts(total, body, body - unused, router_bias)
