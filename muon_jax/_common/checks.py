"""Checks of numbers, booleans and dtypes, where their values are known before the program runs."""

import inspect
import math
import re
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
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if is_array and not _is_real_scalar(value):
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


def check_schedule(name: str, value: Any) -> Any:
    """A number as it is; a schedule that checks what it returns, which is known in a step only.

    Raises:
      TypeError, ValueError: as `check_scalar`, and for a function that takes no count of steps;
        from the schedule, TypeError for anything but one number.
    """
    check_scalar(name, value, schedule=True)
    if not callable(value):
        return value
    check_arity(name, value, "the count of steps", 1)

    def schedule(count: Any) -> Any:
        rate = value(count)
        if not _is_real_scalar(rate):
            raise TypeError(f"{name}, a schedule, must return a number; it returned {rate!r}.")
        return rate

    return schedule


def check_arity(name: str, function: Any, takes: str, count: int) -> None:
    """Raise TypeError where a function cannot be called with `count` arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*[1] * count)
    except TypeError as error:
        raise TypeError(f"{name} must take {takes}; {function!r} takes {signature}.") from error


def _is_real_scalar(value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = jnp.issubdtype(value.dtype, np.integer) or jnp.issubdtype(value.dtype, np.floating)
        return real and not value.shape
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_array(name: str, value: Any) -> jax.Array:
    """Return `value` as an array; raise TypeError where it is none."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} takes one array; got {value!r}. Map it over a tree with jax.tree.map."
        ) from error


def check_pattern(name: str, pattern: Any) -> None:
    """Raise ValueError where `pattern` is no regular expression for strings."""
    try:
        re.compile(pattern).search("")
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}.") from error


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
