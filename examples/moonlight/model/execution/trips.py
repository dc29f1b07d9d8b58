"""Which token travels to which device in a round, and which of its pairs go with it.

A trip is a token that goes to one device, once, however many of its experts lie there: each of
these makes a pair. Of the 6 choices among 64 experts on 8 devices, 4.5 trips are left.

A round has room for `slots` trips and `pairs` pairs from each device to each, both a little more
than routing at random fills: a trip with one pair costs as much on the wire as one with six, and a
pair the same product whoever brought it. Trips go in the order of their tokens, and a round takes,
for each receiver, as many as fit; the next goes on behind them. So nothing is ever left out, a
round always takes at least one trip to each device that still has one, and the routing decides how
many rounds there are: about p where all tokens choose the experts of one of p devices.

A round looks at a window of tokens only, from the first that has a trip left: what a sender does
with what comes back then costs the same for one round as for all.

Inside a round, trips with more pairs come first. So the second pairs of trips, the third and so on
are the first few slots of each sender, at most `pairs / 2`, `pairs / 3`, ...: sums over a trip's
pairs gather 2.2 rows for each that exists, where slots in any order would make it 4.5.

    pairs of a sender, by level:  | first of each trip | second | third | ...
    slot of the pair's trip:      | 0 1 2 3 4 5 6 7 .. | 0 1 .. | 0 ..  |
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Routing that is balanced to this takes no round more than needed.
SLACK = 1.05
# The same for few tokens, in standard deviations of routing at random: of a thousand pairs of
# devices, the fullest is 3.3 above the mean.
DEVIATIONS = 4
# Rows of a TPU's tile. Its kernel for products of sorted rows takes whole tiles; of 51,612 rows XLA
# multiplied each with all of 16 experts, in a program where 51,616 were multiplied once.
TILE = 8
# Of the tokens of a round, how far a window reaches: what is sent to one device may run ahead.
REACH = 1.25


@dataclasses.dataclass(frozen=True)
class Room:
    """What fits into a round, from each device to each.

    Attributes:
        devices: How many devices there are, p.
        local: Experts of a device.
        window: Tokens among which a round's trips are.
        slots: Trips.
        pairs: Pairs.
        depth: The most pairs that a trip can have.
    """

    devices: int
    local: int
    window: int
    slots: int
    pairs: int
    depth: int

    @property
    def levels(self) -> list[int]:
        """How many trips can have a first pair, a second, ... in a round."""
        return [min(self.slots, self.pairs // (j + 1)) for j in range(self.depth)]


def room(tokens: int, top_k: int, devices: int, local: int, block: int | None = None) -> Room:
    """The room of rounds that take `block` of a device's tokens at a time; None is all of them."""
    if devices == 1:
        # A device is its own and only receiver: all of it fits.
        slack, deviations = 1.0, 0.0
    else:
        slack, deviations = SLACK, DEVIATIONS
    rounds = -(-tokens // min(block or tokens, tokens))
    experts = devices * local

    def share(mean: float, variance: float) -> int:
        most = max(slack * tokens * mean, tokens * mean + deviations * math.sqrt(tokens * variance))
        return _in_tiles(math.ceil(round(most / rounds, 6)))

    # Of k experts chosen at random, how many lie on one device is hypergeometric.
    some = 1 - math.comb(experts - local, top_k) / math.comb(experts, top_k)
    mean = top_k / devices
    variance = mean * (1 - 1 / devices) * (experts - top_k) / max(experts - 1, 1)
    depth = min(top_k, local)
    pairs = max(share(mean, variance), depth)
    window = tokens if rounds == 1 else min(tokens, math.ceil(REACH * tokens / rounds))
    slots = min(share(some, some * (1 - some)), pairs, window)
    return Room(devices, local, window, max(slots, 1), pairs, depth)


def _in_tiles(rows: int) -> int:
    """As many rows, or a few more, so that they fill tiles; few are left as they are."""
    return rows if rows < 8 * TILE else -(-rows // TILE) * TILE


class Round(NamedTuple):
    """One round of a sender; w counts tokens of the window, p receivers.

    Attributes:
        first: The first token of the window.
        pair_pq: The pair (w * k + choice) in each place, int32 `[p, pairs]`; -1 where none is.
        count_pj: Trips that have a first pair, a second, ..., `[p, depth]`.
        place_wk: Where each pair is in `pair_pq`, counted through; its size for those not sent.
        trip_wc: The slots that hold the window's tokens, counted through all receivers; `p * slots`
            for none. A token has as many columns as it can have trips.
        next_p: The first token that has not gone to each device.
    """

    first: jax.Array
    pair_pq: jax.Array
    count_pj: jax.Array
    place_wk: jax.Array
    trip_wc: jax.Array
    next_p: jax.Array


def plan(room: Room, expert_nk: jax.Array, next_p: jax.Array) -> Round:
    """What goes in the round that follows those which took all tokens before `next_p`."""
    p, top_k, numbers_1p = room.devices, expert_nk.shape[1], jnp.arange(room.devices)[None]
    first = jnp.minimum(next_p.min(), expert_nk.shape[0] - room.window)
    expert_wk = jax.lax.dynamic_slice_in_dim(expert_nk, first, room.window)
    waits_wp = first + jnp.arange(room.window)[:, None] >= next_p[None]
    owner_wk = expert_wk // room.local
    hit_wkp = (owner_wk[:, :, None] == numbers_1p[None]) & waits_wp[:, None]
    count_wp = hit_wkp.sum(axis=1, dtype=jnp.int32)
    trips_wp = jnp.cumsum(count_wp > 0, axis=0, dtype=jnp.int32)
    fits_wp = (trips_wp <= room.slots) & (jnp.cumsum(count_wp, axis=0) <= room.pairs)
    next_p = jnp.maximum(next_p, first + fits_wp.sum(axis=0, dtype=jnp.int32))
    count_wp = jnp.where(fits_wp, count_wp, 0)

    # Slots by counting: behind all trips with more pairs, and earlier tokens with as many.
    class_wpj = (count_wp[:, :, None] == 1 + jnp.arange(room.depth)[None, None]).astype(jnp.int32)
    upto_wpj = jnp.cumsum(class_wpj, axis=0)
    count_pj = jnp.cumsum(upto_wpj[-1, :, ::-1], axis=1)[:, ::-1]
    more_pj = jnp.pad(count_pj[:, 1:], ((0, 0), (0, 1)))
    slot_wp = (class_wpj * (more_pj[None] + upto_wpj - 1)).sum(axis=2)

    sent_wk = (hit_wkp & fits_wp[:, None]).any(axis=2)
    slot_wk = jnp.where(hit_wkp, slot_wp[:, None], 0).sum(axis=2)
    same_wkk = owner_wk[:, :, None] == owner_wk[:, None, :]
    level_wk = jnp.tril(same_wkk, -1).sum(axis=2, dtype=jnp.int32)
    start_wk = starts(count_pj).reshape(-1)[owner_wk * room.depth + level_wk]
    numbers_wk = jnp.arange(expert_wk.size, dtype=jnp.int32).reshape(expert_wk.shape)
    none = p * room.pairs
    place_wk = jnp.where(sent_wk, owner_wk * room.pairs + start_wk + slot_wk, none + numbers_wk)
    pair_pq = jnp.full((none,), -1, jnp.int32)
    pair_pq = pair_pq.at[place_wk].set(numbers_wk, unique_indices=True, mode="drop")

    if p <= top_k:
        trip_wc = jnp.where(count_wp > 0, numbers_1p * room.slots + slot_wp, p * room.slots)
    else:
        leads_wk = sent_wk & (level_wk == 0)
        trip_wc = jnp.where(leads_wk, owner_wk * room.slots + slot_wk, p * room.slots)
    place_wk = jnp.minimum(place_wk, none)
    return Round(first, pair_pq.reshape(p, -1), count_pj, place_wk, trip_wc, next_p)


def starts(count_pj: jax.Array) -> jax.Array:
    """Where the pairs of each level begin, `[p, depth]`."""
    return jnp.cumsum(count_pj, axis=1) - count_pj


def slots_of_pairs(room: Room, count_pj: jax.Array) -> jax.Array:
    """The slot of each pair's trip, int32 `[p, pairs]`, any where there is no pair."""
    place_1q, start_pj = jnp.arange(room.pairs)[None], starts(count_pj)
    # Each level that has begun takes its start for that of the level before.
    begun_pjq = place_1q[:, None] >= start_pj[:, 1:, None]
    back_pq = jnp.where(begun_pjq, jnp.diff(start_pj, axis=1)[:, :, None], 0).sum(axis=1)
    return jnp.minimum(place_1q - back_pq, room.slots - 1)
