"""Rules for primitives that work entry by entry."""

import dataclasses
from typing import Any

from muon_jax._routing.use.atoms import Gap
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.operands import combine, is_flat, met_by_hand, scaled, spread
from muon_jax._routing.use.reader import Reader, rule, shape_of
from muon_jax._routing.use.values import Kind, Value, gaps, merge

_ONE = [
    "neg", "sign", "floor", "ceil", "round", "is_finite", "not", "abs", "sqrt", "rsqrt", "cbrt",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh",
    "atanh", "erf", "erfc", "erf_inv", "lgamma", "digamma", "log", "log1p", "logistic", "square",
    "integer_pow", "real", "imag", "conj", "copy", "copy_p", "reduce_precision",
    "population_count", "clz", "name", "sharding_constraint", "reshard", "mesh_cast", "pvary",
    "pcast", "psum", "psum2", "psum_invariant", "pmax", "pmin", "ppermute", "cumsum", "cumprod",
    "cummax", "cummin", "cumlogsumexp", "bessel_i0e", "bessel_i1e",
]  # fmt: skip
_EXPONENTIALS = ("exp", "exp2", "expm1")
_PRODUCTS = ("mul", "div", "rem", "pow", "atan2", "max", "min", "nextafter", "clamp")
_SUMS = ("add", "sub", "add_any", "complex", "select_n")
_COMPARISONS = ("ne", "lt", "le", "gt", "ge", "lt_to", "le_to", "eq_to")
_LOGIC = ("and", "or", "xor", "shift_left", "shift_right_logical", "shift_right_arithmetic")
_TRUE_COPIES = {
    "copy", "copy_p", "name", "sharding_constraint", "reshard", "mesh_cast", "pvary", "pcast",
    "reduce_precision",
}  # fmt: skip


@rule(*_ONE)
def one(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Of each operand, entry by entry or along an axis, in its own shape."""
    name = eqn.primitive.name
    if name in _TRUE_COPIES:
        return values
    return [
        dataclasses.replace(
            value,
            onehot=frozenset(),
            single=_single(value) if name == "neg" else frozenset(),
            counts=frozenset(),
            indicator=name == "not" and value.indicator,
            codes=value.onehot | value.codes,
            exponential=False,
        )
        for value in values
    ]


@rule("optimization_barrier")
def barrier(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Its operands as they are."""
    return values


@rule("sort")
def sort(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Its operands in another order along one axis, which all share."""
    for value in values:
        for view in value.views:
            reader.doubt(view, "is sorted")
    return [merge(value.shape, values, value.axes) for value in values]


@rule("stop_gradient")
def stop_gradient(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """The same entries, through which no product is reached."""
    return dataclasses.replace(values[0], pending=0, behind=0)


@rule("convert_element_type")
def convert(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """The same entries in another type; truth values become indicators."""
    return values[0]


@rule(*_EXPONENTIALS)
def exponential(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """An exponential ends what activations and a parameter have in common as a linear map.

    A decay ``exp(dt * A)`` and logits with a learned bias would otherwise look like weights that
    activations modulate.
    """
    (value,) = values
    views = tuple(view for view in value.views if not view.mixed)
    return dataclasses.replace(
        value,
        views=views,
        onehot=frozenset(),
        single=frozenset(),
        counts=frozenset(),
        indicator=False,
        exponential=True,
    )


@rule(*_PRODUCTS, *_LOGIC)
def product(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Entry by entry, not linear in all operands at once."""
    out = combine(reader, values, shape_of(eqn), is_sum=False)
    if eqn.primitive.name == "mul":
        out = dataclasses.replace(out, single=frozenset().union(*map(_single, values)))
        scaled(reader, out, values)
        out = met_by_hand(reader, out, values)
    indicators = eqn.primitive.name in ("mul", "and", "or", "xor", "max", "min")
    if indicators and all(value.indicator for value in values):
        out = dataclasses.replace(out, indicator=True)
    return out


def _single(value: Value) -> frozenset[int]:
    """The axes along which one entry at most is not 0, and activations did not choose which."""
    return value.single if value.decided else value.single | value.onehot


@rule(*_SUMS)
def sum_(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Entry by entry, linear in all operands at once."""
    out = combine(reader, values, shape_of(eqn), is_sum=True)
    counting = [value for value in values if value.counts]
    if eqn.primitive.name == "add" and len(counting) == 1 and out.kind is Kind.CONSTANT:
        others = [value for value in values if not value.counts]
        if all(not value.shape for value in others):
            out = dataclasses.replace(out, counts=counting[0].counts)
    if eqn.primitive.name == "select_n" and all(
        value.kind is Kind.CONSTANT and (not value.shape or all(map(is_flat, value.axes)))
        for value in values[1:]
    ):
        out = dataclasses.replace(
            out, onehot=values[0].onehot, indicator=out.kind is not Kind.PARAMETER
        )
    return out


@rule("eq")
def equal(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """A comparison, and with what counts along an axis a one-hot code along it."""
    out = combine(reader, values, shape_of(eqn), is_sum=True, quietly=True)
    out = dataclasses.replace(out, indicator=True)
    shape = shape_of(eqn)
    values = [x if x.shape == shape else spread(x, shape) for x in values]
    for count, other in (values, values[::-1]):
        hot = frozenset(
            axis
            for axis in count.counts
            if count.kind is Kind.CONSTANT
            and all(isinstance(atom, Gap) for atom in other.axes[axis])
        )
        out = dataclasses.replace(out, onehot=out.onehot | hot)
    return out


@rule(*_COMPARISONS)
def compare(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """True or false, which is 0 or 1 where it is counted."""
    out = combine(reader, values, shape_of(eqn), is_sum=True, quietly=True)
    return dataclasses.replace(out, indicator=True)


@rule("iota")
def iota(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """Counts along one axis."""
    shape, axis = shape_of(eqn), eqn.params["dimension"]
    axes = list(gaps(shape))
    axes[axis] = (Label(shape[axis]),)
    counts = frozenset({axis}) if shape[axis] > 1 else frozenset()
    return Value(shape, Kind.CONSTANT, tuple(axes), counts=counts)
