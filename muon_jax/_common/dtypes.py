"""Dtypes by JAX's standard table, also where the user allows no implicit promotion."""

from typing import Any

import jax
import jax.numpy as jnp


def promote(a: Any, b: Any) -> jnp.dtype:
    """The dtype that holds both, under ``jax_numpy_dtype_promotion=strict`` too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)
