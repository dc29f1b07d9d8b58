"""Checks of numbers, booleans and dtypes, where their values are known before the program runs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Scalar = float | int | jax.Array | np.ndarray | np.floating
"""A number, or an array of one; traced where `optax.inject_hyperparams` sets it."""

ScalarOrSchedule = float | int | jax.Array | Callable[[Any], Any]
"""A number, or a function of the step count such as `optax.cosine_decay_schedule`."""


def check_scalar(
    name: str, value: Any, *, low: float = 0.0, below: float = math.inf, schedule: bool = False
) -> None:
    """Raise where a static `value` is not a finite number in `[low, below)`.

    Args:
      name: the argument's name, for the error.
      value: a number or a scalar array; tracers pass, their values being unknown.
      low: the smallest value allowed.
      below: the first value too large.
      schedule: whether a function of the step count is allowed; it passes.

    Raises:
      TypeError: where `value` is no number.
      ValueError: where it is out of range, NaN or infinite.
    """
    allowed = "a number" + (" or a schedule" if schedule else "")
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = jnp.issubdtype(value.dtype, np.integer) or jnp.issubdtype(value.dtype, np.floating)
        if value.shape or not real:
            raise TypeError(
                f"{name} must be {allowed}; got an array of shape {value.shape} and dtype "
                f"{value.dtype}."
            )
    if isinstance(value, Tracer) or (schedule and callable(value)):
        return
    if isinstance(value, (str, bool)) or value is None:
        raise TypeError(f"{name} must be {allowed}; got {value!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be {allowed}; got {value!r}.") from error
    if not (low <= number < below):
        bounds = f"at least {low:g}" + (f" and below {below:g}" if below < math.inf else ", finite")
        raise ValueError(f"{name} must be {bounds}; got {value}.")


def check_bool(name: str, value: Any) -> bool:
    """Return a static boolean as `bool`.

    Raises:
      TypeError: for anything else. A string such as "no" would count as True, and a tracer could
        not choose between two programs.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} shapes the compiled program and must be static; got a traced {value.dtype}. "
            f'Pass True or False; under optax.inject_hyperparams with static_args=("{name}",).'
        )
    is_array = isinstance(value, jax.Array | np.ndarray) and not value.shape
    if isinstance(value, bool | np.bool_) or (is_array and value.dtype == np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False; got {value!r}.")


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number, of any integer type."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_positive_integer(value: Any) -> bool:
    """Whether `value` is a whole number of at least 1, of any integer type."""
    return is_integer(value) and int(value) > 0


def check_group_bytes(max_group_bytes: Any, default: int) -> int:
    """Return the bound in bytes, `default` for None; raise where it is no positive integer."""
    if max_group_bytes is None:
        return default
    if isinstance(max_group_bytes, jax.Array):
        raise TypeError(
            "max_group_bytes shapes the compiled program and must be static. Under "
            'optax.inject_hyperparams pass static_args=("max_group_bytes",).'
        )
    if not is_positive_integer(max_group_bytes):
        raise ValueError(
            f"max_group_bytes must be a positive whole number of bytes; got {max_group_bytes!r}."
        )
    return int(max_group_bytes)


def check_dtype(name: str, dtype: Any) -> jnp.dtype:
    """Return `dtype` as a dtype; raise TypeError where it is none."""
    if isinstance(dtype, jax.Array):
        # jnp.bfloat16 is callable, so inject_hyperparams calls it as a schedule.
        raise TypeError(
            f"{name} must be a dtype; got an array. Under optax.inject_hyperparams write the dtype "
            f'as a string, {name}="bfloat16".'
        )
    try:
        return jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f'{name} must be a dtype such as "float32"; got {dtype!r}.') from error
