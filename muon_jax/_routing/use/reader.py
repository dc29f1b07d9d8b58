"""Follow every parameter through a traced program, one equation after another.

The reader visits the equations in order and knows of each value what `Value` holds. What it learns
about the parameters it writes down by the equation's place, so that a loop's body, which is visited
until nothing is new, leaves only what its last visit saw.

An equation whose primitive has no rule makes the parameters that enter it unknown, by name. That is
the design: new primitives of JAX can't be misread, only not read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from muon_jax._routing.use.atoms import Axis, CannotFollow
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.live import live_equations
from muon_jax._routing.use.values import (
    Kind,
    Taken,
    Value,
    View,
    constant,
    derived,
    fresh_axes,
    gaps,
    merge,
)

Place = tuple[int, ...]
"""An equation, below the equations that call the program it stands in."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One product of activations with a parameter.

    Attributes:
      leaf: the parameter's number.
      product: the product's number.
      kind: ``"product"``, ``"ragged product"`` or ``"convolution"``.
      contracted: the axes that it sums over, with the labels of the activations there; None where
        these are not known.
      free: the axes that stay.
      batch: the axes that run along with one of the activations, with its labels.
      taken: the axes that were cut or indexed before.
      partly: the axes of which a piece takes part.
      behind: the products that the activations come from, as bits.
      first: what was seen in the first round of all loops around it.
      acts: the labels of the activations' axes, each axis's own.
      fresh: the products of activations that they come from without a parameter between.
      groups: the feature groups of a convolution.
      depthwise: whether each group has a single input channel.
    """

    leaf: int
    product: int
    kind: str
    contracted: dict[int, list[Label] | None]
    free: frozenset[int]
    batch: dict[int, list[Label]]
    taken: frozenset[Taken]
    partly: frozenset[int]
    behind: int = 0
    first: int = 0
    acts: tuple[tuple[Label, ...], ...] = ()
    fresh: frozenset[Place] = frozenset()
    groups: int = 1
    depthwise: bool = False


@dataclasses.dataclass(frozen=True)
class Note:
    """Something else that was seen of a parameter.

    Attributes:
      leaf: the parameter's number.
      kind: ``"doubt"``, ``"vector"`` (a product with a vector of parameters), ``"rows"`` or
        ``"elementwise"``.
      text: what was seen.
    """

    leaf: int
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A product of activations with activations, as in attention.

    Attributes:
      contracted: the labels of the axes that it sums over.
      free: the labels of the axes that stay, of the left and of the right.
      pending: the products with parameters that meet here, as bits.
    """

    contracted: tuple[Label, ...]
    free: tuple[tuple[Label, ...], tuple[Label, ...]]
    pending: int


Rule = Callable[["Reader", Any, list[Value]], Value | list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how values pass the primitives of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Reader:
    """What is known while a program is read.

    Attributes:
      shapes: the shape of each parameter.
      uses: the products of activations and parameters, by place.
      notes: what else was seen, by place.
      meetings: the products of activations with activations, by place.
      closed: the products, as bits, whose outcome is summed against something that no parameter's
        product made, as by a frozen head; by place.
      first: the products behind each product in the first round of the loops around it, as bits.
      entered: the parameters that any equation takes in, in whatever form.
      cut: the parameters one axis of which is both fan-in and fan-out.
      shards: the axes of values, and of their pieces on devices.
      followers: the products that the outcome of each product with a parameter enters, as bits.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.shapes = shapes
        self.uses: dict[Place, list[Use]] = {}
        self.notes: dict[Place, list[Note]] = {}
        self.meetings: dict[Place, Meeting] = {}
        self.closed: dict[Place, int] = {}
        self.followers: list[int] = []
        self.first: dict[Place, int] = {}
        self.entered: set[int] = set()
        self.cut: set[int] = set()
        self.shards: list[tuple[Axis, Axis]] = []
        self._numbers: dict[Place, int] = {}
        self._place: Place = ()
        self._keep_alive: list[Any] = []

    # --- Programs --------------------------------------------------------------------------------

    def run(
        self, jaxpr: Any, values: Sequence[Value], wanted: Sequence[bool] | None = None
    ) -> list[Value]:
        """The results of a program; those that are not wanted may say nothing.

        Args:
          jaxpr: the program, closed or not.
          values: what goes in, without the constants of a closed one.
          wanted: whether each result is looked at.
        """
        constants = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = {}
        for var, const in zip(jaxpr.constvars, constants, strict=False):
            known[var] = of_array(const)
        for var in jaxpr.constvars:
            known.setdefault(var, constant(var.aval.shape))
        known.update(zip(jaxpr.invars, values, strict=True))
        wanted = [True] * len(jaxpr.outvars) if wanted is None else list(wanted)
        live = live_equations(jaxpr, tuple(wanted))
        for eqn in jaxpr.eqns:
            if id(eqn) in live:
                ins = [self._read(known, var) for var in eqn.invars]
                known.update(zip(eqn.outvars, self._equation(eqn, ins), strict=True))
        return [
            self._read(known, var) if want else constant(var.aval.shape)
            for var, want in zip(jaxpr.outvars, wanted, strict=True)
        ]

    def _read(self, known: dict[Any, Value], var: Any) -> Value:
        shape = getattr(var.aval, "shape", ())
        if isinstance(var, Literal):
            return Value(shape, Kind.CONSTANT, gaps(shape))
        # What only unwanted results hang on was not computed.
        return known[var] if var in known else constant(shape)

    def _equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        self._keep_alive.append(eqn)
        self.entered.update(leaf for value in values for leaf in value.touches())
        outer, self._place = self._place, (*self._place, id(eqn))
        try:
            for written in (self.uses, self.notes, self.meetings, self.closed):
                written.pop(self._place, None)
            function = RULES.get(eqn.primitive.name, unknown)
            try:
                out = function(self, eqn, values)
            except (CannotFollow, KeyError):
                # Also where another version of JAX keeps a primitive's parameters elsewhere.
                out = unknown(self, eqn, values)
            out = [out] if isinstance(out, Value) else out
            return [x.tidy(is_inexact(var)) for x, var in zip(out, eqn.outvars, strict=True)]
        finally:
            self._place = outer

    # --- What is written down --------------------------------------------------------------------

    @property
    def place(self) -> Place:
        """The equation at hand."""
        return self._place

    def note(self, leaf: int, kind: str, text: str) -> None:
        """Write down something of a parameter that has two axes at least."""
        if sum(size > 1 for size in self.shapes[leaf]) > 1:
            self.notes.setdefault(self._place, []).append(Note(leaf, kind, text))

    def doubt(self, view: View, text: str) -> None:
        """Write down a doubt of a parameter, if what is there of it may be a matrix."""
        if len(view.live) > 1:
            self.note(view.leaf, "doubt", text)

    def close(self, pending: int) -> None:
        """Write down that what these products made is summed against what none made."""
        self.closed[self._place] = self.closed.get(self._place, 0) | pending

    def loop(self) -> int:
        """The bit of the loop at hand, behind all that a round of it leaves to the next."""
        return 1 << self.product(0)

    def loop_bit(self, place: Place) -> int:
        """The bit of the loop at a place; 0 where there is none."""
        return 1 << self._numbers[place] if place in self._numbers else 0

    def innermost(self, place: Place) -> int:
        """The bit of the innermost loop around an equation; 0 where there is none."""
        for end in reversed(range(1, len(place))):
            if place[:end] in self._numbers:
                return self.loop_bit(place[:end])
        return 0

    def product(self, pending: int) -> int:
        """The number of the product at hand, which the products in `pending` enter."""
        number = self._numbers.setdefault(self._place, len(self.followers))
        if number == len(self.followers):
            self.followers.append(0)
        for other in bits(pending):
            self.followers[other] |= 1 << number
        return number


def unknown(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """A primitive without a rule: what enters it is unknown behind it."""
    for value in values:
        for leaf in value.touches():
            reader.note(leaf, "doubt", f"passes {eqn.primitive.name}, which by_use can't follow")
    out = []
    for var in eqn.outvars:
        shape = ints(getattr(var.aval, "shape", ()))
        out.append(merge(shape, values, fresh_axes(shape)))
    pending = functools.reduce(int.__or__, (value.pending for value in values), 0)
    others = [
        value
        for value, var in zip(values, eqn.invars, strict=True)
        if value.kind is not Kind.CONSTANT and not value.pending and is_inexact(var)
    ]
    if pending and others:
        reader.close(pending)
    if pending:
        # Activations may meet in there, as in a kernel for attention.
        reader.meetings[reader.place] = Meeting((), ((), ()), pending)
        out = [dataclasses.replace(x, fresh=x.fresh | {reader.place}) for x in out]
    return out


def ints(numbers: Any) -> list[int]:
    """Python's own integers: programs hold NumPy's here and there."""
    return [*map(int, numbers)]


def shape_of(eqn: Any, number: int = 0) -> tuple[int, ...]:
    """The shape of an equation's outcome."""
    return tuple(ints(eqn.outvars[number].aval.shape))


def is_inexact(var: Any) -> bool:
    """Whether a gradient can pass a variable."""
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def bits(number: int) -> list[int]:
    """The places of the ones in a number."""
    out = []
    while number:
        low = number & -number
        out.append(low.bit_length() - 1)
        number ^= low
    return out


def of_array(array: Any) -> Value:
    """A constant whose entries are at hand: it may count, or be a table of indicators."""
    value = constant(np.shape(array))
    dtype = getattr(array, "dtype", None)
    if (
        isinstance(array, Tracer)
        or dtype is None
        or not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_)
        or not math.prod(value.shape)
    ):
        return value
    entries = np.asarray(array)
    counts = frozenset(
        axis
        for axis, size in enumerate(entries.shape)
        if entries.size == size > 1 and np.array_equal(entries.ravel(), np.arange(size))
    )
    is_indicator = entries.size > 1 and bool(np.all((entries == 0) | (entries == 1)))
    rows_of_one = (
        is_indicator and entries.ndim == 2 and np.array_equal(entries.sum(1), np.ones(len(entries)))
    )
    return dataclasses.replace(
        value,
        counts=counts,
        indicator=is_indicator,
        onehot=frozenset({1}) if rows_of_one and entries.shape[1] > 1 else frozenset(),
    )


def restructure(
    reader: Reader,
    value: Value,
    shape: Sequence[int],
    function: Callable[[tuple[Axis, ...]], Sequence[Axis]],
    moved: dict[int, int] | None = None,
    what: str = "",
) -> Value:
    """A value whose entries are moved, repeated or left out.

    Args:
      reader: the reader.
      value: the value before.
      shape: its shape after.
      function: a function from the atoms of its axes to those after.
      moved: the places where axes that stay whole go, for what is known along them.
      what: the operation's name, for doubts.
    """
    try:
        axes = tuple(function(value.axes))
    except CannotFollow:
        axes = tuple(derived(size, *value.axes) for size in shape)
    views = []
    for view in value.views:
        try:
            views.append(view.replace_axes(function(view.axes)))
        except LookupError:
            continue
        except CannotFollow:
            reader.doubt(view, f"{what} cuts across its axes")
    moved = moved or {}
    return dataclasses.replace(
        value,
        shape=tuple(shape),
        axes=axes,
        views=tuple(views),
        onehot=frozenset(moved[x] for x in value.onehot if x in moved),
        single=frozenset(moved[x] for x in value.single if x in moved),
        counts=frozenset(moved[x] for x in value.counts if x in moved),
        codes=frozenset(moved[x] for x in value.codes if x in moved),
    )
