"""Tokens to their experts and back, on a mesh: the ragged route where experts lie on many devices.

Contract, on each device of a shard_map:

- Experts lie over `expert`: a device holds e / p of them, p the axis' size. Their inner units lie
  over `tensor`, and what is stored over `fsdp` is gathered, in the compute dtype, when it is used.
- A device sends each (token, choice) pair of its own tokens to the device that holds the chosen
  expert, with its weight, and gets the weighted output back: one `all_to_all` each way.
- Shapes are static and routing is not. So the pairs travel in rounds of `p x slots`, `slots` a
  little more than an even share; as many rounds as the fullest (sender, receiver) pair needs, on
  all devices alike. Nothing is dropped whatever the routing, and memory is bounded by one round:
  balanced routing takes one, and a router that sends everything to one device takes about p.
- Backward goes the same rounds: tokens travel again with the gradients of their outputs, experts
  are computed anew, and gradients of tokens and weights come back. Nothing of a round is kept.
- Gradients of experts are summed over rounds, and then over `fsdp`, in float32.

With a capacity, `slots` belong to experts instead of devices, there is one round, and pairs behind
an expert's last slot are dropped: their tokens keep what the other choices give. They are counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.moonlight.model.execution.grouped import grouped_dot

# Slots of a round, in even shares of the tokens: routing that is balanced to this takes one round.
SLACK = 1.25

Stacks = tuple[jax.Array, ...]  # gate [e, d, f], up [e, d, f], down [e, f, d]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes over which experts lie; None where there is no such axis, as on one device.

    Attributes:
        expert: Holds the experts.
        store: Stores parts of each.
        rest: All other axes of the mesh.
        devices: Size of `expert`.
        dtype: The dtype of products, and of weights that travel.
    """

    expert: str | None
    store: str | None
    rest: tuple[str, ...]
    devices: int
    dtype: DTypeLike


def swiglu_groups(
    act_nd: jax.Array, load_e: jax.Array, stacks: Stacks, dot: Any = grouped_dot
) -> jax.Array:
    """Runs tokens that are sorted by expert, `load_e` for each of the experts."""
    gate_edf, up_edf, down_efd = stacks
    inner_nf = jax.nn.silu(dot(act_nd, gate_edf, load_e)) * dot(act_nd, up_edf, load_e)
    return dot(inner_nf, down_efd, load_e)


# --------------------------------------------------------------------------------------------------
# Weights that are stored in parts
# --------------------------------------------------------------------------------------------------

# The dimension of gate, up and down `[e, ., .]` that is stored in parts: always the hidden one.
_STORED = (1, 1, 2)


def _gather(layout: Layout, stacks: Stacks) -> Stacks:
    stacks = tuple(w.astype(layout.dtype) for w in stacks)
    if layout.store is None:
        return stacks
    return tuple(
        jax.lax.all_gather(w, layout.store, axis=axis, tiled=True)
        for w, axis in zip(stacks, _STORED, strict=True)
    )


def _scatter(layout: Layout, grads: Stacks) -> Stacks:
    if layout.store is None:
        return grads
    return tuple(
        jax.lax.psum_scatter(g, layout.store, scatter_dimension=axis, tiled=True)
        for g, axis in zip(grads, _STORED, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(layout: Layout, stacks: Stacks) -> Stacks:
    """This device's experts, whole and in the compute dtype; gradients leave in float32."""
    return _gather(layout, stacks)


def _gather_forward(layout: Layout, stacks: Stacks):
    return _gather(layout, stacks), None


def _gather_backward(layout: Layout, _: None, grads: Stacks):
    return (_scatter(layout, tuple(g.astype(jnp.float32) for g in grads)),)


gather.defvjp(_gather_forward, _gather_backward)


# --------------------------------------------------------------------------------------------------
# Who sends what, in which slot
# --------------------------------------------------------------------------------------------------


class _Itinerary(NamedTuple):
    """The order in which a device's pairs leave, grouped by where they go.

    Attributes:
        order_m: Pairs (token * k + choice) by group, int32 `[n * k]`.
        place_m: The place of each pair in that order: the inverse permutation.
        start_g: Where each group begins in it.
        count_g: Pairs of each group.
        group_m: The group of each pair, by the pair's number.
        rank_m: The place of each pair in its group, likewise.
    """

    order_m: jax.Array
    place_m: jax.Array
    start_g: jax.Array
    count_g: jax.Array
    group_m: jax.Array
    rank_m: jax.Array


def _plan(group_m: jax.Array, groups: int) -> _Itinerary:
    # By counting: groups are few, and XLA:TPU takes seconds to compile each sort of many pairs.
    hit_mg = (group_m[:, None] == jnp.arange(groups)[None]).astype(jnp.int32)
    upto_mg = jnp.cumsum(hit_mg, axis=0)
    count_g = upto_mg[-1]
    start_g = jnp.cumsum(count_g) - count_g
    rank_m = (upto_mg * hit_mg).sum(axis=1) - 1
    place_m = start_g[group_m] + rank_m
    numbers_m = jnp.arange(group_m.size, dtype=jnp.int32)
    order_m = jnp.zeros_like(numbers_m).at[place_m].set(numbers_m, unique_indices=True)
    return _Itinerary(order_m, place_m, start_g, count_g, group_m, rank_m)


@jax.custom_vjp
def _permute(x_mx: jax.Array, order_m: jax.Array, place_m: jax.Array) -> jax.Array:
    """`x[order]`, `place` being its inverse: by it gradients are gathered, where XLA would add."""
    return x_mx[order_m]


def _permute_forward(x_mx: jax.Array, order_m: jax.Array, place_m: jax.Array):
    return x_mx[order_m], place_m


def _permute_backward(place_m: jax.Array, grad_mx: jax.Array):
    return grad_mx[place_m], None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _fill(plan: _Itinerary, round_: Any, slots: int) -> tuple[jax.Array, jax.Array]:
    """The pair in each slot `[groups, slots]` of a round, and whether there is one."""
    rank_gc = round_ * slots + jnp.arange(slots)[None]
    taken_gc = rank_gc < plan.count_g[:, None]
    place_gc = jnp.minimum(plan.start_g[:, None] + rank_gc, plan.order_m.shape[0] - 1)
    return plan.order_m[place_gc], taken_gc


def _empty(plan: _Itinerary, round_: Any, slots: int, back_gcx: jax.Array) -> jax.Array:
    """What came back for each pair, `[n * k, ...]`: zeros for pairs of other rounds."""
    mine_m = plan.rank_m // slots == round_
    back_mx = back_gcx[plan.group_m, plan.rank_m % slots]
    return jnp.where(mine_m.reshape(-1, *(1,) * (back_mx.ndim - 1)), back_mx, 0)


def _exchange(layout: Layout, x_px: jax.Array) -> jax.Array:
    """Row i of the first axis goes to device i; row j of the result came from device j."""
    if layout.expert is None:
        return x_px
    return jax.lax.all_to_all(x_px, layout.expert, 0, 0, tiled=True)


# --------------------------------------------------------------------------------------------------
# Dropless: rounds
# --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dropless(
    layout: Layout, act_nd: jax.Array, expert_nk: jax.Array, weight_nk: jax.Array, stacks: Stacks
) -> jax.Array:
    """Weighted sum of the chosen experts' outputs.

    Args:
        layout: Where experts lie.
        act_nd: This device's tokens, in the compute dtype.
        expert_nk: Their experts, int32.
        weight_nk: The weights of these, float32.
        stacks: This device's part of its experts, float32.

    Returns:
        `[n, d]` in the compute dtype; where inner units lie over another axis, this device's part
        of the sum over it.
    """
    stacks = _gather(layout, stacks)
    pairs = _Pairs(layout, act_nd, expert_nk, stacks)

    def step(round_: jax.Array, out_nd: jax.Array) -> jax.Array:
        sent = pairs.send(round_, act_nd, weight_nk)
        back_pcd = _exchange(layout, pairs.compute(*sent)[0].reshape(*pairs.shape, -1))
        return out_nd + _sum_choices(pairs.back(round_, back_pcd), expert_nk)

    out_nd = pairs.all_rounds(step, jnp.zeros(act_nd.shape, jnp.float32))
    return out_nd.astype(act_nd.dtype)


def _forward(layout: Layout, *args: Any):
    return dropless(layout, *args), args


def _backward(layout: Layout, args: Any, grad_nd: jax.Array):
    act_nd, expert_nk, weight_nk, parts = args
    stacks = _gather(layout, parts)
    pairs = _Pairs(layout, act_nd, expert_nk, stacks)

    def step(round_: jax.Array, grads: Any):
        d_act_nd, d_weight_m, d_stacks = grads
        sent = pairs.send(round_, act_nd, weight_nk)
        grad_pcd, _ = pairs.take(round_, grad_nd)
        grad_md = _exchange(layout, grad_pcd).reshape(-1, act_nd.shape[1])
        _, vjp = pairs.compute(*sent)
        d_sent_act, d_sent_weight, d_round = vjp(grad_md)
        back_pcd = _exchange(layout, d_sent_act.reshape(*pairs.shape, -1))
        back_pc = _exchange(layout, d_sent_weight.reshape(pairs.shape))
        return (
            d_act_nd + _sum_choices(pairs.back(round_, back_pcd), expert_nk),
            d_weight_m + pairs.back(round_, back_pc),
            jax.tree.map(lambda total, g: total + g.astype(jnp.float32), d_stacks, d_round),
        )

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), stacks)
    start = (jnp.zeros(act_nd.shape, jnp.float32), jnp.zeros(weight_nk.size, jnp.float32), zeros)
    d_act_nd, d_weight_m, d_stacks = pairs.all_rounds(step, start)
    return (
        d_act_nd.astype(act_nd.dtype),
        None,
        d_weight_m.reshape(weight_nk.shape),
        _scatter(layout, d_stacks),
    )


dropless.defvjp(_forward, _backward)


class _Pairs:
    """The rounds of one device: what it sends, computes for others, and gets back."""

    def __init__(self, layout: Layout, act_nd: jax.Array, expert_nk: jax.Array, stacks: Stacks):
        self.layout, self.stacks, self.top_k = layout, stacks, expert_nk.shape[1]
        self.local = stacks[0].shape[0]
        expert_m = expert_nk.reshape(-1)
        self.plan = _plan(expert_m // self.local, layout.devices)
        self.expert_m = expert_m
        # One device is its own and only receiver: all of it fits.
        share = expert_m.size / layout.devices
        self.slots = math.ceil(share * (SLACK if layout.devices > 1 else 1))
        self.shape = (layout.devices, self.slots)
        rounds = -(-self.plan.count_g.max() // self.slots)
        # Every device, not only those that exchange with this one: all leave the loop together.
        axes = tuple(axis for axis in (layout.expert, *layout.rest) if axis)
        self.rounds = jax.lax.pmax(rounds, axes) if axes else rounds

    def all_rounds(self, step: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        return jax.lax.fori_loop(0, self.rounds, step, start)

    def take(self, round_: jax.Array, x_nx: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A token's row in the slot of each of its pairs, `[p, slots, ...]`; and the pairs."""
        pair_pc, taken_pc = _fill(self.plan, round_, self.slots)
        return jnp.where(taken_pc[:, :, None], x_nx[pair_pc // self.top_k], 0), pair_pc

    def send(self, round_: jax.Array, act_nd: jax.Array, weight_nk: jax.Array):
        """Tokens, weights and local experts that this device receives, `[p * slots, ...]`."""
        act_pcd, pair_pc = self.take(round_, act_nd)
        _, taken_pc = _fill(self.plan, round_, self.slots)
        weight_pc = jnp.where(taken_pc, weight_nk.reshape(-1)[pair_pc], 0)
        # An empty slot belongs to no expert, and sorts behind all.
        expert_pc = jnp.where(taken_pc, self.expert_m[pair_pc] % self.local, self.local)
        act_md = _exchange(self.layout, act_pcd).reshape(-1, act_nd.shape[1])
        weight_m = _exchange(self.layout, weight_pc).reshape(-1)
        return act_md, weight_m, _exchange(self.layout, expert_pc).reshape(-1)

    def compute(self, act_md: jax.Array, weight_m: jax.Array, expert_m: jax.Array):
        """Weighted outputs of this device's experts, and their vjp to tokens, weights, stacks."""
        plan = _plan(expert_m, self.local + 1)
        load_e, filled_m = plan.count_g[: self.local], expert_m < self.local

        def run(act_md: jax.Array, weight_m: jax.Array, stacks: Stacks) -> jax.Array:
            sorted_md = _permute(act_md, plan.order_m, plan.place_m)
            out_md = swiglu_groups(sorted_md, load_e, stacks)
            out_md = _permute(out_md, plan.place_m, plan.order_m)
            out_md = jnp.where(filled_m[:, None], out_md, 0)
            return out_md * weight_m[:, None].astype(out_md.dtype)

        return jax.vjp(run, act_md, weight_m, self.stacks)

    def back(self, round_: jax.Array, back_pcx: jax.Array) -> jax.Array:
        return _empty(self.plan, round_, self.slots, back_pcx)


def _sum_choices(x_md: jax.Array, expert_nk: jax.Array) -> jax.Array:
    return x_md.reshape(*expert_nk.shape, -1).astype(jnp.float32).sum(axis=1)


# --------------------------------------------------------------------------------------------------
# With a capacity: one round
# --------------------------------------------------------------------------------------------------


def with_capacity(
    layout: Layout,
    capacity: float,
    act_nd: jax.Array,
    expert_nk: jax.Array,
    weight_nk: jax.Array,
    stacks: Stacks,
) -> tuple[jax.Array, jax.Array]:
    """The same, where an expert takes at most `capacity` even shares of each device's pairs.

    Earlier tokens go first.

    Returns:
        The output as `dropless` gives it, and the pairs of this device that were dropped, int32.
    """
    tokens, top_k = expert_nk.shape
    local, hidden = stacks[0].shape[0], act_nd.shape[1]
    experts = local * layout.devices
    slots = min(tokens, math.ceil(capacity * tokens * top_k / experts))
    plan = _plan(expert_nk.reshape(-1), experts)
    pair_ec, taken_ec = _fill(plan, 0, slots)
    act_ecd = jnp.where(taken_ec[:, :, None], act_nd[pair_ec // top_k], 0)

    received = _exchange(layout, act_ecd.reshape(layout.devices, local * slots, hidden))
    act_pecd = received.reshape(layout.devices, local, slots, hidden)
    whole: Any = gather(layout, stacks)  # What custom_vjp returns has no useful type.
    gate_edf, up_edf, down_efd = whole
    inner_pecf = jax.nn.silu(jnp.einsum("pecd,edf->pecf", act_pecd, gate_edf)) * jnp.einsum(
        "pecd,edf->pecf", act_pecd, up_edf
    )
    out_pecd = jnp.einsum("pecf,efd->pecd", inner_pecf, down_efd)
    back = _exchange(layout, out_pecd.reshape(layout.devices, local * slots, hidden))

    out_md = _empty(plan, 0, slots, back.reshape(experts, slots, hidden))
    weighted_nkd = out_md.reshape(tokens, top_k, hidden) * weight_nk[:, :, None].astype(
        out_md.dtype
    )
    dropped = jnp.maximum(plan.count_g - slots, 0).sum(dtype=jnp.int32)
    return weighted_nkd.sum(axis=1), dropped
