"""Tokens to their experts and back, on a mesh: the ragged route where experts lie on many devices.

Contract, on each device of a shard_map:

- Experts lie over `expert`: a device holds e / p of them, p the axis' size. Their inner units lie
  over `tensor`, and what is stored over `fsdp` is gathered, in the compute dtype, when it is used.
- A device sends each of its tokens once to every device that holds any of its chosen experts, and
  gets the weighted sum of their outputs back: one `all_to_all` each way, in the compute dtype, and
  one of integers there, with what the receiver has to know: experts, weights, how many.
- Shapes are static and routing is not. So tokens travel in rounds (`trips.py`) with a little more
  room than an even share needs; as many rounds as the fullest (sender, receiver) pair needs, on
  all devices alike. Nothing is dropped whatever the routing, and memory is bounded by one round.
- Backward goes the same rounds: tokens travel again with the gradients of their outputs, experts
  are computed anew, and gradients of tokens and weights come back. Nothing of a round is kept.
- Gradients of experts are summed over rounds, and then over `fsdp`, in float32; sums over the
  experts of a device and over devices as well.

With a capacity, pairs of a token and an expert travel one by one. Slots belong to experts instead
of devices, there is one round, and pairs behind an expert's last slot are dropped: their tokens
keep what the other choices give. They are counted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from examples.moonlight.model.execution import trips
from examples.moonlight.model.execution.grouped import grouped_dot

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
        block: Tokens of a device that travel at a time; None is all.
    """

    expert: str | None
    store: str | None
    rest: tuple[str, ...]
    devices: int
    dtype: DTypeLike
    block: int | None = None


def swiglu_groups(
    act_nd: jax.Array,
    load_e: jax.Array,
    stacks: Stacks,
    dot: Any = grouped_dot,
    weight_n: jax.Array | None = None,
) -> jax.Array:
    """Runs tokens that are sorted by expert, `load_e` for each of the experts.

    Weights multiply inner units, which is what multiplying the outputs would give: so their
    gradients need no outputs, and the backward pass one product less.
    """
    gate_edf, up_edf, down_efd = stacks
    inner_nf = jax.nn.silu(dot(act_nd, gate_edf, load_e)) * dot(act_nd, up_edf, load_e)
    if weight_n is not None:
        inner_nf = (inner_nf.astype(jnp.float32) * weight_n[:, None]).astype(inner_nf.dtype)
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
# Sorting by counting: groups are few, and XLA:TPU takes seconds to compile each sort of many
# --------------------------------------------------------------------------------------------------


class _Sorted(NamedTuple):
    """Numbered things, sorted by group.

    Attributes:
        order_m: Their numbers by group, int32 `[m]`.
        place_m: The place of each in that order: the inverse permutation.
        start_g: Where each group begins in it.
        count_g: How many there are of each group.
        rank_m: The place of each in its group, by its number.
    """

    order_m: jax.Array
    place_m: jax.Array
    start_g: jax.Array
    count_g: jax.Array
    rank_m: jax.Array


def _sort(group_m: jax.Array, groups: int) -> _Sorted:
    hit_mg = (group_m[:, None] == jnp.arange(groups)[None]).astype(jnp.int32)
    upto_mg = jnp.cumsum(hit_mg, axis=0)
    count_g = upto_mg[-1]
    start_g = jnp.cumsum(count_g) - count_g
    rank_m = (upto_mg * hit_mg).sum(axis=1) - 1
    place_m = start_g[group_m] + rank_m
    numbers_m = jnp.arange(group_m.size, dtype=jnp.int32)
    order_m = jnp.zeros_like(numbers_m).at[place_m].set(numbers_m, unique_indices=True)
    return _Sorted(order_m, place_m, start_g, count_g, rank_m)


def _exchange(layout: Layout, x_px: jax.Array) -> jax.Array:
    """Row i of the first axis goes to device i; row j of the result came from device j."""
    if layout.expert is None:
        return x_px
    return jax.lax.all_to_all(x_px, layout.expert, 0, 0, tiled=True)


# --------------------------------------------------------------------------------------------------
# What a receiver does with a round
# --------------------------------------------------------------------------------------------------


class _Visitors(NamedTuple):
    """The pairs that a device received, as rows of the products of its experts.

    Attributes:
        load_e: Rows of each expert; behind them all come rows of no pair.
        pair_r: The pair of each row, counted through all senders.
        row_m: The row of each pair.
        weight_m: The weight of each pair, float32.
        slot_r: The slot of each row's token, counted through all senders.
        levels: For first pairs of trips, second ones, ...: the rows of the first few slots of each
            sender, `[p, .]`, and whether there is such a pair.
    """

    load_e: jax.Array
    pair_r: jax.Array
    row_m: jax.Array
    weight_m: jax.Array
    slot_r: jax.Array
    levels: tuple[tuple[jax.Array, jax.Array], ...]


def _read(room: trips.Room, header_ph: jax.Array) -> _Visitors:
    """What the integers say that came with the tokens."""
    p, pairs = room.devices, room.pairs
    expert_pq, weight_pq, count_pj = jnp.split(header_ph, (pairs, 2 * pairs), axis=1)
    sort = _sort(expert_pq.reshape(-1), room.local + 1)
    slot_pq = room.slots * jnp.arange(p)[:, None] + trips.slots_of_pairs(room, count_pj)
    row_pq, start_pj, levels = sort.place_m.reshape(p, pairs), trips.starts(count_pj), []
    for level, most in enumerate(room.levels):
        slot_1s = jnp.arange(most)[None]
        place_ps = jnp.minimum(start_pj[:, level, None] + slot_1s, pairs - 1)
        row_ps = jnp.take_along_axis(row_pq, place_ps, axis=1)
        levels.append((row_ps, slot_1s < count_pj[:, level, None]))
    return _Visitors(
        sort.count_g[: room.local],
        sort.order_m,
        sort.place_m,
        jax.lax.bitcast_convert_type(weight_pq, jnp.float32).reshape(-1),
        slot_pq.reshape(-1)[sort.order_m],
        tuple(levels),
    )


def _write(
    room: trips.Room, round_: trips.Round, expert_wk: jax.Array, weight_wk: jax.Array
) -> jax.Array:
    """What `_read` reads, int32 `[p, 2 * pairs + depth]`; places of no pair have no expert."""
    there_pq, pair_pq = round_.pair_pq >= 0, jnp.maximum(round_.pair_pq, 0)
    expert_pq = jnp.where(there_pq, expert_wk.reshape(-1)[pair_pq] % room.local, room.local)
    weight_pq = jnp.where(there_pq, weight_wk.reshape(-1)[pair_pq], 0)
    bits_pq = jax.lax.bitcast_convert_type(weight_pq, jnp.int32)
    return jnp.concatenate([expert_pq, bits_pq, round_.count_pj], axis=1)


@jax.custom_vjp
def _spread(visitors: _Visitors, x_psd: jax.Array) -> jax.Array:
    """A row `[r, d]` for each pair of a token. Its transpose sums, in float32, by gathering."""
    return x_psd.reshape(-1, x_psd.shape[-1])[visitors.slot_r]


@jax.custom_vjp
def _combine(visitors: _Visitors, x_rd: jax.Array) -> jax.Array:
    """The sum of each token's rows `[p, slots, d]`. Its transpose is `_spread`."""
    return _summed(visitors, x_rd)


def _summed(visitors: _Visitors, x_rd: jax.Array) -> jax.Array:
    slots = visitors.levels[0][0].shape[1]
    total: Any = 0
    for row_ps, there_ps in visitors.levels:
        x_psd = jnp.where(there_ps[:, :, None], x_rd[row_ps], 0).astype(jnp.float32)
        total += jnp.pad(x_psd, ((0, 0), (0, slots - row_ps.shape[1]), (0, 0)))
    return total.astype(x_rd.dtype)


_spread.defvjp(
    lambda visitors, x_psd: (_spread(visitors, x_psd), visitors),
    lambda visitors, grad_rd: (None, _summed(visitors, grad_rd)),
)
_combine.defvjp(
    lambda visitors, x_rd: (_summed(visitors, x_rd), visitors),
    lambda visitors, grad_psd: (None, _spread(visitors, grad_psd)),
)


@jax.custom_vjp
def _in_rows(visitors: _Visitors, weight_m: jax.Array) -> jax.Array:
    """By row, what is by pair: a permutation."""
    return weight_m[visitors.pair_r]


_in_rows.defvjp(
    lambda visitors, weight_m: (_in_rows(visitors, weight_m), visitors),
    lambda visitors, grad_r: (None, grad_r[visitors.row_m]),
)


def _visit(
    visitors: _Visitors, act_psd: jax.Array, weight_m: jax.Array, stacks: Stacks
) -> jax.Array:
    """The weighted sums of this device's experts on what it received, `[p, slots, d]`."""
    rows_rd: Any = _spread(visitors, act_psd)
    weight_r: Any = _in_rows(visitors, weight_m)
    out_rd = swiglu_groups(rows_rd, visitors.load_e, stacks, weight_n=weight_r)
    out_psd: Any = _combine(visitors, out_rd)
    return out_psd


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
        expert_nk: Their experts, int32, each token's different ones.
        weight_nk: The weights of these, float32.
        stacks: This device's part of its experts, float32.

    Returns:
        `[n, d]` in the compute dtype; where inner units lie over another axis, this device's part
        of the sum over it.
    """
    stacks = _gather(layout, stacks)

    def step(trip: _Trip, out_nd: jax.Array) -> jax.Array:
        act_psd, visitors = trip.send(act_nd, weight_nk)
        sum_psd = _visit(visitors, act_psd, visitors.weight_m, stacks)
        return trip.add_sums(out_nd, sum_psd)

    out_nd = _in_rounds(layout, expert_nk, stacks, step, jnp.zeros(act_nd.shape, jnp.float32))
    return out_nd.astype(act_nd.dtype)


def _forward(layout: Layout, *args: Any):
    return dropless(layout, *args), args


def _backward(layout: Layout, args: Any, grad_nd: jax.Array):
    act_nd, expert_nk, weight_nk, parts = args
    stacks = _gather(layout, parts)

    def step(trip: _Trip, grads: Any):
        d_act_nd, d_weight_nk, d_stacks = grads
        act_psd, visitors = trip.send(act_nd, weight_nk)
        grad_psd = _exchange(layout, trip.take(grad_nd))
        visit = functools.partial(_visit, visitors)
        _, vjp = jax.vjp(visit, act_psd, visitors.weight_m, stacks)
        d_act_psd, d_weight_m, d_round = vjp(grad_psd)
        return (
            trip.add_sums(d_act_nd, d_act_psd),
            trip.add_numbers(d_weight_nk, d_weight_m),
            jax.tree.map(lambda total, g: total + g.astype(jnp.float32), d_stacks, d_round),
        )

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (act_nd, weight_nk, stacks))
    d_act_nd, d_weight_nk, d_stacks = _in_rounds(layout, expert_nk, stacks, step, start)
    return d_act_nd.astype(act_nd.dtype), None, d_weight_nk, _scatter(layout, d_stacks)


dropless.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Trip:
    """A round, from the side of the device whose tokens travel."""

    layout: Layout
    room: trips.Room
    round_: trips.Round
    expert_nk: jax.Array

    def window(self, x_nx: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_nx, self.round_.first, self.room.window)

    def add(self, total_nx: jax.Array, x_wx: jax.Array) -> jax.Array:
        sum_wx = self.window(total_nx) + x_wx
        return jax.lax.dynamic_update_slice_in_dim(total_nx, sum_wx, self.round_.first, 0)

    def take(self, x_nd: jax.Array) -> jax.Array:
        """The rows of tokens in their slots, `[p, slots, d]`."""
        # The first pairs of all trips come first.
        pair_ps = self.round_.pair_pq[:, : self.room.slots]
        there_ps = jnp.arange(self.room.slots)[None] < self.round_.count_pj[:, :1]
        token_ps = self.round_.first + jnp.maximum(pair_ps, 0) // self.expert_nk.shape[1]
        return jnp.where(there_ps[:, :, None], x_nd[token_ps], 0)

    def send(self, act_nd: jax.Array, weight_nk: jax.Array) -> tuple[jax.Array, _Visitors]:
        """The tokens that this device receives, `[p, slots, d]`, and where they belong."""
        header_ph = _write(
            self.room, self.round_, self.window(self.expert_nk), self.window(weight_nk)
        )
        act_psd = _exchange(self.layout, self.take(act_nd))
        return act_psd, _read(self.room, _exchange(self.layout, header_ph))

    def add_sums(self, total_nd: jax.Array, sum_psd: jax.Array) -> jax.Array:
        """Adds what each token gets from the devices that it went to, in float32."""
        back_md = _exchange(self.layout, sum_psd).reshape(-1, sum_psd.shape[-1])
        trip_wc = self.round_.trip_wc
        there_wc = trip_wc < len(back_md)
        back_wcd = back_md[jnp.minimum(trip_wc, len(back_md) - 1)]
        back_wcd = jnp.where(there_wc[:, :, None], back_wcd, 0).astype(jnp.float32)
        return self.add(total_nd, back_wcd.sum(axis=1))

    def add_numbers(self, total_nk: jax.Array, number_m: jax.Array) -> jax.Array:
        """Adds a number for each pair."""
        back_pq = _exchange(self.layout, number_m.reshape(self.room.devices, -1))
        place_wk = self.round_.place_wk
        back_wk = back_pq.reshape(-1)[jnp.minimum(place_wk, back_pq.size - 1)]
        return self.add(total_nk, jnp.where(place_wk < back_pq.size, back_wk, 0))


def _in_rounds(
    layout: Layout,
    expert_nk: jax.Array,
    stacks: Stacks,
    step: Callable[[_Trip, Any], Any],
    start: Any,
) -> Any:
    """Applies `step` until every token has been wherever it has to go, on all devices."""
    (tokens, top_k), local = expert_nk.shape, stacks[0].shape[0]
    room = trips.room(tokens, top_k, layout.devices, local, layout.block)
    # Every device, not only those that exchange with this one: all leave the loop together.
    axes = tuple(axis for axis in (layout.expert, *layout.rest) if axis)

    def body(carry: Any) -> Any:
        next_p, _, total = carry
        round_ = trips.plan(room, expert_nk, next_p)
        total = step(_Trip(layout, room, round_, expert_nk), total)
        left = (round_.next_p < tokens).any().astype(jnp.int32)
        return round_.next_p, jax.lax.pmax(left, axes) if axes else left, total

    begin = (jnp.zeros((layout.devices,), jnp.int32), jnp.int32(1), start)
    return jax.lax.while_loop(lambda carry: carry[1] > 0, body, begin)[2]


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
    expert_m = expert_nk.reshape(-1)
    sort = _sort(expert_m, experts)
    slot_c = jnp.arange(slots)[None]
    pair_ec = sort.order_m[jnp.minimum(sort.start_g[:, None] + slot_c, expert_m.size - 1)]
    taken_ec = slot_c < sort.count_g[:, None]
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

    out_md = back.reshape(experts, slots, hidden)[expert_m, jnp.minimum(sort.rank_m, slots - 1)]
    out_md = jnp.where((sort.rank_m < slots)[:, None], out_md, 0)
    weighted_nkd = out_md.reshape(tokens, top_k, hidden) * weight_nk[:, :, None].astype(
        out_md.dtype
    )
    dropped = jnp.maximum(sort.count_g - slots, 0).sum(dtype=jnp.int32)
    return weighted_nkd.sum(axis=1), dropped
