"""The planner: a pure function, tested without devices."""

import dataclasses
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from muon_jax import MeshCosts
from muon_jax._matrices import FusedBlocks, leaf_views
from muon_jax._mesh import plan as _plan
from muon_jax._mesh.choices import Choice, Choices, Sharers
from muon_jax._mesh.layout import cut_of, zero1_layout
from muon_jax._mesh.plan import Everywhere, PlannedLeaf, Split
from muon_jax._mesh.planner import Search, make_plan
from muon_jax._mesh.pricing import Pricing
from muon_jax._polynomials import resolve_schedule
from muon_jax._products import of_iteration

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
LAST_TWO = MuonDimensionNumbers(-2, -1)
GIB = 2**30
STEPS = resolve_schedule("standard")


def leaf(shape, sizes, spec=None, numbers=LAST_TWO, zero1_axes=None):
    """A leaf as the optimizer hands it to the planner."""
    views = leaf_views(shape, numbers, "leaf")
    spec = spec or ((),) * len(shape)
    layout = zero1_layout(shape, spec, zero1_axes or tuple(sizes), sizes, views)
    return PlannedLeaf(views, layout, BF16, F32)


def plan(leaves, sizes, zero1_axes=None, schedule=STEPS, max_group_bytes=GIB, **keywords):
    return make_plan(
        leaves,
        sizes,
        zero1_axes or tuple(sizes),
        schedule=schedule,
        max_group_bytes=max_group_bytes,
        **keywords,
    )


def routes(group):
    return [(part.route, part.matrices, ways(part)) for part in group.parts]


def ways(part):
    return part.ways if isinstance(part, Split) else 1


def balance(result, sizes, group_counts):
    """The busiest device's FLOPs to an even share, given `(matrices, rows, cols)` of each group."""
    total = sum(n * of_iteration(STEPS, r, c).flops(r, c) for n, r, c in group_counts)
    return result.flops.max() * math.prod(sizes.values()) / total


# --- Layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "param", "sizes", "expected"),
    [
        # The longer side of the matrices, whatever stack they lie in.
        ((16, 32, 64), "..", {"d": 8}, ((), (), ("d",))),
        ((12, 64, 32), "..", {"d": 8}, ((), ("d",), ())),
        # No side of a matrix divides: the stack.
        ((16, 30, 60), "..", {"d": 8}, (("d",), (), ())),
        # The longer side does not divide: the other one.
        ((32, 60), "..", {"d": 8}, (("d",), ())),
        # No dimension takes both axes: one each, the longer axis first.
        ((12, 6), "..", {"a": 2, "b": 4}, (("b",), ("a",))),
        # Only one axis fits anywhere.
        ((5, 6), "..", {"a": 2, "b": 4}, ((), ("a",))),
        ((5, 7), "..", {"a": 2, "b": 4}, ((), ())),
        # Axes that shard the parameter stay where they are, and the others come after them.
        ((64, 31, 63), (("e",), (), ()), {"d": 2, "e": 4}, (("e", "d"), (), ())),
        ((64, 32, 64), (("e",), (), ()), {"d": 2, "e": 4}, (("e",), ("d",), ())),
        ((32, 64), (("f",), ()), {"d": 2, "f": 4}, (("f",), ("d",))),
        # An axis of length one is no axis.
        ((32, 64), "..", {"d": 1, "f": 4}, ((), ("f",))),
    ],
)
def test_the_state_is_sharded_where_it_divides(shape, param, sizes, expected):
    param = ((),) * len(shape) if param == ".." else param
    views = leaf_views(shape, LAST_TWO, "leaf")
    layout = zero1_layout(shape, param, tuple(sizes), sizes, views)
    assert layout.state == expected
    assert layout.param == param


def test_axes_left_out_of_zero1_axes_are_not_used():
    sizes = {"a": 2, "b": 4}
    views = leaf_views((32, 64), LAST_TWO, "leaf")
    assert zero1_layout((32, 64), ((), ()), ("a",), sizes, views).state == ((), ("a",))


def test_fused_blocks_keep_their_axis_whole():
    views = leaf_views((32, 96), FusedBlocks((32, 32, 32)), "leaf")
    assert zero1_layout((32, 96), ((), ()), ("d",), {"d": 8}, views).state == (("d",), ())


def test_a_layout_of_adamw_takes_the_last_dimension_that_divides():
    assert zero1_layout((8, 16), ((), ()), ("d",), {"d": 8}).state == ((), ("d",))
    assert zero1_layout((8, 9), ((), ()), ("d",), {"d": 8}).state == (("d",), ())
    assert zero1_layout((3,), ((),), ("d",), {"d": 8}).state == ((),)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        ((), (), ("a",)),
        (("a",), (), ()),
        ((), ("b",), ()),
        (("a",), ("b",), ()),
        ((), ("a", "b"), ()),
        (("b",), (), ("a",)),
    ],
)
def test_cutting_and_joining_are_inverse_and_pieces_are_shards(spec, tall):
    """[d, heads, width] with heads x width as one side, sharded on any of the three."""
    sizes = {"a": 2, "b": 4}
    shape = (16, 8, 4) if not tall else (8, 4, 16)
    numbers = MuonDimensionNumbers(0, (1, 2)) if not tall else MuonDimensionNumbers((0, 1), 2)
    spec = spec if not tall else (spec[1], spec[2], spec[0])
    view = leaf_views(shape, numbers, "leaf")[0]
    whole = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    matrix = np.asarray(view.take(jnp.asarray(whole)))
    wide = matrix.swapaxes(1, 2) if matrix.shape[1] > matrix.shape[2] else matrix
    cut = cut_of(view, spec, sizes)
    axes = tuple(axis for axis in sizes if any(axis in named for named in spec))
    pieces = np.asarray(cut.split(jnp.asarray(wide), axes, sizes))
    np.testing.assert_array_equal(cut.join(jnp.asarray(pieces), axes, sizes), wide)
    for number, coordinate in enumerate(np.ndindex(*(sizes[a] for a in axes))):
        here = dict(zip(axes, coordinate, strict=True))
        shard = whole
        for dim, named in enumerate(spec):
            index, count = 0, 1
            for axis in named:
                index, count = index * sizes[axis] + here[axis], count * sizes[axis]
            length = shard.shape[dim] // count
            shard = shard.take(range(index * length, (index + 1) * length), axis=dim)
        local = view.of_shape(shard.shape)
        mine = np.asarray(local.take(jnp.asarray(shard)))
        mine = mine.swapaxes(1, 2) if matrix.shape[1] > matrix.shape[2] else mine
        np.testing.assert_array_equal(pieces[number].ravel(), mine.ravel())


# --- The example in `_mesh.plan` ---------------------------------------------------------------


def example(choice):
    """Three matrices of 64x128 on four devices, by one route: the part, its bytes, its FLOPs."""
    sizes = {"data": 4}
    (group,) = plan([leaf((64, 128), sizes) for _ in range(3)], sizes).groups
    pricing = Pricing(sizes, STEPS, MeshCosts())
    choices = Choices(pricing, GIB, whole_result=False)
    (part,) = choices.parts(group.key, 3, choice, pricing.no_flops())
    return part, pricing.traffic(group.key, part), pricing.flops(group.key, [part]), group


def test_the_plans_example_is_what_the_planner_does():
    """Its tables, bytes and FLOPs, as the docstring of `_mesh.plan` states them."""
    text = _plan.__doc__
    assert text is not None
    part, sent, flops, group = example(Choice("exchange"))
    assert (group.key.team, group.key.cut_axes, group.key.kept_axes) == (("data",), ("data",), ())
    assert group.state_piece == (64, 32)
    assert f"owners = {part.owners.tolist()} " in text
    assert f"a 64x32 piece to each of three others                    {sent.exchange:,.0f}" in text
    assert f"result to each of three others                {sent.gather:,.0f}" in text
    assert f"{flops[0]:,} FLOPs on each of the devices 0, 1 and 2" in text
    assert flops.tolist() == [flops[0]] * 3 + [0]
    through = dataclasses.replace(part, through_state=True)
    around = Pricing({"data": 4}, STEPS, MeshCosts()).traffic(group.key, through)
    assert f"{around.returned:,.0f} bytes, and phase 6 gathers those, {around.gather:,.0f}" in text
    assert (around.total, around.collectives) == (sent.total, sent.collectives + 1)
    assert not part.through_state

    part, sent, flops, _ = example(Choice("split", Sharers("data", 4)))
    assert f"owners = {part.owners.tolist()}\n" in text
    assert f"three 64x32 pieces to each of three others               {sent.exchange:,.0f}" in text
    grams, iterates = 7 * 3 * 3 * 16 * 64 * 2, 2 * 3 * 3 * 16 * 128 * 2
    assert grams + iterates == sent.split
    assert f"seven times its 16 rows of three 64x64 matrices,        {grams:,}" in text
    assert f"twice its 16 rows of three iterates, 64x128              {iterates:,}" in text
    assert f"{flops[3]:,} FLOPs on every device" in text and len({*flops}) == 1
    assert f"three results to each of three others     {sent.gather:,.0f}" in text
    pairs, *_ = example(Choice("split", Sharers("data", 2)))
    assert f"would be {pairs.owners.tolist()}." in text

    part, sent, *_ = example(Choice("replicated", everything=True))
    assert f"to send {sent.total:,.0f} bytes once" in text and sent.collectives == 1
    assert routes(group) == [("replicated", 3, 1)]


# --- Routes -------------------------------------------------------------------------------------


def test_as_many_matrices_as_devices_are_exchanged_without_padding():
    sizes = {"d": 8}
    leaves = [leaf((768, 768), sizes) for _ in range(15)] + [leaf((3, 3), sizes)]
    leaves += [leaf((768, 768), sizes)]
    result = plan(leaves, sizes)
    (group, _) = result.groups
    assert routes(group) == [("exchange", 16, 1)]
    assert group.parts[0].padding == 0


def test_tall_and_wide_matrices_are_one_group():
    sizes = {"d": 8}
    result = plan([leaf((64, 256), sizes), leaf((256, 64), sizes)], sizes)
    assert len(result.groups) == 1
    assert {member.state_cut for member in result.groups[0].members} == {
        result.groups[0].members[0].state_cut
    }


def test_a_stack_on_its_own_axis_is_local():
    sizes = {"data": 2, "expert": 4}
    spec = (("expert",), (), ())
    # The stack takes the data axis too: eight matrices on each device, and one gather.
    (group,) = plan([leaf((64, 31, 63), sizes, spec)], sizes).groups
    assert routes(group) == [("local", 8, 1)]
    assert group.traffic[0].exchange == 0 and group.traffic[0].gather > 0
    # Nothing is left to shard over: no communication at all.
    (group,) = plan([leaf((64, 32, 64), {"expert": 4}, spec)], {"expert": 4}).groups
    assert routes(group) == [("local", 16, 1)]
    assert group.traffic[0].total == 0 and group.traffic[0].collectives == 0


def test_the_model_of_twelve_layers_is_balanced():
    sizes = {"d": 8}
    leaves = []
    for _ in range(12):
        leaves += [leaf((768, 768), sizes) for _ in range(4)]
        leaves += [leaf((768, 3072), sizes), leaf((3072, 768), sizes)]
    result = plan(leaves, sizes)
    assert balance(result, sizes, [(48, 768, 768), (24, 768, 3072)]) <= 1.15


@pytest.mark.parametrize("layers", [5, 6, 7, 9, 10, 11, 13])
def test_stacks_that_the_devices_do_not_divide_send_little_more(layers):
    """Six stacks a layer: four of 768x768, and the two of an MLP."""
    sizes = {"d": 8}
    shapes = [(layers, 768, 768)] * 4 + [(layers, 768, 3072), (layers, 3072, 768)]
    result = plan([leaf(shape, sizes) for shape in shapes], sizes)
    parameters = sum(math.prod(shape) for shape in shapes)
    ours = 4 * parameters * 7 / 8 + sum(t.total for g in result.groups for t in g.traffic)
    assert ours / (8 * parameters * 7 / 8) <= 0.831


@pytest.mark.parametrize(("shape", "bytes_limit"), [((1024, 1024), 0.82), ((768, 3072), 0.78)])
@pytest.mark.parametrize("sizes", [{"d": 256}, {"a": 16, "b": 16}])
def test_fewer_matrices_than_devices_are_shared(shape, bytes_limit, sizes):
    result = plan([leaf(shape, sizes) for _ in range(64)], sizes)
    (group,) = result.groups
    assert routes(group) == [("split", 64, 4)]
    assert balance(result, sizes, [(64, *shape)]) <= 1.15
    parameters = 64 * math.prod(shape)
    ours = 4 * parameters * 255 / 256 + sum(t.total for t in group.traffic)
    assert ours / (8 * parameters * 255 / 256) <= bytes_limit


def test_small_matrices_are_replicated():
    sizes = {"d": 8}
    (group,) = plan([leaf((16, 16), sizes) for _ in range(3)], sizes).groups
    assert routes(group) == [("replicated", 3, 1)]
    assert group.traffic[0].collectives == 1  # none on the way back


def test_remainders_fill_each_others_idle_devices():
    sizes = {"d": 8}
    leaves = [leaf((2048, 2048), sizes) for _ in range(12)]
    leaves += [leaf((2048, 2056), sizes) for _ in range(12)]
    result = plan(leaves, sizes)
    assert [routes(group) for group in result.groups] == [
        [("exchange", 8, 1), ("exchange", 4, 1)]
    ] * 2
    assert balance(result, sizes, [(12, 2048, 2048), (12, 2048, 2056)]) < 1.01
    first, second = ((g.parts[1].owners >= 0).any(axis=1) for g in result.groups)
    assert not (first & second).any()


def test_a_padded_remainder_returns_through_the_states_pieces():
    """Twelve of eight: gathering sixteen slots would cost a third more."""
    sizes = {"d": 8}
    (group,) = plan([leaf((12, 768, 768), sizes)], sizes).groups
    assert [part.through_state for part in group.parts] == [False, True]
    parameters = 12 * 768 * 768
    ours = 4 * parameters * 7 / 8 + sum(t.total for t in group.traffic)
    assert ours / (8 * parameters * 7 / 8) <= 0.83


def test_fsdp_pays_two_exchanges_only():
    sizes = {"fsdp": 8}
    leaves = [leaf((768, 3072), sizes, (("fsdp",), ())) for _ in range(24)]
    (group,) = plan(leaves, sizes).groups
    parameters = 24 * 768 * 3072
    assert sum(t.total for t in group.traffic) / (8 * parameters * 7 / 8) <= 0.5 / 8 * 1.01


def test_max_group_bytes_cuts_rounds_into_parts():
    sizes = {"d": 8}
    leaves = [leaf((64, 64), sizes) for _ in range(64)]
    one_round = 8 * 64 * 64 * 2
    (group,) = plan(leaves, sizes, max_group_bytes=3 * one_round).groups
    assert [part.slots for part in group.parts] == [3, 3, 2]
    (group,) = plan(leaves, sizes, max_group_bytes=1).groups
    assert [part.slots for part in group.parts] == [1] * 8


def test_leaves_that_differ_along_other_axes_are_no_group():
    """An axis outside zero1_axes repeats the work on one leaf and divides it on the other."""
    sizes = {"data": 2, "expert": 4}
    leaves = [leaf((64, 64), sizes, zero1_axes=("data",))]
    leaves += [leaf((4, 64, 64), sizes, (("expert",), (), ()), zero1_axes=("data",))]
    result = plan(leaves, sizes, zero1_axes=("data",))
    assert len(result.groups) == 2


def test_a_measured_scale_needs_the_whole_result():
    sizes = {"d": 8}
    leaves = [leaf((2048, 2048), sizes) for _ in range(2)]
    (rows,) = plan(leaves, sizes).groups
    (whole,) = plan(leaves, sizes, whole_result=True).groups
    assert rows.parts[0].ways > 1 and whole.parts[0].ways > 1
    assert rows.parts[0].returns_rows and not whole.parts[0].returns_rows
    assert rows.traffic[0].collectives == 1 + 9 + 1  # the last product's rows are not gathered
    assert whole.traffic[0].collectives == 1 + 10 + 2


def test_the_search_finds_what_trying_everything_finds():
    """Two groups that keep the busiest device equally busy: changing either one gains nothing."""
    sizes = {"d": 8}
    leaves = [leaf((4096, 4096), sizes), leaf((4096, 4224), sizes), leaf((768, 768), sizes)]
    result = plan(leaves, sizes)
    choices = Choices(Pricing(sizes, STEPS, MeshCosts()), GIB, whole_result=False)
    search = Search(choices, {group.key: 1 for group in result.groups})
    best = min(
        search.price(dict(zip(search.options, chosen, strict=True))).total
        for chosen in itertools.product(*search.options.values())
    )
    assert search.best().total == best
    first, alone = (search.descend(start).total / best for start in search.starts())
    assert (round(first, 2), alone) == (1.72, 1.0)  # one descent alone gets stuck
    assert routes(result.groups[0])[0][2] == routes(result.groups[1])[0][2] == 8


@pytest.mark.parametrize("given", [(0, 0), (-1, 0), (1, -1), (float("nan"), 0)])
def test_costs_are_positive(given):
    with pytest.raises(ValueError, match=r"flops_per_byte above 0 and latency_bytes from 0; got"):
        MeshCosts(*given)


def test_complex_products_cost_four_times_as_much():
    sizes = {"d": 1}
    views = leaf_views((8, 8), LAST_TWO, "leaf")
    layout = zero1_layout((8, 8), ((), ()), ("d",), sizes, views)
    complex64 = jnp.dtype(jnp.complex64)
    real = plan([PlannedLeaf(views, layout, F32, F32)], sizes)
    imaginary = plan([PlannedLeaf(views, layout, complex64, complex64)], sizes)
    assert imaginary.flops.max() == 4 * real.flops.max()


MESHES = [{"a": 8}, {"a": 2, "b": 4}, {"a": 2, "b": 2, "c": 2}, {"a": 3}, {"a": 1}, {"a": 16}]
SHAPES = [(16, 16), (16, 48), (48, 16), (5, 7), (6, 16, 32), (8, 16, 32), (0, 4, 4)]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.sampled_from(MESHES),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=20),
    st.sampled_from([1, 4096, GIB]),
    st.sampled_from([1.0, 1000.0]),
)
def test_every_matrix_has_one_place(sizes, shapes, max_group_bytes, flops_per_byte):
    """All matrices are in some part, each on one owner or one set of sharers, in every slot at most
    one; nothing exceeds its bound."""
    leaves = [leaf(shape, sizes) for shape in shapes]
    costs = MeshCosts(flops_per_byte, latency_bytes=0)
    result = plan(leaves, sizes, max_group_bytes=max_group_bytes, costs=costs)
    planned = sum(member.matrices for group in result.groups for member in group.members)
    total = 0
    for group in result.groups:
        ends = [0, *(part.stop for part in group.parts)]
        assert [part.start for part in group.parts] == ends[:-1]
        assert ends[-1] == sum(member.matrices for member in group.members)
        total += ends[-1]
        for part in group.parts:
            if isinstance(part, Everywhere):
                continue
            assert part.owners.shape == (math.prod(sizes[a] for a in group.key.team), part.slots)
            held = part.owners[part.owners >= 0]
            np.testing.assert_array_equal(
                np.sort(held), np.repeat(np.arange(part.matrices), ways(part))
            )
    assert total == planned
    assert (result.flops == sum(group.flops for group in result.groups)).all()
