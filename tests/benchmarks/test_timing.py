"""Estimated seconds of a scheduled program: handwritten ones, and links counted one by one."""

import pytest

from benchmarks.hlo.collective import Collective
from benchmarks.hlo.timing import Chip, Stretch, stretches
from benchmarks.scale import spent

# A cycle is a second, a byte on a line of eight chips as well.
CHIP = Chip(clock=1.0, peak=64.0, link=1.0, side=8, wraps=False)

PROGRAM = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %r = f32[] add(%a, %b)
}}

%fused (p: f32[16]) -> f32[16] {{
  %p = f32[16] parameter(0)
  ROOT %n = f32[16] negate(%p)
}}

{more}
ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16] parameter(0)
{lines}
}}
"""
GATHER = "all-gather-start(%x), replica_groups={}, dimensions={0}"


def fusion(name, cycles, scope, root=""):
    return (
        f"  {root}%{name} = f32[16] fusion(%x), kind=kLoop, calls=%fused, "
        f'metadata={{op_name="{scope}"}}, '
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


def read(*lines, more=""):
    found = stretches(PROGRAM.format(lines="\n".join(lines), more=more), CHIP)
    return [(s.scope, s.computed, s.waited, s.hidden) for s in found]


@pytest.mark.parametrize("between", [40, 400])
def test_what_is_computed_between_a_start_and_its_done_hides_as_much(between):
    took = 7 / 8 * 128 * 4
    found = read(
        f'  %s = (f32[16], f32[128]) {GATHER}, metadata={{op_name="gather"}}',
        fusion("f", between, "f"),
        "  %d = f32[128] all-gather-done(%s)",
        fusion("g", 5, "g", "ROOT "),
    )
    hidden = min(took, between)
    assert found == [
        ("f", between, 0, 0),
        ("gather", 0, took - hidden, hidden),
        ("g", 5, 0, 0),
    ]


def test_a_collective_in_one_piece_is_waited_for_and_loops_count():
    body = f"""
%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {{
  %p = (s32[], f32[16]) parameter(0)
  %x = f32[16] get-tuple-element(%p), index=1
{fusion("inner", 10, "")}
  %a = f32[16] all-to-all(%inner), replica_groups={{}}, dimensions={{0}}
  ROOT %t = (s32[], f32[16]) tuple(%p, %a)
}}

%condition (p: (s32[], f32[16])) -> pred[] {{
  %p = (s32[], f32[16]) parameter(0)
  ROOT %c = pred[] constant(false)
}}
"""
    loop = (
        '  %w = (s32[], f32[16]) while(%x), condition=%condition, body=%body, metadata={op_name="l"'
    )
    loop += '}, backend_config={"known_trip_count":{"n":"3"}}'
    found = read(loop, fusion("f", 1, "f", "ROOT "), more=body)
    assert found == [("l", 30, 0, 0), ("l", 0, 3 * 64 * 8 / 4, 0), ("f", 1, 0, 0)]


def test_what_has_no_estimate_costs_its_products_at_the_peak():
    """libtpu 0.0.52 writes the largest integer there; the older compiler's kernels say nothing."""
    kernel = (
        '  %k = f32[16] custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"cost_estimate":{"flops":"640"}}}, metadata={op_name="k"}'
    )
    unknown = fusion("f", 2**63 - 1, "f", "ROOT ").replace("%fused", "%product")
    product = """
%product (p: f32[16]) -> f32[16] {
  %p = f32[16] parameter(0)
  %w = f32[16,16] constant({...})
  ROOT %d = f32[16] dot(%w, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    found = read(kernel, unknown, more=product)
    flops = 2 * 16 * 16
    assert found == [("k", 10, 0, 0), ("f", flops / 64, 0, 0)]


def test_the_text_of_another_compiler_raises():
    with pytest.raises(ValueError, match="expected a program compiled for a TPU"):
        read("  ROOT %n = f32[16] negate(%x)")


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("side", [4, 8, 16])
def test_an_all_to_all_takes_as_long_as_its_fullest_link(side, wraps):
    chip = Chip(clock=1.0, peak=1.0, link=3.0, side=side, wraps=wraps)
    piece, load = 1.0, [0.0] * side  # to the right, of each chip
    for start in range(side):
        for right in range(side):
            left, distance = side - right, right
            if not wraps:
                distance = right if start + right < side else 0  # else it goes to the left
            elif right > left:
                distance = 0
            for step in range(distance):
                load[(start + step) % side] += piece / (2 if wraps and right == left else 1)
    sent = Collective("all-to-all", "f32", 0, side * piece, side, 5, "")
    assert chip.seconds_sent(sent) == max(load) / 3


def test_a_ring_gathers_from_both_sides():
    gathered = Collective("all-gather", "f32", 0, 160.0, 16, 5, "")
    line = Chip(clock=1.0, peak=1.0, link=1.0, side=16, wraps=False)
    ring = Chip(clock=1.0, peak=1.0, link=1.0, side=16, wraps=True)
    assert line.seconds_sent(gathered) == 150.0
    assert ring.seconds_sent(gathered) == 75.0
    # Half of a ring is a line.
    half = Collective("all-gather", "f32", 0, 160.0, 8, 1, "")
    assert ring.seconds_sent(half) == 140.0
    assert ring.seconds_sent(Collective("all-gather", "f32", 0, 160.0, 1, 1, "")) == 0.0


def test_the_optimizer_is_what_follows_the_micro_batches():
    pieces = [
        Stretch("cast", 0, computed=1),
        Stretch("jvp()/x", 1, computed=50),
        Stretch("jvp()/x", 1, waited=20),
        Stretch("body/reduce_sum", 2, computed=2),
        Stretch("shard_map/muon.newton_schulz/muon.split/x", 3, waited=3, hidden=4),
        Stretch("shard_map/muon.exchange/x", 4, computed=5, waited=6),
        Stretch("shard_map/mul", 5, computed=7),
        Stretch("shard_map/adamw.gather/x", 6, waited=8),
    ]
    found = spent.by_part(pieces)
    assert [*found] == [*spent.PARTS]
    assert found["model"] == {"computed": 51, "waited": 20, "hidden": 0}
    assert found["muon.split"] == {"computed": 0, "waited": 3, "hidden": 4}
    assert found["muon.newton_schulz"] == {"computed": 0, "waited": 0, "hidden": 0}
    took = spent.seconds(found)
    assert took["clipping, checks"] == 2 and took["momentum, AdamW"] == 7
    assert took["muon.exchange"] == 11 and took["adamw.gather"] == 8
    assert took["all"] == 71 + 2 + 3 + 11 + 7 + 8
    assert spent.seconds(found, model=9)["all"] == 9 + 31
