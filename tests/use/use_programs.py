"""What the tests of `by_use` share: small programs, and how their readings are compared."""

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers as D

from muon_jax import FusedBlocks, by_use

S = jax.ShapeDtypeStruct


def arrays(**shapes):
    """Abstract float parameters by name."""
    return {name: S(shape, jnp.float32) for name, shape in shapes.items()}


def data(*shape):
    return S(shape, jnp.float32)


def ids(*shape):
    return S(shape, jnp.int32)


def verdicts(roles):
    """For each path the axes `(in, out)` of a matrix, its blocks, or the role that is none."""
    out = {}
    for reading in roles.readings:
        spec = reading.spec
        if isinstance(spec, D):
            spec = (spec.reduction_axis, spec.output_axis)
        elif isinstance(spec, FusedBlocks):
            spec = (spec.dimension_numbers.reduction_axis, spec.axis, spec.sizes)
        out["/".join(reading.path)] = reading.role if spec is None else spec
    return out


def read(loss, params, *batch, **options):
    return verdicts(by_use(loss, params, *batch, **options))


def mean_square(x):
    return jnp.mean(x * x)
