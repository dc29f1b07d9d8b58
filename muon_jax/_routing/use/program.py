"""A loss, traced and read by the rules of all primitives, as a judge of its parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from muon_jax._routing.use import (
    control,
    elementwise,
    gather,
    joining,
    other_products,
    products,
    reductions,
    slices,
    structure,
)
from muon_jax._routing.use.decide import RAVELLED, Judge
from muon_jax._routing.use.doubts import Doubt
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.reader import Reader
from muon_jax._routing.use.values import Kind, Value, fresh_axes, parameter

__all__ = ["RAVELLED", "RULES", "Doubt", "judge_program"]

# The modules whose rules the reader follows.
RULES = (
    structure,
    slices,
    joining,
    elementwise,
    reductions,
    products,
    other_products,
    gather,
    control,
)


def judge_program(
    loss: Callable[..., Any], params: Any, batch: Sequence[Any], shapes: list[tuple[int, ...]]
) -> Judge:
    """The judge of what a loss does with its parameters.

    Args:
      loss: a function of the parameters and the batch, which returns a real scalar.
      params: arrays or `jax.ShapeDtypeStruct`s.
      batch: the loss's other arguments.
      shapes: the shapes of the parameters' leaves.

    Raises:
      TypeError: for a batch by whose values the loss decides in Python.
    """
    try:
        program = jax.make_jaxpr(loss)(params, *batch)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        flags = [x for x in jax.tree.leaves(batch) if isinstance(x, bool | int | float)]
        if not flags:
            raise
        raise TypeError(
            f"by_use: the loss decides by a value of the batch, which holds {flags[:3]} as Python "
            "values; all of the batch is traced. Close over what is no array: "
            "by_use(lambda params, x: loss(params, x, train=True), params, x)."
        ) from error
    reader = Reader(shapes)
    labels = [tuple(Label(size) for size in shape) for shape in shapes]
    values = [
        parameter(leaf, shape, tuple((label,) for label in labels[leaf]))
        for leaf, shape in enumerate(shapes)
    ]
    for var in program.jaxpr.invars[len(shapes) :]:
        shape = var.aval.shape  # type: ignore[attr-defined]
        values.append(Value(shape, Kind.DATA, fresh_axes(shape, data=True)))
    (outcome,) = reader.run(program, values)
    return Judge(reader, labels, outcome)
