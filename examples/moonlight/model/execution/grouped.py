"""Products of rows that are sorted by group with their group's matrix, each row multiplied once.

XLA:TPU compiles `jax.lax.ragged_dot` to that. XLA:GPU and XLA:CPU don't: they multiply every row
with all groups' matrices, masked, side by side (jax 0.10.2), which for 16 experts is 16 times the
work, and 4 GB where a device has 61,440 rows of width 2,048. So elsewhere a loop visits tiles of
rows: each tile as often as groups have rows in it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Rows of a tile: a product of 512 x 2048 x 1408 keeps an H100 busy.
TILE = 512


def grouped_dot(x_md: jax.Array, w_gdf: jax.Array, load_g: jax.Array) -> jax.Array:
    """What `jax.lax.ragged_dot` computes.

    Args:
        x_md: Rows, sorted by group.
        w_gdf: A matrix for each group.
        load_g: Rows of each group, int32; rows behind all of them are multiplied by nothing.

    Returns:
        `[m, f]` in the dtype of `x_md`; zeros for rows of no group.
    """
    return jax.lax.platform_dependent(
        x_md, w_gdf, load_g, tpu=jax.lax.ragged_dot, default=_dot_in_tiles
    )


class _Visits(NamedTuple):
    """The group and the tile of each visit `[v]`, and the group's first row and the one behind."""

    group: jax.Array
    tile: jax.Array
    start: jax.Array
    stop: jax.Array


def _visits(load_g: jax.Array, tiles: int, rows: int) -> _Visits:
    """As many as there can be, a number known before the loads; those too many reach no row."""
    stop_g = jnp.cumsum(load_g)
    start_g = stop_g - load_g
    first_g = start_g // rows
    count_g = jnp.where(load_g > 0, (stop_g - 1) // rows - first_g + 1, 0)
    until_g = jnp.cumsum(count_g)
    number_v = jnp.arange(tiles + load_g.size, dtype=load_g.dtype)
    group_v = jnp.searchsorted(until_g, number_v, side="right", method="compare_all")
    spare_v = group_v == load_g.size
    group_v = jnp.minimum(group_v, load_g.size - 1)
    tile_v = first_g[group_v] + number_v - (until_g - count_g)[group_v]
    stop_v = jnp.where(spare_v, 0, stop_g[group_v])
    return _Visits(group_v, jnp.minimum(tile_v, tiles - 1), start_g[group_v], stop_v)


def _tiled(x_md: jax.Array, rows: int) -> jax.Array:
    """`[tiles, rows, d]`, the last tile filled up with zeros."""
    return jnp.pad(x_md, ((0, -len(x_md) % rows), (0, 0))).reshape(-1, rows, x_md.shape[1])


def _own(visit: _Visits, rows: int) -> jax.Array:
    """Which rows of the tile belong to the group, `[rows, 1]`."""
    row_r1 = visit.tile * rows + jnp.arange(rows)[:, None]
    return (row_r1 >= visit.start) & (row_r1 < visit.stop)


@jax.custom_vjp
def _dot_in_tiles(x_md: jax.Array, w_gdf: jax.Array, load_g: jax.Array) -> jax.Array:
    rows = min(TILE, len(x_md))
    x_trd = _tiled(x_md, rows)

    def visit(y_trf: jax.Array, visit: _Visits):
        product_rf = jnp.dot(x_trd[visit.tile], w_gdf[visit.group])
        y_rf = jnp.where(_own(visit, rows), product_rf, y_trf[visit.tile])
        return jax.lax.dynamic_update_index_in_dim(y_trf, y_rf, visit.tile, 0), None

    empty = jnp.zeros((*x_trd.shape[:2], w_gdf.shape[2]), x_md.dtype)
    y_trf, _ = jax.lax.scan(visit, empty, _visits(load_g, len(x_trd), rows))
    return y_trf.reshape(-1, w_gdf.shape[2])[: len(x_md)]


def _forward(x_md: jax.Array, w_gdf: jax.Array, load_g: jax.Array):
    return _dot_in_tiles(x_md, w_gdf, load_g), (x_md, w_gdf, load_g)


def _backward(saved: Any, grad_mf: jax.Array):
    x_md, w_gdf, load_g = saved
    rows = min(TILE, len(x_md))
    x_trd, grad_trf = _tiled(x_md, rows), _tiled(grad_mf, rows)

    def visit(d_w_gdf: jax.Array, visit: _Visits):
        x_rd = jnp.where(_own(visit, rows), x_trd[visit.tile], 0)
        product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        d_w_df = d_w_gdf[visit.group] + product(x_rd.T, grad_trf[visit.tile])
        return jax.lax.dynamic_update_index_in_dim(d_w_gdf, d_w_df, visit.group, 0), None

    zeros = jnp.zeros(w_gdf.shape, jnp.float32)
    d_w_gdf, _ = jax.lax.scan(visit, zeros, _visits(load_g, len(x_trd), rows))
    d_x_md = _dot_in_tiles(grad_mf, w_gdf.swapaxes(1, 2), load_g)
    return d_x_md, d_w_gdf.astype(w_gdf.dtype), None


_dot_in_tiles.defvjp(_forward, _backward)
