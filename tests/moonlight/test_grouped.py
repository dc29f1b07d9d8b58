"""Products of sorted rows in tiles, against `jax.lax.ragged_dot`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.moonlight.model.execution import grouped


@pytest.mark.parametrize(
    "load",
    [(3, 5, 4, 0), (0, 0, 12, 0), (12, 0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0), (0, 8, 0, 5)],
    ids=str,
)
def test_tiles_compute_what_ragged_dot_does(load: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Exactly, on small integers: groups that share tiles, fill several, are empty, rows left."""
    monkeypatch.setattr(grouped, "TILE", 4)
    rng = np.random.default_rng(0)
    x_md, grad_mf = (jnp.asarray(rng.integers(-4, 5, (13, n)), jnp.float32) for n in (6, 5))
    w_gdf = jnp.asarray(rng.integers(-4, 5, (4, 6, 5)), jnp.float32)
    load_g = jnp.asarray(load, jnp.int32)

    def run(dot):
        y_mf, vjp = jax.vjp(lambda x_md, w_gdf: dot(x_md, w_gdf, load_g), x_md, w_gdf)
        return y_mf, *vjp(grad_mf)

    for ours, theirs in zip(run(grouped.grouped_dot), run(jax.lax.ragged_dot), strict=True):
        np.testing.assert_array_equal(ours, theirs)
