"""Programs in pieces on devices are read as the whole."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.use.use_programs import arrays, data, mean_square, read

D, F = 12, 8
MESH = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,))


def mapped(function, into, out):
    return jax.shard_map(function, mesh=MESH, in_specs=into, out_specs=out)


def head(p, x):
    return mean_square(x @ p["head"])


def test_pieces_of_columns_and_rows():
    def loss(p, x):
        def piece(a, b, x):
            return lax.psum(jnp.tanh(x @ a) @ b, "m")

        specs = (P(None, "m"), P("m", None), P())
        return head(p, x + mapped(piece, specs, P())(p["a"], p["b"], x))

    params = arrays(a=(D, 32), b=(32, D), head=(D, 8))
    assert read(loss, params, data(6, D)) == {"a": ((0,), (1,)), "b": ((0,), (1,)), "head": "head"}


def test_weights_gathered_before_their_use():
    def loss(p, x):
        def piece(a, x):
            return jnp.tanh(x @ lax.all_gather(a, "m", tiled=True))

        return head(p, mapped(piece, (P("m"), P("m")), P("m"))(p["a"], x))

    params = arrays(a=(D, 16), head=(16, 8))
    assert read(loss, params, data(8, D)) == {"a": ((0,), (1,)), "head": "head"}


def test_an_expert_on_each_device():
    def loss(p, x):
        def piece(a, b, gates, x):
            h = jnp.tanh(jnp.einsum("nd,edf->nef", x, a))
            y = jnp.einsum("nef,efd->ned", h, b)
            return lax.psum(jnp.einsum("ned,ne->nd", y, gates), "m")

        gates = jax.nn.softmax(x @ p["router"])
        specs = (P("m"), P("m"), P(None, "m"), P())
        return head(p, x + mapped(piece, specs, P())(p["a"], p["b"], gates, x))

    params = arrays(a=(8, D, F), b=(8, F, D), router=(D, 8), head=(D, 8))
    assert read(loss, params, data(6, D)) == {
        "a": ((1,), (2,)),
        "b": ((1,), (2,)),
        "router": ((0,), (1,)),
        "head": "head",
    }
