"""Tokens to their experts and back: each once to each device, whatever the routing, and exactly."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.moonlight.model import experts
from examples.moonlight.model.execution import dispatch, trips
from examples.moonlight.model.execution.sharding import make_mesh

EXPERTS, TOP_K = 16, 4
GENERATOR = np.random.default_rng(7)


def at_random(tokens: int) -> np.ndarray:
    scores = GENERATOR.random((tokens, EXPERTS))
    return np.argsort(scores, axis=1)[:, :TOP_K].astype(np.int32)


def crowded(tokens: int) -> np.ndarray:
    """All choose four of the first device's experts."""
    return np.tile(np.arange(TOP_K, dtype=np.int32), (tokens, 1))


def in_turns(tokens: int) -> np.ndarray:
    """The first half chooses the first four experts, the rest one on each of four devices."""
    apart = np.arange(0, EXPERTS, EXPERTS // TOP_K, dtype=np.int32)
    return np.concatenate([crowded(tokens // 2), np.tile(apart, (tokens - tokens // 2, 1))])


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.one_stack
@pytest.mark.parametrize("devices", [4, 8])
def test_every_pair_goes_once_and_every_token_once_to_a_device(devices: int):
    tokens, local = 64, EXPERTS // devices
    room = trips.room(tokens, TOP_K, devices, local, block=16)
    planned = jax.jit(trips.plan, static_argnums=0)
    for routing in (at_random, crowded, in_turns):
        expert_nk = routing(tokens)
        seen, gone, next_p, rounds = set(), set(), jnp.zeros(devices, jnp.int32), 0
        while (next_p < tokens).any():
            round_ = jax.tree.map(np.asarray, planned(room, expert_nk, next_p))
            slots = np.asarray(trips.slots_of_pairs(room, jnp.asarray(round_.count_pj)))
            for device, (pairs, counts) in enumerate(
                zip(round_.pair_pq, round_.count_pj, strict=True)
            ):
                there = int((pairs >= 0).sum())
                assert (pairs[:there] >= 0).all() and there == counts.sum() <= room.pairs
                assert all(count <= most for count, most in zip(counts, room.levels, strict=True))
                for place, pair in enumerate(pairs[:there]):
                    token, choice = divmod(int(pair), TOP_K)
                    # All pairs of a trip are of the token in its slot.
                    assert pairs[slots[device, place]] // TOP_K == token
                    assert round_.place_wk[token, choice] == device * room.pairs + place
                    number = int(round_.first) + token
                    assert expert_nk[number, choice] // local == device
                    assert (number, choice) not in seen
                    seen.add((number, choice))
                trip_c = round_.trip_wc[round_.trip_wc // room.slots == device]
                assert sorted(trip_c) == [
                    *range(device * room.slots, trip_c.size + device * room.slots)
                ]
                for pair in pairs[: counts[0]]:
                    trip = (int(round_.first) + int(pair) // TOP_K, device)
                    assert trip not in gone
                    gone.add(trip)
            next_p, rounds = round_.next_p, rounds + 1
        assert len(seen) == tokens * TOP_K
        assert len(gone) == len({(n, e // local) for n, row in enumerate(expert_nk) for e in row})
        # At random as many as blocks; crowded about as many as devices; never a round for nothing.
        assert rounds <= {at_random: 4, crowded: 4 * devices, in_turns: 3 * devices}[routing]


@pytest.mark.one_stack
def test_routing_at_random_fits_into_its_rounds():
    """At the sizes of the real model: 64 experts, 6 choices, on 8 devices."""
    for tokens, block, devices in ((8192, None, 8), (8192, None, 16), (32768, 8192, 4)):
        room = trips.room(tokens, 6, devices, 64 // devices, block)
        share = 1 - math.comb(64 - room.local, 6) / math.comb(64, 6)
        rounds = tokens // (block or tokens)
        assert 1.02 < room.slots * rounds / (tokens * share) < 1.07
        assert 1.02 < room.pairs * rounds / (tokens * 6 / devices) < 1.07
        assert tokens / rounds <= room.window <= 1.25 * tokens / rounds
        # XLA:TPU has a kernel for sorted rows that fill its tiles.
        assert room.slots % 8 == room.pairs % 8 == 0


# --- the products ---------------------------------------------------------------------------------


def products(act_nd, load_e, stacks, dot=dispatch.grouped_dot, *, weight_n):
    """The experts without their silu, so that integers stay integers."""
    gate_edf, up_edf, down_efd = stacks
    inner_nf = dot(act_nd, gate_edf, load_e) * dot(act_nd, up_edf, load_e)
    return dot(inner_nf * weight_n[:, None], down_efd, load_e)


def densely(act_nd, weight_nk, stacks, expert_nk):
    gate_edf, up_edf, down_efd = stacks
    hit_nke = (expert_nk[:, :, None] == jnp.arange(EXPERTS)[None, None]).astype(jnp.float32)
    weight_ne = jnp.einsum("nk,nke->ne", weight_nk, hit_nke)
    inner_nef = jnp.einsum("nd,edf->nef", act_nd, gate_edf)
    inner_nef *= jnp.einsum("nd,edf->nef", act_nd, up_edf)
    return jnp.einsum("nef,efd,ne->nd", inner_nef, down_efd, weight_ne)


@pytest.mark.parametrize(("mesh", "block"), [("fsdp=2,expert=4", None), ("expert=8", 5)])
def test_outputs_and_gradients_are_exact(mesh: str, block: int | None, monkeypatch):
    """Sums of integers do not depend on their order: a token lost or sent twice would show."""
    monkeypatch.setattr(dispatch, "swiglu_groups", products)
    tokens, hidden, inner = 128, 8, 4
    where = make_mesh(mesh)
    layout = experts._layout(where, jnp.zeros((1, 1)), block)

    def whole_numbers(most: int, *shape: int) -> jax.Array:
        return jnp.asarray(GENERATOR.integers(-most, most + 1, shape), jnp.float32)

    act_nd, grad_nd = (whole_numbers(2, tokens, hidden) for _ in range(2))
    weight_nk = whole_numbers(3, tokens, TOP_K)
    into, out = (EXPERTS, hidden, inner), (EXPERTS, inner, hidden)
    stacks = tuple(whole_numbers(1, *shape) for shape in (into, into, out))

    @jax.jit
    def on_mesh(act_nd, weight_nk, stacks, expert_nk, grad_nd):
        def run(act_nd, weight_nk, stacks):
            return jax.shard_map(
                functools.partial(dispatch.dropless, layout),
                mesh=where,
                in_specs=(experts._TOKENS, experts._TOKENS, experts._TOKENS, experts._STACKS),
                out_specs=experts._TOKENS,
                check_vma=False,
            )(act_nd, expert_nk, weight_nk, stacks)

        out_nd, vjp = jax.vjp(run, act_nd, weight_nk, stacks)
        return out_nd, vjp(grad_nd)

    for routing in (at_random, crowded, in_turns):
        expert_nk = jnp.asarray(routing(tokens))
        out_nd, vjp = jax.vjp(
            functools.partial(densely, expert_nk=expert_nk), act_nd, weight_nk, stacks
        )
        found = on_mesh(act_nd, weight_nk, stacks, expert_nk, grad_nd)
        jax.tree.map(np.testing.assert_array_equal, found, (out_nd, vjp(grad_nd)))
