"""The roles of parameters, read from the program that uses them."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from muon_jax._common.parameters import check_tree, parameter_shape
from muon_jax._common.paths import Path, flatten_with_names, show
from muon_jax._matrices import MatrixSpec, leaf_views
from muon_jax._routing.remedies import declaration, listed
from muon_jax._routing.roles import Question
from muon_jax._routing.route_leaves import PathRules, declared_by_rules
from muon_jax._routing.use.readings import Reading, UseRoles


def by_use(
    loss: Callable[..., Any], params: Any, *batch: Any, declared: PathRules | None = None
) -> UseRoles:
    """Read the role of every parameter from how the loss uses it.

    The loss is traced on abstract values, without work on any device, and each parameter is
    followed to its uses. What a product sums over is fan-in, what stays fan-out, and what it runs
    along, or a loop cuts, is a stack. A convolution's window and input are fan-in. Rows taken by
    index are an embedding, what only adds or multiplies entry by entry is a gain or a bias, and a
    matrix behind which no other comes before the loss is the head: these go to AdamW. Names play no
    part. What the program does not decide raises, all of it at once, and is yours to declare: a
    matrix before a frozen or opaque head, heads in a loop or an ensemble's attention, what one-hot
    codes were made into, one matrix stored in pieces.

    Trace the loss itself, on inputs like those of training: of features, the last matrix would be
    taken for the head. What only differs by convention is read as the program has it: the two
    projections of a contrastive loss have no matrix behind them and are heads.

    Args:
      loss: a function of the parameters and the batch, which returns a real scalar, or a pair of
        one and anything else. With an `nnx.Module` as `params`, a function of the module.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`s, as the optimizer will get it, or a Flax
        `nnx.Module`, of which the parameters are `nnx.state(model, nnx.Param)`.
      *batch: the loss's other arguments, pytrees of arrays or `jax.ShapeDtypeStruct`s. All that
        differs from step to step belongs here: what the loss closes over is a constant.
      declared: `by_path`, for what the program does not decide; your word comes first.

    Returns:
      A value for `muon_weight_dimension_numbers`, which prints what was seen of each parameter.

    Raises:
      ValueError: for parameters of two or more axes whose role is in doubt or that the loss does
        not use, listing each, with what was seen and the line to write; for a loss that is no
        scalar; and as `by_path` does.
      TypeError: for a loss that returns something else than an array or a pair, for `declared` of
        another type, for parameters that are no floating-point arrays, and for a batch that holds
        what is no array, or by whose values the loss decides in Python.

    Examples:
      A tree of arrays:

      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> def loss(params, x, y):
      ...   return jnp.mean((jax.nn.relu(x @ params["up"]) @ params["down"] - y) ** 2)
      >>> x = y = jnp.ones((2, 4))
      >>> roles = by_use(loss, params, x, y)
      >>> tx = muon(3e-4, muon_weight_dimension_numbers=roles)

      A model of Flax NNX, of Linen and of Equinox:

          by_use(lambda model, x, y: loss(model(x), y), model, x, y)
          by_use(lambda p, x, y: loss(model.apply({"params": p}, x), y), params, x, y)
          params, static = eqx.partition(model, eqx.is_inexact_array)
          by_use(lambda p, x, y: loss(eqx.combine(p, static), x, y), params, x, y)
    """
    # A third of the library, and jax.extend: whoever does not ask shall not wait for its import.
    from muon_jax._routing.use.program import RAVELLED, Doubt, judge_program

    if declared is not None and not isinstance(declared, PathRules):
        raise TypeError(
            f"by_use: declared must be what muon_jax.by_path returns, or None; got {declared!r}."
        )
    if not callable(loss):
        raise TypeError(f"by_use takes the loss, a function, first; got {loss!r}.")
    _check_batch(batch)
    loss, params, batch = _of_module(loss, params, batch)
    leaves, _ = flatten_with_names(params)
    check_tree(params, [path for path, _ in leaves])
    shapes = [(path, parameter_shape(path, leaf)) for path, leaf in leaves]
    words = {} if declared is None else declared_by_rules(leaves, declared)
    scalar = functools.partial(_scalar_of, loss)
    judge = judge_program(scalar, params, batch, [shape for _, shape in shapes])
    readings, doubts = [], []
    for number, (path, shape) in enumerate(shapes):
        if path in words:
            readings.append(_declared(path, shape, words[path]))
            continue
        try:
            readings.append(Reading(path, shape, *judge.verdict(number)))
        except Doubt as doubt:
            doubts.append((path, shape, judge.question(number, doubt)))
    if doubts:
        raise ValueError(_message(doubts, [reading.path for reading in readings]))
    ravelled = [show(reading.path) for reading in readings if reading.reason == RAVELLED]
    if ravelled:
        warnings.warn(
            f"by_use: {', '.join(ravelled)} holds matrices in a single axis, and goes to AdamW as "
            "a whole; give the optimizer the matrices themselves.",
            stacklevel=2,
        )
    return UseRoles(tuple(readings))


def _check_batch(batch: tuple[Any, ...]) -> None:
    for path, leaf in flatten_with_names(batch)[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"by_use: the batch holds {leaf!r} at {show(path)}, of type {type(leaf).__name__}, "
                "where an array or a jax.ShapeDtypeStruct was expected. Close over what is no "
                "array: by_use(lambda params, x: loss(params, x, mode), params, x)."
            )


def _of_module(
    loss: Callable[..., Any], params: Any, batch: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The same loss as a function of an NNX module's parameters, where a module is given."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return loss, params, batch
    graph, params, rest = nnx.split(params, nnx.Param, ...)

    @functools.wraps(loss)
    def of_parameters(params: Any, rest: Any, *batch: Any) -> Any:
        return loss(nnx.merge(graph, params, rest), *batch)

    return of_parameters, params, (rest, *batch)


def _scalar_of(loss: Callable[..., Any], params: Any, *batch: Any) -> Any:
    """The loss itself of what a loss function returns."""
    outcome: Any = loss(params, *batch)
    value: Any = outcome[0] if isinstance(outcome, tuple) and len(outcome) == 2 else outcome
    if not hasattr(value, "shape") and not isinstance(value, float):
        raise TypeError(
            "by_use: the loss must return a scalar, or a pair (scalar, auxiliary values); got "
            f"{type(outcome).__name__}. Of other outputs, the last matrix would be taken for the "
            "head."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"by_use: the loss must return a scalar; got shape {jnp.shape(value)}. Trace the loss "
            "itself, as it is differentiated: of features or logits, the last matrix would be "
            "taken for the head."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f"by_use: the loss must be real and floating-point; got {jnp.result_type(value)}."
        )
    return value


def _declared(path: Path, shape: tuple[int, ...], spec: MatrixSpec | None) -> Reading:
    if spec is not None:
        leaf_views(shape, spec, show(path))
    return Reading(path, shape, "declared", "declared", spec)


def _message(doubts: list[tuple[Path, tuple[int, ...], Question]], others: list[Path]) -> str:
    lines = [
        f"by_use: the program does not decide the role of {len(doubts)} parameter(s). What was "
        "seen of each:"
    ]
    lines += listed((path, shape, f"{question.why}.") for path, shape, question in doubts)
    return "\n".join(
        [
            *lines,
            "Say of each which axes are reduced (fan-in) and which are outputs (fan-out), all "
            "others being a stack, or None for AdamW. Written as seen, several axes as a stack "
            "rather than as heads, and what was not seen as [in, out]:",
            f"  muon_jax.by_use(..., declared={declaration(doubts, others)})",
        ]
    )
