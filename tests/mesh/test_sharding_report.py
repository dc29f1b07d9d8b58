"""The report says what the compiled program does, in bytes and in FLOPs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from muon_jax import MeshCosts, MuonDimensionNumbers, muon, opt_state_shardings, sharding_report
from muon_jax._mesh import cost

F32 = np.dtype(np.float32)
NUMBERS = MuonDimensionNumbers(-2, -1)


def abstract(shapes, mesh, specs):
    return {
        name: jax.ShapeDtypeStruct(shape, F32, sharding=NamedSharding(mesh, specs.get(name, P())))
        for name, shape in shapes.items()
    }


def compiled(params, mesh, **keywords):
    """The HLO of one update whose gradients are reduced already."""
    tx = muon(1e-3, mesh=mesh, **keywords)
    shardings = opt_state_shardings(tx, params)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    return jax.jit(tx.update).lower(params, state, params).compile().as_text()


SHAPES = {
    "many": (16, 32, 64),
    "tall": (4, 64, 32),
    "few": (3, 64, 128),
    "stack": (8, 48, 32),
    "whole": (5, 7, 9),
}
MESHES = {
    "data": ((8,), ("data",), {}),
    "data, fsdp": (
        (2, 4),
        ("data", "fsdp"),
        {"many": P(None, "fsdp"), "few": P(None, None, "fsdp"), "stack": P("fsdp")},
    ),
    "expert": ((8,), ("expert",), {"stack": P("expert"), "many": P("expert")}),
}


@pytest.mark.parametrize("flops_per_byte", [1, 100, 10**9])
@pytest.mark.parametrize("name", MESHES)
def test_bytes_and_flops_are_those_of_the_program(name, flops_per_byte):
    lengths, names, specs = MESHES[name]
    mesh = jax.make_mesh(lengths, names, axis_types=(AxisType.Auto,) * len(lengths))
    params = abstract(SHAPES, mesh, specs)
    keywords = {
        "param_specs": {name: specs.get(name, P()) for name in SHAPES},
        "muon_weight_dimension_numbers": NUMBERS,
        "ns_dtype": "bfloat16",
        "mesh_costs": MeshCosts(flops_per_byte, latency_bytes=0),
    }
    report = sharding_report(params, mesh=mesh, **keywords)
    text = compiled(params, mesh, **keywords)
    sent = [c for c in hlo.collectives(text) if "muon." in c.scope]
    assert sum(c.wire_bytes for c in sent) == pytest.approx(
        sum(row.bytes_in + row.bytes_out for row in report.rows), abs=len(report.rows) * 2
    )
    # Each conditional holds a remainder, which not every device has: the heaviest branches of all
    # add up to at least what the busiest device computes.
    heaviest = hlo.flops(text)
    assert heaviest >= report.flops
    if not any(row.padding for row in report.rows):
        assert heaviest == report.flops


def test_bytes_of_an_exchange_in_stages_are_those_of_the_program(monkeypatch):
    """As over hundreds of devices, where one all_to_all would take the compiler long."""
    monkeypatch.setattr(cost, "EXCHANGED_AT_ONCE", 4)
    jax.clear_caches()  # another test's program was made at once
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    params = abstract({"many": (16, 32, 64), "few": (3, 64, 128)}, mesh, {})
    keywords = {
        "muon_weight_dimension_numbers": NUMBERS,
        "mesh_costs": MeshCosts(1, latency_bytes=0),
        "ns_dtype": "bfloat16",
    }
    report = sharding_report(params, mesh=mesh, **keywords)
    sent = [c for c in hlo.collectives(compiled(params, mesh, **keywords)) if "muon." in c.scope]
    exchanges = [c.group_size for c in sent if c.opcode == "all-to-all"]
    assert {*exchanges} == {2, 4}
    assert sum(c.wire_bytes for c in sent) == pytest.approx(
        sum(row.bytes_in + row.bytes_out for row in report.rows), abs=4
    )


def test_the_gather_of_adamw_is_that_of_the_program():
    """Gathered over two axes, over one, together and alone; in float16 what is float16."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = {"table": P("fsdp")}
    params = abstract({"table": (16, 24), "norm": (64,), "few": (4,), "odd": (3,)}, mesh, specs)
    params["half"] = jax.ShapeDtypeStruct((32,), np.float16, sharding=params["norm"].sharding)
    keywords = {
        "param_specs": {name: specs.get(name, P()) for name in params},
        "muon_weight_dimension_numbers": dict.fromkeys(params),
    }
    text = compiled(params, mesh, **keywords)
    sent = [c.wire_bytes for c in hlo.collectives(text) if "adamw.gather" in c.scope]
    report = sharding_report(params, mesh=mesh, **keywords)
    assert sum(sent) == pytest.approx(report.adam_gather_bytes, abs=2 * len(sent))
    assert report.adam_gather_bytes > 0


def test_wrappers_show_where_their_state_lies():
    """A wrapper that compiles `init` leaves no answer in JAX's caches, nor takes an old one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = muon(1e-3, mesh=mesh)
    wrapped = optax.GradientTransformation(jax.jit(lambda p: (p, tx.init(p))), tx.update)
    params = {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}
    for _ in range(2):
        beside, state = wrapped.init(params)
        at_rest, shardings = opt_state_shardings(wrapped, params)
        assert jax.tree.structure(state) == jax.tree.structure(shardings)
        assert all(sharding.spec == P() for sharding in jax.tree.leaves(at_rest))
        for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
    kernel = shardings.inner_states["muon"].inner_state[0].mu["kernel"]
    assert kernel.spec == P("data")
    assert jax.tree.structure(beside) == jax.tree.structure(at_rest)


def test_what_the_report_says_of_a_model():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    layer = {"q": (768, 768), "o": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    shapes = {f"{i}/{name}": shape for i in range(8) for name, shape in layer.items()}
    shapes |= {"embed": (1000, 768), "norm": (768,), "bias": (3,)}
    report = sharding_report(abstract(shapes, mesh, {}), mesh=mesh)
    wide, square = sorted(report.rows, key=lambda row: -row.shape[1])
    assert (wide.shape, wide.matrices, wide.owners, wide.padding) == ((768, 3072), 16, 8, 0)
    assert (square.shape, square.matrices, square.route) == ((768, 768), 16, "exchange")
    assert wide.bytes_in == 2 * (2 * 768 * 3072) * 7 // 8
    assert wide.bytes_out == 8 * wide.bytes_in
    assert wide.balance == square.balance == report.balance == 1.0
    # Two of each device's; by 2, 2 and 1 steps: six long products and eleven short ones.
    assert wide.flops == 2 * 2 * 768**2 * (6 * 3072 + 11 * 768)
    assert square.flops == 2 * 5 * 6 * 768**3
    matrices = sum(math.prod(shape) for shape in shapes.values() if min(shape) > 3) - 1000 * 768
    assert report.state_bytes("muon") == 4 * (matrices - 768) / 8
    # Two moments, divided; three numbers that cannot be.
    assert report.state_bytes("adam") == 2 * 4 * ((1000 * 768 + 768) / 8 + 3)
    assert report.adam_gather_bytes == 4 * (1000 * 768 + 768) * 7 // 8
    bias = next(leaf for leaf in report.leaves if leaf.path == "bias")
    assert (bias.replicas, bias.state_bytes, bias.state) == (8, 24, P())
    assert "bias: its state, 24 B, cannot be divided further" in str(report)


def test_it_is_a_value_and_takes_muons_keywords(capsys):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = abstract({"kernel": (64, 64)}, mesh, {})
    report = sharding_report(params, mesh=mesh, ns_steps=3, weight_decay=0.2, mu_dtype="bfloat16")
    assert capsys.readouterr().out == ""
    assert repr(report) == str(report)  # what a notebook shows
    assert report.rows[0].flops == 3 * 6 * 64**3
    assert report.state_bytes("muon") == 64 * 64 * 2 / 8
    assert dataclasses.is_dataclass(report.rows[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        sharding_report(params, mesh=mesh, momentum=0.9)
    with pytest.raises(ValueError, match="which the mesh lacks"):
        sharding_report(params, mesh=mesh, zero1_axes="model")


def test_a_model_without_matrices_is_reported_too():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    report = sharding_report(abstract({"norm": (64,)}, mesh, {}), mesh=mesh)
    assert report.rows == () and report.flops == 0
    assert report.leaves[0].optimizer == "adam"


def test_a_state_of_several_models_keeps_their_axis_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = muon(1e-3, mesh=mesh, param_specs={"kernel": P()})
    several = optax.GradientTransformation(jax.vmap(tx.init), tx.update)
    shardings = opt_state_shardings(several, {"kernel": jnp.ones((3, 16, 8))})
    kernel = shardings.inner_states["muon"].inner_state[0].mu["kernel"]
    assert kernel.spec == P(None, "data")

    behind = optax.GradientTransformation(jax.vmap(tx.init, out_axes=-1), tx.update)
    with pytest.raises(ValueError, match=r"kernel, shape \(16, 8\): .* the shape \(16, 8, 3\)"):
        opt_state_shardings(behind, {"kernel": jnp.ones((3, 16, 8))})


def test_a_report_warns_as_init_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    table = {"lookup": {"rows": jax.ShapeDtypeStruct((50_000, 16), np.float32)}}
    with pytest.warns(UserWarning, match="are taken for matrices"):
        sharding_report(table, mesh=mesh)
