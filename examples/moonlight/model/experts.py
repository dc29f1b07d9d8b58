"""A layer of experts: the router, the routed experts' routes, and the shared experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from examples.moonlight.model.config import MoonlightConfig
from examples.moonlight.model.execution.dispatch import (
    Layout,
    Stacks,
    dropless,
    gather,
    swiglu_groups,
    with_capacity,
)
from examples.moonlight.model.execution.grouped import grouped_dot
from examples.moonlight.model.execution.options import Execution
from examples.moonlight.model.execution.sharding import BATCH_AXES, PARAM_SPECS
from examples.moonlight.model.layers import MLP, lora_product, normal_param

EXPERT_STACKS = ("gate_proj", "up_proj", "down_proj")


class RouterBias(nnx.Variable):
    """The bias that steers expert choice: no `nnx.Param`, so no gradient and no weight decay."""


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

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, execution: Execution):
        shape = (config.hidden_size, config.n_routed_experts)
        self.kernel = normal_param(rngs, shape, config.initializer_range)
        self.bias = RouterBias(jnp.zeros((config.n_routed_experts,), jnp.float32))
        self.config = config
        self.execution = execution

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

        mesh = self.execution.sharding.mesh
        if mesh is None or score_ne.shape[0] % self.execution.sharding.batch_shards:
            return choose(score_ne)
        # Left to propagation, XLA's top-k gathers the scores of all tokens.
        tokens = P(BATCH_AXES)
        return jax.shard_map(choose, mesh=mesh, in_specs=tokens, out_specs=tokens)(score_ne)


class Experts(nnx.Module):
    """The routed experts, one SwiGLU each, as stacks of matrices `[experts, in, out]`.

    With adapters, each matrix of a stack has a pair of its own: `gate_proj_lora_a`, float32
    `[experts, in, r]`, and `gate_proj_lora_b`, `[experts, r, out]`. Their products are added to the
    stacks before these are used, whatever the route: a copy of one layer's experts at a time.
    """

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, execution: Execution):
        c = config
        into = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
        out = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.gate_proj = normal_param(rngs, into, c.initializer_range)
        self.up_proj = normal_param(rngs, into, c.initializer_range)
        self.down_proj = normal_param(rngs, out, c.initializer_range)
        for name in EXPERT_STACKS:
            for factor in ("a", "b"):
                setattr(self, f"{name}_lora_{factor}", nnx.data(None))
        self.lora_scale = 0.0
        self.execution = execution

    def whole_stack(self, name: str) -> jax.Array:
        """The matrices of a stack, float32 `[experts, in, out]`, with what adapters add to them."""
        a, b = (getattr(self, f"{name}_lora_{factor}") for factor in ("a", "b"))
        stack = getattr(self, name)[...]
        return stack if a is None else stack + lora_product(a, b, self.lora_scale)

    def __call__(self, act_nd: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array | None]:
        """The weighted sum of the chosen experts' outputs.

        Args:
            act_nd: Normalised activations.
            routing: What the router chose for them.

        Returns:
            `[n, hidden]` in the dtype of `act_nd`, and how many of the (token, choice) pairs were
            dropped, an int32 scalar, if there is a capacity.
        """
        run = self.execution
        stacks = tuple(self.whole_stack(name) for name in EXPERT_STACKS)
        # Tokens that do not divide over the mesh, a short prompt's, are left to propagation.
        mesh = None if act_nd.shape[0] % run.sharding.batch_shards else run.sharding.mesh
        if run.experts == "dense" or (mesh is None and run.sharding.mesh is not None):
            if mesh is None:
                return _dense_experts(act_nd, routing.weight_ne, *_cast(stacks, act_nd)), None
            return _dense_experts_on_mesh(mesh, act_nd, routing.weight_ne, stacks), None
        weight_nk = jnp.take_along_axis(routing.weight_ne, routing.expert_nk, axis=1)
        args = (act_nd, routing.expert_nk, weight_nk, stacks)
        if mesh is None:
            layout = Layout(None, None, (), 1, act_nd.dtype)
            if run.expert_capacity is None:
                return _ragged_experts(*args), None
            return with_capacity(layout, run.expert_capacity, *args)
        return _dispatched(mesh, run, *args)


def _cast(stacks: tuple[jax.Array, ...], act_nd: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(w.astype(act_nd.dtype) for w in stacks)


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


_TOKENS = P(BATCH_AXES)
_STACKS = tuple(PARAM_SPECS["experts", name] for name in EXPERT_STACKS)


def _layout(mesh: Mesh, act_nd: jax.Array, block: int | None = None) -> Layout:
    """Where the experts lie, over axes with more than one device."""
    expert, store = (axis if mesh.shape[axis] > 1 else None for axis in ("expert", "fsdp"))
    rest = tuple(axis for axis in ("data", "fsdp", "tensor") if mesh.shape[axis] > 1)
    return Layout(expert, store, rest, mesh.shape["expert"], act_nd.dtype, block)


def _dense_experts_on_mesh(
    mesh: Mesh, act_nd: jax.Array, weight_ne: jax.Array, stacks: Stacks
) -> jax.Array:
    """The dense route where experts lie over `expert` and their inner units over `tensor`.

    Each device runs its part of its experts on the tokens of its `data` and `fsdp` group: those are
    gathered over `expert`, and the partial outputs summed where they came from. With propagation
    alone the merged axis e*f has no sharding, and XLA gathers the weights instead.
    """
    stored = _layout(mesh, act_nd)

    def on_device(act_nd: jax.Array, weight_ne: jax.Array, stacks: Stacks) -> jax.Array:
        whole: Any = gather(stored, stacks)
        group_nd = jax.lax.all_gather(act_nd, "expert", tiled=True)
        weight_ne = jax.lax.all_to_all(weight_ne, "expert", 1, 0, tiled=True)
        partial_nd = _dense_experts(group_nd, weight_ne, *whole)
        return jax.lax.psum(jax.lax.psum_scatter(partial_nd, "expert", tiled=True), "tensor")

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(_TOKENS, _TOKENS, _STACKS),
        out_specs=_TOKENS,
        check_vma=False,
    )
    return mapped(act_nd, weight_ne, stacks)


def _ragged_experts(
    act_nd: jax.Array, expert_nk: jax.Array, weight_nk: jax.Array, stacks: Stacks
) -> jax.Array:
    """Runs each token's chosen experts only: sorts (token, choice) pairs by expert, and unsorts."""
    top_k = expert_nk.shape[1]
    order = jnp.argsort(expert_nk.reshape(-1), stable=True)
    load_e = jnp.bincount(expert_nk.reshape(-1), length=stacks[0].shape[0]).astype(jnp.int32)
    gate_edf, up_edf, down_efd = _cast(stacks, act_nd)
    # ragged_dot has no rule for meshes with Explicit axes yet (jax 0.10). Elsewhere a no-op.
    dot = jax.sharding.auto_axes(grouped_dot, out_sharding=P(None, None))
    sorted_md = swiglu_groups(act_nd[order // top_k], load_e, (gate_edf, up_edf, down_efd), dot)
    out_nkd = sorted_md[jnp.argsort(order)].reshape(-1, top_k, act_nd.shape[1])
    return jnp.einsum("nkd,nk->nd", out_nkd, weight_nk.astype(act_nd.dtype))


def _dispatched(
    mesh: Mesh,
    run: Execution,
    act_nd: jax.Array,
    expert_nk: jax.Array,
    weight_nk: jax.Array,
    stacks: Stacks,
) -> tuple[jax.Array, jax.Array | None]:
    """The ragged route on a mesh: tokens travel to their experts, see `execution/dispatch.py`."""
    layout, capacity = _layout(mesh, act_nd, run.expert_block), run.expert_capacity

    def on_device(
        act_nd: jax.Array, expert_nk: jax.Array, weight_nk: jax.Array, stacks: Stacks
    ) -> tuple[jax.Array, jax.Array]:
        args = (act_nd, expert_nk, weight_nk, stacks)
        if capacity is None:
            out_nd, dropped = dropless(layout, *args), jnp.zeros((), jnp.int32)
        else:
            out_nd, dropped = with_capacity(layout, capacity, *args)
        return jax.lax.psum(out_nd, "tensor"), dropped[None]

    out_nd, dropped_g = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(_TOKENS, _TOKENS, _TOKENS, _STACKS),
        out_specs=(_TOKENS, _TOKENS),
        check_vma=False,
    )(act_nd, expert_nk, weight_nk, stacks)
    return out_nd, None if capacity is None else dropped_g.sum()


class MoE(nnx.Module):
    """Routed experts, weighted, plus shared ones, if any, which every token uses unweighted."""

    def __init__(self, config: MoonlightConfig, *, rngs: nnx.Rngs, execution: Execution):
        c = config
        self.router = Router(c, rngs=rngs, execution=execution)
        self.experts = Experts(c, rngs=rngs, execution=execution)
        width = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = (
            MLP(c.hidden_size, width, stddev=c.initializer_range, rngs=rngs) if width else None
        )

    def __call__(self, act_nd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns the output `[n, hidden]`, the load, int32 `[experts]`, and the dropped pairs."""
        routing = self.router(act_nd)
        out_nd, dropped = self.experts(act_nd, routing)
        if self.shared_experts is not None:
            out_nd += self.shared_experts(act_nd)
        return out_nd, routing.load_e, dropped
