"""Rules for primitives that run other programs: calls, loops, branches, and pieces on devices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from muon_jax._routing.use.atoms import Axis, CannotFollow, Digit, Gap, Part, align, leaves
from muon_jax._routing.use.labels import Label
from muon_jax._routing.use.live import CALLS, called
from muon_jax._routing.use.reader import Reader, ints, rule, shape_of, unknown
from muon_jax._routing.use.values import (
    Kind,
    Taken,
    Value,
    View,
    derived,
    fresh_axes,
    gaps,
    is_as,
    join,
    labels_in,
    merge,
)

_MOST_ROUNDS = 12


@rule(*CALLS)
def call(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """A program that runs once."""
    inner = called(eqn)
    return unknown(reader, eqn, values) if inner is None else reader.run(inner, values)


@rule("cond")
def cond(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """One of several programs: what holds of all of them."""
    outcomes = [reader.run(branch, values[1:]) for branch in eqn.params["branches"]]
    out = list(outcomes[0])
    for other in outcomes[1:]:
        out = [join(a, b) for a, b in zip(out, other, strict=True)]
    if values[0].kind is Kind.DATA:
        out = [_by_data(reader, value) for value in out]
    return out


def _by_data(reader: Reader, value: Value) -> Value:
    return value if value.kind is not Kind.CONSTANT else dataclasses.replace(value, kind=Kind.DATA)


# --- Loops ----------------------------------------------------------------------------------------


@rule("while")
def while_(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """A loop whose values go round until a condition ends it."""
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    values = _apart(reader, values)
    constants, start = values[of_cond : of_cond + of_body], values[of_cond + of_body :]
    body = eqn.params["body_jaxpr"]
    return _rounds(reader, lambda carry: reader.run(body, [*constants, *carry]), start)[0]


@rule("scan")
def scan(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """A loop over the leading entries of its operands."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    inner = getattr(body, "jaxpr", body)

    # What is carried keeps its rank, and what is scanned loses an axis, in every version of JAX.
    def rank(var: Any) -> int:
        return len(getattr(var.aval, "shape", ()))

    carried = sum(rank(a) == rank(b) for a, b in zip(eqn.outvars, inner.outvars, strict=True))
    scanned = sum(rank(a) != rank(b) for a, b in zip(eqn.invars, inner.invars, strict=True))
    first = len(values) - scanned
    if length > 1:
        values = _apart(reader, values)
    constants, start, xs = (
        values[: first - carried],
        values[first - carried : first],
        values[first:],
    )
    place = reader.place
    entries = [_entry(reader, x, place) for x in xs]
    if length == 1:
        outcome = reader.run(body, [*constants, *start, *entries])
        carry, ys = outcome[:carried], outcome[carried:]
    else:
        carry, ys = _rounds(
            reader, lambda carry: reader.run(body, [*constants, *carry, *entries]), start
        )
    time = next((x.axes[0] for x in xs if any(y.of_data for y in labels_in(x.axes[0]))), None)
    return [*carry, *(_stacked(y, length, time, place) for y in ys)]


def _apart(reader: Reader, values: Sequence[Value]) -> list[Value]:
    """What enters a loop, without what an earlier run of the same loop left."""
    bit = reader.loop()
    return [dataclasses.replace(value, behind=value.behind & ~bit) for value in values]


def _left(reader: Reader, before: Value, after: Value) -> Value:
    """What a round leaves to the next, marked as such if a product is behind it."""
    if after is before or not after.behind:
        return after
    return dataclasses.replace(after, behind=after.behind | reader.loop())


def _rounds(reader: Reader, body: Any, start: Sequence[Value]) -> tuple[list[Value], list[Value]]:
    """The values that a loop carries at its end, and what it leaves in each round."""
    carry = list(start)
    for _ in range(_MOST_ROUNDS):
        outcome = body(carry)
        after = [_left(reader, a, b) for a, b in zip(carry, outcome, strict=False)]
        _note_starts(reader, carry, after)
        joined = [join(a, b) for a, b in zip(carry, after, strict=True)]
        if all(is_as(a, b) for a, b in zip(joined, carry, strict=True)):
            return joined, outcome[len(carry) :]
        carry = joined
    for value in carry:
        for view in value.views:
            reader.doubt(view, "changes place in each round of a loop that carries it")
    carry = [dataclasses.replace(value, views=()) for value in carry]
    outcome = body(carry)
    after = [dataclasses.replace(x, views=()) for x in outcome[: len(carry)]]
    return [join(a, b) for a, b in zip(carry, after, strict=True)], outcome[len(carry) :]


def _note_starts(reader: Reader, carry: list[Value], after: list[Value]) -> None:
    """A parameter that a loop carries on as activations is the first state."""
    for a, b in zip(carry, after, strict=True):
        if a.kind is Kind.PARAMETER and b.kind is Kind.DATA:
            for view in a.views:
                reader.note(view.leaf, "elementwise", "the first state of a loop")


def _entry(reader: Reader, value: Value, place: tuple) -> Value:
    """What one round of a scan sees of a scanned value."""
    views = []
    for view in value.views:
        atoms = leaves(view.axes[0])
        if any(isinstance(atom, Part) for atom in view.axes[0]):
            reader.doubt(view, "joined with others, then scanned")
            continue
        digits = [x for x in atoms if isinstance(x, Digit) and view.lengths[x.axis] > 1]
        taken = {Taken(digit.axis, "scan", None, digit, place) for digit in digits}
        views.append(dataclasses.replace(view, axes=view.axes[1:], taken=view.taken | taken))
    return dataclasses.replace(
        value,
        shape=value.shape[1:],
        axes=value.axes[1:],
        views=tuple(views),
        onehot=frozenset(x - 1 for x in value.onehot if x),
        single=frozenset(x - 1 for x in value.single if x),
        counts=frozenset(x - 1 for x in value.counts if x),
        codes=frozenset(x - 1 for x in value.codes if x),
    ).tidy(True)


def _stacked(value: Value, length: int, time: Axis | None, place: tuple) -> Value:
    """What a scan stacks of a value that each round leaves."""
    views = []
    for view in value.views:
        mine = [x for x in view.taken if x.scan == place]
        axis = tuple(x.digit for x in mine if x.digit is not None) if len(mine) == 1 else ()
        axes = (axis or (Gap(length),), *view.axes)
        views.append(dataclasses.replace(view, axes=axes, taken=view.taken - {*mine}))
    axis = time if time is not None else (Label(length),)
    return dataclasses.replace(
        value,
        shape=(length, *value.shape),
        axes=(axis, *value.axes),
        views=tuple(views),
        onehot=frozenset(x + 1 for x in value.onehot),
        single=frozenset(x + 1 for x in value.single),
        codes=frozenset(x + 1 for x in value.codes),
        counts=frozenset(),
    )


# --- Pieces on devices ----------------------------------------------------------------------------


@rule("shard_map")
def shard_map(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """A program that each device runs on its piece."""
    body = eqn.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)
    pieces = [
        resized(reader, value, ints(var.aval.shape))
        for value, var in zip(values, inner.invars, strict=True)
    ]
    outcome = reader.run(body, pieces)
    return [
        resized(reader, value, ints(var.aval.shape))
        for value, var in zip(outcome, eqn.outvars, strict=True)
    ]


@rule("all_gather", "all_gather_invariant")
def all_gather(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """The pieces of all devices, side by side or along a new axis."""
    tiled, out = eqn.params.get("tiled", False), []
    for value, var in zip(values, eqn.outvars, strict=True):
        shape = ints(var.aval.shape)
        if tiled:
            out.append(resized(reader, value, shape))
            continue
        for view in value.views:
            reader.doubt(view, "gathered from devices along a new axis")
        axes = list(value.axes)
        where = eqn.params["all_gather_dimension"]
        axes.insert(where, (Label(shape[where]),))
        out.append(merge(shape, [value], tuple(axes)))
    return out


@rule("all_to_all", "reduce_scatter", "psum_scatter")
def exchange(reader: Reader, eqn: Any, values: list[Value]) -> list[Value]:
    """Pieces that go to other devices: axes that keep their length keep their labels."""
    out = []
    for value, var in zip(values, eqn.outvars, strict=True):
        shape = ints(var.aval.shape)
        for view in value.views:
            reader.doubt(view, f"passes {eqn.primitive.name}")
        same = len(shape) == len(value.shape)
        axes = tuple(
            value.axes[i] if same and value.shape[i] == size else fresh_axes((size,))[0]
            for i, size in enumerate(shape)
        )
        out.append(merge(shape, [value], axes))
    return out


@rule("axis_index", "platform_index")
def index(reader: Reader, eqn: Any, values: list[Value]) -> Value:
    """The device's own place: the same program for all."""
    shape = shape_of(eqn)
    return Value(shape, Kind.CONSTANT, gaps(shape))


def resized(reader: Reader, value: Value, shape: Sequence[int]) -> Value:
    """A value as a device's piece of it, or the whole of pieces."""
    if len(shape) != len(value.shape):
        raise CannotFollow
    axes = tuple(
        axis if before == after else _resized_label(reader, axis, before, after)
        for axis, before, after in zip(value.axes, value.shape, shape, strict=True)
    )
    views = []
    for view in value.views:
        try:
            views.append(_resized_view(view, value.shape, shape))
        except CannotFollow:
            reader.doubt(view, "its pieces on devices can't be followed")
    same = {i for i, size in enumerate(shape) if size == value.shape[i]}
    return dataclasses.replace(
        value,
        shape=tuple(shape),
        axes=axes,
        views=tuple(views),
        onehot=value.onehot & same,
        single=value.single & same,
        counts=value.counts & same,
        codes=value.codes & same,
    )


def _resized_label(reader: Reader, axis: Axis, before: int, after: int) -> Axis:
    for whole, piece in reader.shards:
        known, wanted = (piece, whole) if after > before else (whole, piece)
        if known == axis and _length(wanted) == after:
            return wanted
    try:
        if before % after == 0:
            piece = align(axis, (before // after, after))[1]
            reader.shards.append((axis, piece))
            return piece
    except CannotFollow:
        pass
    return derived(after, axis)


def _length(axis: Axis) -> int:
    out = 1
    for atom in axis:
        out *= atom.size
    return out


def _resized_view(view: View, before: Sequence[int], after: Sequence[int]) -> View:
    axes, lengths = list(view.axes), list(view.lengths)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        axis = axes[i]
        if any(isinstance(atom, Part) for atom in axis) or (old % new and new % old):
            raise CannotFollow
        if old > new:
            major, minor = align(axis, (old // new, new))
            for digit in major:
                if isinstance(digit, Digit):
                    lengths[digit.axis] //= digit.size
            axes[i] = minor or (Gap(new),)
        elif axis and isinstance(axis[0], Digit):
            digit = axis[0]
            axes[i] = (dataclasses.replace(digit, size=digit.size * (new // old)), *axis[1:])
            lengths[digit.axis] *= new // old
        elif axis and isinstance(axis[0], Gap):
            axes[i] = (Gap(axis[0].size * (new // old)), *axis[1:])
        else:
            raise CannotFollow
    return dataclasses.replace(view, axes=tuple(axes), lengths=tuple(lengths))
