"""Which side of a matrix is cut: what XLA:TPU was seen to do with shards, and the choice."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from muon_jax import sharding_report
from muon_jax._matrices import leaf_views
from muon_jax._mesh.layout import zero1_layout
from muon_jax._mesh.tiles import is_small_plane, laid_out, scatter_waste, scatters_at_once

LAST_TWO = MuonDimensionNumbers(-2, -1)


@pytest.mark.parametrize(
    ("shard", "other", "compiled"),
    [
        # Whole tiles of sublanes, in one run.
        (96, 768, 1.0), (112, 4864, 1.0), (608, 896, 1.0), (80, 1728, 1.0), (88, 704, 1.0),
        # Whole tiles of lanes.
        (128, 5632, 1.0), (256, 2816, 1.0), (512, 1000, 1.0),
        # No whole tiles: 84 rows of 8 are 88.
        (84, 672, 1.095), (84, 1792, 1.095), (233, 704, 1.060), (500, 640, 1.048),
        # An odd number of tiles of lanes: twice as many runs.
        (216, 640, 1.074), (88, 1864, 1.182), (88, 1408, 1.182), (176, 1408, 1.0),
        # More than one buffer: two runs, three, five.
        (168, 2048, 1.095), (352, 2048, 1.045), (344, 2048, 1.093), (616, 2048, 1.078),
        # What is padded to more than twice its size is given up.
        (8, 1152, 2.0),
    ],
)  # fmt: skip
def test_the_rule_is_what_was_compiled(shard, other, compiled):
    """Bytes of a reduce-scatter on eight chips of a v5e, to its elements' (libtpu 0.0.42)."""
    assert scatter_waste(shard, other) == pytest.approx(compiled, abs=5e-4)


def test_lanes_alone_take_whole_tiles_alone():
    assert scatter_waste(384, 768, only_lanes=True) == 1.0
    assert scatter_waste(224, 672, only_lanes=True) == 2.0


def sides_cut(shape, param=None, sizes=None):
    sizes = sizes or {"d": 8}
    param = param or ((),) * len(shape)
    layout = zero1_layout(shape, param, (*sizes,), sizes, leaf_views(shape, LAST_TWO, "leaf"))
    return [
        shape[dim] for dim, axes in enumerate(layout.state) if axes not in ((), layout.param[dim])
    ]


@pytest.mark.parametrize(
    ("one", "other", "cut"),
    [
        (768, 3072, 3072), (896, 4864, 4864), (1408, 2048, 2048), (672, 1792, 1792),
        # The shorter side suits better.
        (640, 1728, 640), (2048, 2816, 2048), (2048, 5632, 2048),
        # Neither does: the one that wastes less.
        (704, 1864, 1864),
    ],
)  # fmt: skip
def test_tall_and_wide_matrices_are_cut_along_one_side(one, other, cut):
    assert sides_cut((one, other)) == sides_cut((other, one)) == [cut]
    assert sides_cut((one, other), sizes={"a": 4, "b": 2}) == [cut]


def test_a_side_that_does_not_divide_is_none():
    assert sides_cut((640, 1729)) == [640]
    assert sides_cut((641, 1728)) == [1728]


def test_a_stacks_longer_side_is_cut_where_it_suits_the_lanes():
    """Inside a loop over layers nothing tells XLA the layout."""
    assert sides_cut((12, 768, 3072)) == [3072]
    assert sides_cut((12, 672, 1792)) == sides_cut((12, 1792, 672)) == [672]
    assert sides_cut((3, 640, 1728)) == [640]


def test_what_a_parameters_own_cut_leaves_decides():
    # 432 columns are left, of which an eighth is 54; of the rows, 80.
    assert sides_cut((640, 1728), ((), ("f",)), {"f": 4, "d": 8}) == [640]


def test_a_layout_is_nothing_to_other_devices():
    x = jnp.arange(24.0).reshape(4, 6)
    for dim in (0, 1):
        y = jax.jit(lambda x, dim=dim: laid_out(x, dim))(x)
        np.testing.assert_array_equal(y, x)
        assert y.format.layout == x.format.layout


class Chip(NamedTuple):
    """A TPU's place in its slice."""

    coords: tuple[int, ...]
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("lengths", "at_once"),
    [((2, 2, 1), True), ((2, 4, 1), True), ((2, 2, 2), False), ((4, 4, 1), False)],
)
def test_small_slices_in_a_plane_scatter_at_once(lengths, at_once):
    chips = [Chip(place) for place in np.ndindex(lengths)]
    assert is_small_plane(chips) is at_once


def test_other_machines_scatter_in_two_stages():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    assert not scatters_at_once(mesh)
    assert not scatters_at_once(mesh.abstract_mesh)


def test_the_report_says_where_no_side_suits():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P()))
        for name, shape in {"q": (672, 672), "up": (672, 1792), "down": (1792, 672)}.items()
    }
    report = sharding_report(params, mesh=mesh)
    waste = {row.shape: row.tile_waste for row in report.rows}
    assert waste == {(672, 672): pytest.approx(1.095, abs=5e-4), (672, 1792): 1.0}
    (line,) = [line for line in str(report).splitlines() if "tiles" in line]
    assert "672x672: cut over the mesh, no side suits a TPU's tiles" in line
    assert "1.10x their bytes" in line
