"""The counter of HLO: handwritten modules for each form, and compiled programs of known cost."""

import base64
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, targets

TPU = targets.TARGETS["v5e-8"]

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module(body: str, computations: str = "", devices: int = 8) -> str:
    return f"""HloModule jit_step, is_scheduled=true, num_partitions={devices}
{ADD}{computations}
ENTRY %main (x: f32[64,4]) -> f32[64,4] {{
  %x = f32[64,4]{{1,0}} parameter(0)
{body}
}}
"""


def only(text: str, **keywords) -> hlo.Collective:
    (found,) = hlo.collectives(text, **keywords)
    return found


# 64x4 float32 is 1024 bytes.
KINDS = {
    "all-gather": ("f32[64,4]{1,0} all-gather(%x), dimensions={0}", 1024 * 7 / 8),
    "all-reduce": ("f32[64,4]{1,0} all-reduce(%x), to_apply=%add", 1024 * 7 / 4),
    "reduce-scatter": ("f32[8,4]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%add", 896),
    "all-to-all": ("f32[64,4]{1,0} all-to-all(%x), dimensions={0}", 896),
    "ragged-all-to-all": ("f32[64,4]{1,0} ragged-all-to-all(%x, %x)", 896),
    "collective-broadcast": ("f32[64,4]{1,0} collective-broadcast(%x)", 1024),
}


@pytest.mark.parametrize("opcode", KINDS)
def test_wire_bytes_of_each_collective(opcode):
    call, expected = KINDS[opcode]
    line = f'  ROOT %c = {call}, replica_groups=[1,8]<=[8], metadata={{op_name="jit(step)/here"}}'
    found = only(module(line))
    assert (found.opcode, found.dtype, found.elements) == (opcode, "f32", 256)
    assert (found.group_size, found.executions, found.scope) == (8, 1, "jit(step)/here")
    assert found.wire_bytes == expected


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=8] {'axis_0'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=4,'axis_1'=1], device_ids=([2,2]T(1,0)) {'axis_0','axis_1'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", 1),
    ],
)
def test_replica_groups(groups, size):
    line = f"  ROOT %c = f32[64,4] all-reduce(%x), replica_groups={groups}, to_apply=%add"
    found = only(module(line))
    assert found.group_size == size
    assert found.wire_bytes == 2 * (size - 1) / size * 1024


def test_replica_groups_in_an_unknown_form_raise():
    line = "  ROOT %c = f32[64,4] all-reduce(%x), replica_groups=<8>, to_apply=%add"
    with pytest.raises(ValueError, match="cannot read the replica groups of c"):
        hlo.collectives(module(line))


def test_collective_permute_costs_its_buffer_unless_nothing_moves():
    line = "  ROOT %c = f32[64,4] collective-permute(%x), source_target_pairs={}"
    assert only(module(line.replace("{}", "{{0,1},{1,0}}"))).wire_bytes == 1024
    assert only(module(line.replace("{}", "{{0,0},{1,1}}"))).wire_bytes == 0


STARTS = {
    "all-reduce": "  %s = f32[64,4] all-reduce-start(%x), replica_groups={}, to_apply=%add",
    "all-gather": (
        "  %s = (f32[8,4], f32[64,4]) all-gather-start(%x), replica_groups={}, dimensions={0}"
    ),
    "reduce-scatter": (
        "  %s = ((f32[64,4]), f32[8,4]) reduce-scatter-start(%x), replica_groups={}, to_apply=%add"
    ),
    "all-to-all": "  %s = ((f32[64,4]), f32[64,4]) all-to-all-start(%x), replica_groups={}",
    "collective-permute": (
        "  %s = (f32[64,4], f32[64,4], u32[], u32[]) collective-permute-start(%x),"
        " source_target_pairs={{0,1},{1,0}}"
    ),
}


@pytest.mark.parametrize("opcode", STARTS)
def test_asynchronous_pairs_count_once(opcode):
    done = f"  ROOT %d = f32[64,4] {opcode}-done(%s), metadata={{}}"
    found = only(module(f"{STARTS[opcode]}\n{done}"))
    assert (found.opcode, found.elements, found.bytes) == (opcode, 256, 1024)


def test_generic_asynchronous_calls_count_once():
    wrapped = """
%wrapped (p: f32[64,4]) -> f32[8,4] {
  %p = f32[64,4] parameter(0)
  ROOT %rs = f32[8,4] reduce-scatter(%p), replica_groups={}, dimensions={0}, to_apply=%add
}
"""
    body = """
  %s = ((f32[64,4]), f32[8,4], u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[64,4]), f32[8,4], u32[]) async-update(%s), calls=%wrapped
  ROOT %d = f32[8,4] async-done(%u), calls=%wrapped
"""
    assert only(module(body, wrapped)).wire_bytes == 896


def test_combined_collectives_sum_their_arrays():
    both = "(f32[64,4]{1,0:T(8,128)S(1)}, /*index=1*/bf16[64,4]{1,0})"
    line = f"  ROOT %c = {both} all-reduce(%x, %x), replica_groups={{}}, to_apply=%add"
    found = only(module(line))
    assert (found.dtype, found.elements, found.bytes) == ("bf16+f32", 512, 1536)
    ops = "((f32[8,4], u16[8,4]), (f32[64,4], u16[64,4]))"
    found = only(module(f"  ROOT %c = {ops} all-gather-start(%x, %x), replica_groups={{}}"))
    assert (found.dtype, found.elements, found.bytes) == ("f32+u16", 512, 1536)


def test_a_dropped_scope_is_that_of_an_operand():
    body = """
  %dot = f32[64,4] multiply(%x, %x), metadata={op_name="jit(step)/transpose(jvp())/dot"}
  ROOT %c = f32[64,4] all-reduce(%x, %dot), replica_groups={}, to_apply=%add, metadata={id="1"}
"""
    assert only(module(body)).scope == "jit(step)/transpose(jvp())/dot"


def test_all_to_all_of_a_tuple_counts_its_whole_buffer():
    parts = ", ".join(["f32[8,4]"] * 8)
    line = f"  ROOT %c = ({parts}) all-to-all(%x, %x), replica_groups={{}}"
    assert only(module(line)).wire_bytes == 896


@pytest.mark.parametrize(
    ("dtype", "size"), [("bf16", 2), ("u16", 2), ("f8e4m3fn", 1), ("pred", 1), ("s4", 0.5)]
)
def test_element_types(dtype, size):
    line = f"  ROOT %c = {dtype}[64,4] all-gather(%x), replica_groups={{}}, dimensions={{0}}"
    assert only(module(line)).bytes == 256 * size


FUSED = """
%NAME (input: f32[64,4]) -> f32[8,4] {
  %input = f32[64,4] parameter(0)
  %ar = f32[64,4] all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[8,4] dynamic-slice(%ar, %input), dynamic_slice_sizes={8,4}
}
"""


def test_the_fused_reduce_scatter_of_tpus():
    fusion = "  ROOT %f = f32[8,4] fusion(%x), kind=kCustom, calls=%NAME"
    fusion += ', metadata={op_name="jit(step)/transpose(jvp())/dot"}'
    for name, extra in (
        ("all-reduce-scatter.3", ""),
        ("other", ', backend_config={"c":{"emitter":"AllReduceScatterFusion"}}'),
    ):
        text = module(fusion.replace("NAME", name) + extra, FUSED.replace("NAME", name))
        found = only(text)
        assert (found.opcode, found.wire_bytes) == ("reduce-scatter", 896)
        assert found.scope == "jit(step)/transpose(jvp())/dot"
    text = module(fusion.replace("NAME", "other"), FUSED.replace("NAME", "other"))
    assert only(text).opcode == "all-reduce"


def piece(name: str, chain: str, channel: int) -> str:
    return f"""
%{name} (p: f32[8,4]) -> f32[64,4] {{
  %p = f32[8,4] parameter(0)
  ROOT %ag = f32[64,4] all-gather(%p), channel_id={channel}, replica_groups={{}}, \
dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}
}}
"""


def test_pieces_of_one_chain_count_once():
    computations = piece("p0", "0", 5) + piece("p1", "0", 5) + piece("p2", "0", 5)
    computations += piece("q0", "1", 6) + piece("q1", "1", 6)
    body = "\n".join(
        f"  %f{n} = f32[64,4] fusion(%x), kind=kCustom, calls=%{n}"
        for n in ("p0", "p1", "p2", "q0", "q1")
    )
    found = hlo.collectives(module(body, computations))
    assert [c.bytes for c in found] == [1024, 1024]


def test_a_collective_that_goes_on_in_a_loop_counts_as_often_as_it_is_started():
    """One all-gather, started before four rounds of a loop whose body has a piece of it."""
    starts = '  ROOT %s = f32[64,4] custom-call(%ag), custom_call_target="AsyncCollectiveStart"'
    start = piece("p0", "0", 5).replace("  ROOT %ag", "  %ag").replace("\n}", f"\n{starts}\n}}")
    loop = """
%body (state: (s32[], f32[64,4])) -> (s32[], f32[64,4]) {
  %state = (s32[], f32[64,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[64,4] get-tuple-element(%state), index=1
  %f1 = f32[64,4] fusion(%v), kind=kCustom, calls=%p1
  ROOT %r = (s32[], f32[64,4]) tuple(%i, %f1)
}

%cond (state: (s32[], f32[64,4])) -> pred[] {
  %state = (s32[], f32[64,4]) parameter(0)
  ROOT %go = pred[] constant(true)
}
"""
    body = """
  %f0 = f32[64,4] fusion(%x), kind=kCustom, calls=%p0
  %w = (s32[], f32[64,4]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
"""
    [found] = hlo.collectives(module(body, start + piece("p1", "0", 5) + loop))
    assert (found.executions, found.bytes) == (1, 1024)
    [found] = hlo.collectives(module(body, piece("p0", "0", 5) + piece("p1", "0", 5) + loop))
    assert found.executions == 4  # where no start is seen


LOOP = """
%body (state: (s32[], f32[64,4])) -> (s32[], f32[64,4]) {
  %state = (s32[], f32[64,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[64,4] get-tuple-element(%state), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %ar = f32[64,4] all-reduce(%v), replica_groups={}, to_apply=%add
  %w = f32[4,4] constant({...})
  %dot = f32[64,4] dot(%ar, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[64,4]) tuple(%next, %dot)
}

%condition (state: (s32[], f32[64,4])) -> pred[] {
  %state = (s32[], f32[64,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(17)
  ROOT %less = pred[] compare(%i, %bound), direction=DIRECTION
}
"""


def loop(step: int = 1, direction: str = "LT", start: str = "constant(2)", config: str = "") -> str:
    body = f"""
  %start = s32[] {start}
  %copied = s32[] copy(%start)
  %state = (s32[], f32[64,4]) tuple(%copied, %x)
  %while = (s32[], f32[64,4]) while(%state), condition=%condition, body=%body{config}
  ROOT %r = f32[64,4] get-tuple-element(%while), index=1
"""
    return module(body, LOOP.replace("STEP", str(step)).replace("DIRECTION", direction))


def test_loops_count_as_often_as_they_run():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert only(loop(config=known)).executions == 5
    assert only(loop(config=known)).wire_bytes == 5 * 1792
    assert only(loop()).executions == 15
    assert only(loop(step=4)).executions == 4
    product = 2 * 64 * 4 * 4
    assert hlo.flops(loop()) == 15 * product


@pytest.mark.parametrize("changed", [{"direction": "NE"}, {"start": "parameter(1)"}])
def test_an_unknown_trip_count_raises_unless_told(changed):
    text = loop(**changed)
    with pytest.raises(ValueError, match=r"unknown trip count of the loop while .*assume_trip"):
        hlo.collectives(text)
    with pytest.raises(ValueError, match="unknown trip count"):
        hlo.flops(text)
    assert hlo.unknown_loops(text) == ["while"] and hlo.unknown_loops(loop()) == []
    assert only(text, assume_trip_count=3).executions == 3
    assert hlo.flops(text, assume_trip_count=3) == 3 * 2 * 64 * 4 * 4


FUSED_LOOP = """
%fused_add (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %next = s32[] add(%p, %one)
}

%fused_less (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %less = pred[] compare(%p, %q), direction=LT
}

%body (state: (s32[], f32[64,4])) -> (s32[], f32[64,4]) {
  %state = (s32[], f32[64,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[64,4] get-tuple-element(%state), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], f32[64,4]) tuple(%next, %v)
}

%condition (state: (s32[], f32[64,4])) -> pred[] {
  %state = (s32[], f32[64,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[64,4] get-tuple-element(%state), index=1
  %agreed = f32[64,4] all-reduce(%v), replica_groups={}, to_apply=%add
  %bound = s32[] constant(9)
  ROOT %less = pred[] fusion(%i, %bound), kind=kLoop, calls=%fused_less
}
"""


def test_counters_inside_fusions_and_collectives_in_conditions():
    body = """
  %start = s32[] constant(0)
  %state = (s32[], f32[64,4]) tuple(%start, %x)
  ROOT %while = (s32[], f32[64,4]) while(%state), condition=%condition, body=%body
"""
    assert only(module(body, FUSED_LOOP)).executions == 10  # the condition is asked once more


def test_loops_within_calls_multiply():
    inner = LOOP.replace("STEP", "1").replace("DIRECTION", "LT")
    outer = """
%nested (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4] parameter(0)
  %zero = s32[] constant(0)
  %state = (s32[], f32[64,4]) tuple(%zero, %p)
  %while = (s32[], f32[64,4]) while(%state), condition=%condition, body=%body
  ROOT %r = f32[64,4] get-tuple-element(%while), index=1
}
"""
    body = """
  %one = f32[64,4] call(%x), to_apply=%nested
  ROOT %two = f32[64,4] call(%one), to_apply=%nested
"""
    found = hlo.collectives(module(body, inner + outer))
    assert [c.executions for c in found] == [17, 17]


def test_ragged_products_of_tpus_count_each_row_once():
    """As libtpu 0.0.52 writes `ragged_dot`: four groups, each on all rows, in two fusions."""
    ragged = (
        'backend_config={"convolution_algorithm_config":{"is_ragged_dot":true,'
        '"num_groups_in_ragged_dot":"4"},"mask_aggregator_config":{'
        '"mask_dim_to_iteration_index":["1","2"],'
        '"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_GROUP_STARTS"}}'
    )
    fusions = f"""
%product (x: bf16[96,8], w: bf16[4,8,16]) -> bf16[96,16] {{
  %x = bf16[96,8] parameter(0)
  %w = bf16[4,8,16] parameter(1)
  %lhs = bf16[4,96,8] broadcast(%x), dimensions={{1,2}}
  %all = bf16[4,96,16] dot(%lhs, %w), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}
  ROOT %sum = bf16[96,16] reduce(%all, %zero), dimensions={{0}}, to_apply=%add
}}

%wrapped (x: bf16[96,8], w: bf16[4,8,16]) -> bf16[96,16] {{
  %x = bf16[96,8] parameter(0)
  %w = bf16[4,8,16] parameter(1)
  ROOT %inner = bf16[96,16] fusion(%x, %w), kind=kOutput, calls=%product, \
metadata={{op_name="a/b"}}, {ragged}
}}
"""
    line = f"  ROOT %f = bf16[96,16] fusion(%x, %w), kind=kCustom, calls=%wrapped, {ragged}"
    text = module(line, fusions)
    assert hlo.flops(text) == 2 * 96 * 8 * 16
    assert hlo.flops_by_scope(text) == {"a/b": 2 * 96 * 8 * 16}


@pytest.mark.parametrize("mode", ["GROUP_STARTS", "ITERATION_INDICES"])
def test_ragged_gradients_of_older_compilers_count_each_row_once(mode: str):
    """As libtpu 0.0.42 writes the weights' gradient, for v5e and v5p: a row of the mask a group."""
    masked = (
        'backend_config={{"mask_aggregator_config":{{"mask_dim_to_iteration_index":{dims},'
        f'"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_{mode}"}}}}}}}}'
    )
    product = """
%product (x: bf16[96,8], y: bf16[96,16], mask: pred[4,96]) -> bf16[4,8,16] {
  %x = bf16[96,8] parameter(0)
  %y = bf16[96,16] parameter(1)
  %mask = pred[4,96] parameter(2)
  %xs = bf16[4,96,8] broadcast(%x), dimensions={1,2}
  %ys = bf16[4,96,16] broadcast(%y), dimensions={1,2}
  ROOT %c = bf16[4,8,16] convolution(%xs, %ys), window={size=4 stride=3 lhs_dilate=4}, \
dim_labels=0fb_0io->0bf
}
"""
    line = "  ROOT %f = bf16[4,8,16] fusion(%x, %x, %x), kind=kOutput, calls=%product, "
    text = module(line + masked.format(dims='["1","3"]'), product)
    assert hlo.flops(text) == 2 * 96 * 8 * 16
    # The table of the groups' starts is said to skip as well, and masks nothing.
    assert hlo.flops(module(line + masked.format(dims="[]"), product)) == 4 * 2 * 96 * 8 * 16
    unmasked = product.replace("pred[4,96] parameter", "f32[4,96] parameter")
    with pytest.raises(ValueError, match="cannot read the groups of the ragged product f"):
        hlo.flops(module(line + masked.format(dims='["1","3"]'), unmasked))


RAGGED = """
import jax, jax.numpy as jnp
from benchmarks import hlo, targets

place = jax.sharding.SingleDeviceSharding(targets.devices(targets.TARGETS["v5e-8"])[0])
shapes = ((4096, 256), jnp.bfloat16), ((4, 256, 512), jnp.bfloat16), ((4,), jnp.int32)
described = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
dot = jax.lax.ragged_dot
square = lambda x, w, groups: jnp.square(dot(x, w, groups).astype(jnp.float32)).sum()
step = lambda *args: (dot(*args), jax.grad(square, argnums=(0, 1))(*args))
print(hlo.flops(jax.jit(step).lower(*described).compile().as_text()))
"""


@pytest.mark.one_stack
@pytest.mark.skipif(targets.missing(TPU) is not None, reason=f"{targets.missing(TPU)}")
def test_ragged_products_of_the_installed_compiler():
    """A product of rows, and both of its gradients."""
    command = [sys.executable, "-c", RAGGED]
    done = subprocess.run(
        command, env=targets.environment(TPU), cwd=targets.ROOT, stdout=subprocess.PIPE
    )
    assert float(done.stdout.split()[-1]) == 3 * 2 * 4096 * 256 * 512


def test_an_instruction_over_several_lines_is_one():
    """As Pallas kernels with metadata are written: a line then begins with a closing bracket."""
    kernel = """  %k = f32[64,4] custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="a/b"}
  ROOT %c = f32[64,4] all-reduce(%k), replica_groups={}, to_apply=%add"""
    assert only(module(kernel)).scope == "a/b"


def test_kernels_of_tpus_count_what_they_say():
    """libtpu 0.0.42 multiplies the rows of groups in a Mosaic kernel."""
    kernel = '  ROOT %k = bf16[96,16] custom-call(%x), custom_call_target="tpu_custom_call", '
    config = 'backend_config={{"custom_call_config":{{"body":"{}"{}}}}}'
    multiplies, moves = (
        base64.b64encode(body).decode() for body in (b"%1 = tpu.matmul %0", b"tpu.iota")
    )
    said = ',"cost_estimate":{"flops":"24576","transcendentals":"0"}'
    assert hlo.flops(module(kernel + config.format(multiplies, said))) == 24576
    assert hlo.flops(module(kernel + config.format(moves, ""))) == 0
    with pytest.raises(ValueError, match="the kernel k multiplies, and has no estimate"):
        hlo.flops(module(kernel + config.format(multiplies, "")))


def test_conditionals_count_their_heaviest_branch():
    branches = """
%light (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4] parameter(0)
  ROOT %g = f32[64,4] all-gather(%p), replica_groups={}, dimensions={0}
}

%heavy (p: f32[64,4]) -> f32[64,4] {
  %p = f32[64,4] parameter(0)
  %w = f32[4,4] constant({...})
  %r = f32[64,4] all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %dot = f32[64,4] dot(%r, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    for attributes in (
        "branch_computations={%light, %heavy}",
        "true_computation=%heavy, false_computation=%light",
    ):
        line = f"  ROOT %c = f32[64,4] conditional(%p, %x, %x), {attributes}"
        text = module(line, branches)
        assert only(text).opcode == "all-reduce"
        assert hlo.flops(text) == 2 * 64 * 4 * 4
        assert hlo.flops(text, branches="mean") == 64 * 4 * 4


def test_what_is_not_hlo_raises():
    with pytest.raises(ValueError, match=r"no ENTRY computation.*compiled\.as_text"):
        hlo.collectives("nothing")
    with pytest.raises(ValueError, match="cannot read this HLO instruction"):
        hlo.collectives(module("  %c = f32[64,4] {1,0}"))
    with pytest.raises(ValueError, match="cannot read this HLO shape"):
        hlo.collectives(module("  %c = what all-reduce(%x)"))
    with pytest.raises(ValueError, match="unbalanced brackets"):
        hlo.collectives(module("  %c = f32[64,4] all-reduce(%x"))
    line = "  ROOT %c = quux[64,4] all-gather(%x), replica_groups={}"
    with pytest.raises(ValueError, match="unknown HLO element type 'quux'"):
        hlo.collectives(module(line))


# --- products

GEMM = (
    '  ROOT %c = (f32[64,8], s8[4096]) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)


def test_products_of_libraries():
    weight = "  %w = f32[4,8] constant({...})\n"
    assert hlo.flops(module(weight + GEMM)) == 2 * 64 * 8 * 4
    unknown = module(weight + GEMM.replace("__cublas$gemm", "__onednn$matmul"))
    with pytest.raises(ValueError, match=r"library call '__onednn\$matmul'"):
        hlo.flops(unknown)
    assert hlo.flops(module(GEMM.replace("__cublas$gemm", "Sharding"))) == 0


def test_products_written_as_convolutions():
    # What XLA:TPU makes of x @ w, and of a batch of eight products.
    plain = """
  %w = f32[4,8] constant({...})
  ROOT %c = f32[64,8] convolution(%x, %w), dim_labels=bf_io->bf
"""
    assert hlo.flops(module(plain)) == 2 * 64 * 8 * 4
    batch = """
  %a = f32[8,16,4] constant({...})
  %w = f32[8,4,32] constant({...})
  ROOT %c = f32[8,16,32] convolution(%a, %w), \
window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
"""
    assert hlo.flops(module(batch)) == 8 * 2 * 16 * 32 * 4
    with pytest.raises(ValueError, match="convolution c has no dim_labels"):
        hlo.flops(module(plain.replace("dim_labels=bf_io->bf", "window={}")))


# --- compiled programs

N, ROWS, COLS = 8, 64, 32


def compiled(body):
    mesh = jax.make_mesh((N,), ("data",), axis_types=(AxisType.Auto,))
    rows = P("data")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    x = jax.ShapeDtypeStruct((N * ROWS, COLS), jnp.float32, sharding=NamedSharding(mesh, rows))
    return jax.jit(mapped).lower(x).compile().as_text()


LOCAL = ROWS * COLS * 4  # bytes of a device's shard
PROGRAMS = {
    "psum": (lambda x: lax.psum(x, "data"), "all-reduce", 2 * 7 / 8 * LOCAL),
    "psum_scatter": (
        lambda x: lax.psum_scatter(x, "data", tiled=True),
        "reduce-scatter",
        7 / 8 * LOCAL,
    ),
    "all_gather": (lambda x: lax.all_gather(x, "data", tiled=True), "all-gather", 7 * LOCAL),
    "all_to_all": (
        lambda x: lax.all_to_all(x, "data", 0, 1, tiled=True),
        "all-to-all",
        7 / 8 * LOCAL,
    ),
    "ppermute": (
        lambda x: lax.ppermute(x, "data", [(i, (i + 1) % N) for i in range(N)]),
        "collective-permute",
        LOCAL,
    ),
    "groups": (
        lambda x: lax.psum_scatter(
            x, "data", tiled=True, axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]
        ),
        "reduce-scatter",
        3 / 4 * LOCAL,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_collectives(name):
    body, opcode, expected = PROGRAMS[name]
    found = hlo.collectives(compiled(body))
    assert hlo.total_bytes(found) == expected
    assert {c.opcode for c in found} == {opcode}


def test_compiled_scan_with_collectives_and_products():
    def body(x):
        def step(carry, _):
            with jax.named_scope("inside"):
                product = jnp.tanh(carry @ jnp.ones((COLS, COLS)))
                return lax.psum(product, "data") * carry, None

        return lax.scan(step, x, length=11)[0]

    text = compiled(body)
    (found,) = hlo.collectives(text)
    assert (found.opcode, found.executions, found.group_size) == ("all-reduce", 11, 8)
    assert found.wire_bytes == 11 * 2 * 7 / 8 * LOCAL
    assert "inside" in found.scope
    assert hlo.flops(text) == 11 * 2 * ROWS * COLS * COLS


def test_flops_without_loops_are_xlas_own():
    def products(x):
        gram = x @ x.mT
        batch = jnp.einsum("bij,bjk->bik", gram.reshape(4, 16, 64), x.reshape(4, 64, 8))
        return gram @ gram, batch

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    lowered = jax.jit(products).lower(x).compile()
    expected = 2 * 64 * 64 * 32 + 2 * 64**3 + 4 * 2 * 16 * 8 * 64
    assert hlo.flops(lowered.as_text()) == expected
    assert lowered.cost_analysis()["flops"] == pytest.approx(expected, rel=0.01)
